"""Networks in memory and passes of the device: the model cache and the dynamic batcher.

Begin at `model_cache.ModelCache`.
"""
