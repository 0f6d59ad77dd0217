"""What a job leaves behind: overlays, heatmap arrays, the manifest; a shard: its Parquet file.

Begin at `render`; `artifacts` uploads, the manifest last; `dataset` is the one door to Arrow.
"""
