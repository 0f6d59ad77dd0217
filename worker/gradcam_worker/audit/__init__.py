"""Audits of a dataset of heatmaps: its statistics, the gallery page, the audit. Begin at `run`."""
