"""What a job or a shard writes to storage: overlays, heatmaps, the manifest, the Parquet dataset.

`render` makes the artifacts of one image, `artifacts` uploads them and writes the manifest, and `dataset`
reads and writes the Parquet file of a shard.
"""
