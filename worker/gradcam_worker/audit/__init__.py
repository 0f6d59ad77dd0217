"""What a dataset of heatmaps says: statistics of its classes, and the gallery page. Begin at `gallery`."""
