"""The commands of `gradcam`: options in, one call of `operations` or `client`, exit code out.

Begin at `main`.
"""
