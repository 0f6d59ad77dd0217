"""Heatmaps become pictures: overlays, boxes and contours, grids, animations. Begin at `overlay`."""
