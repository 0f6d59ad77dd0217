"""Backfills: a very long list of images is cut into shards, which workers explain into one dataset.

Start with `runner.BackfillRunner`. `inputs` reads the list, `sharding` cuts it, `inflight` follows the
shards, `output` is the dataset's folder, and `registry` holds the lease on it.
"""
