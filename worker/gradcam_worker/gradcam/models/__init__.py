"""Loading networks: the registry, model files, weights, and `keras_network.KerasNetwork`.

Begin at `loading.load_network`.
"""
