"""What is read of a dataset of heatmaps: counts, records of predictions, samples. Begin at `dataset_pass`."""
