"""Audits of a dataset of heatmaps: what is read of it, what is said, and the pages. Begin at `run`."""
