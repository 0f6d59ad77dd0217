"""One job, or one shard of a backfill, from its claim to its final state.

Begin at `handler.JobHandler`; `pipeline` runs a single job, `shards` a shard, `leases` keeps both.
"""
