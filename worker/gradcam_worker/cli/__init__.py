"""The commands of `gradcam`: parse options, call `operations` or `client`, return the exit code.

Begin at `main`.
"""
