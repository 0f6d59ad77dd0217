"""Runs one job, or one shard of a backfill, from its claim to its final state.

`handler.JobHandler` is the entry point. `pipeline` runs a job, `shards` and `shard_rows` run a shard, and
`leases` renews the leases of both. Their images are prepared in `gradcam_worker.images`.
"""
