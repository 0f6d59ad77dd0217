"""A very long list of images becomes shards, and the shards one dataset.

Begin at `runner.BackfillRunner`; `inputs` reads the list, `plan` cuts it, `output` is the
dataset being written.
"""
