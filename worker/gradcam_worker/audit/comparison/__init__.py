"""What moved between two datasets of heatmaps: `gradcam compare`. Begin at `compare`."""
