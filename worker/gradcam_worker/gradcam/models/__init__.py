"""Networks: the registry, files and weights, loading, and `keras_network.KerasNetwork` itself.

Begin at `loading.load_network`.
"""
