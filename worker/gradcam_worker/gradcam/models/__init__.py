"""Keras models that are taken apart: loading, checks, precision, the forward pass.

Begin at `loading.load_network`.
"""
