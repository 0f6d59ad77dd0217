"""Audits of a dataset of heatmaps: statistics of its classes, and the gallery page. Begin at `gallery`."""
