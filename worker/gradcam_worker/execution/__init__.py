"""One job, or one shard of a backfill, from its claim to its final state.

Begin at `handler.JobHandler`. `pipeline` runs a job, `shards` a shard, row by row with `shard_rows`, and
`leases` renews the leases of both. Their images are prepared in `gradcam_worker.images`.
"""
