"""Images of heatmaps: overlays, boxes and contours, sheets, animations. Begin at `overlay`."""
