"""Loaded networks, and the batches that they compute on the device.

`model_cache.ModelCache` is the entry point. `batcher` merges the images of many jobs into batches.
"""
