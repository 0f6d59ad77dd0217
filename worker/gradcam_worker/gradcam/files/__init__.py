"""Files of models: what they are and why one is refused, weights, labels, the cache of downloads."""
