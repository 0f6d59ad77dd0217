"""The ledger in Redis: each change is one Lua script, and so atomic. Begin at `store.RedisLedger`.

The scripts are files: of the ledger and its outbox in `lua/`, of the registry of backfills in
`gradcam_worker/backfill/lua/`, of the consumer in `gradcam_worker/broker/lua/`; what several share is in
`lua/include/`. `script` says how a file becomes a typed call; `scripts` and `outbox_scripts` are the calls.

Every key begins with a prefix, the setting `key_prefix`. Times are the server's own, in milliseconds: no two
workers' clocks have to agree.

The jobs
    A job is a hash `job:<id>`, whose field `place` names the sorted set that the job stands in:

    queued:<route>       by when its message was published
    retrying             by when its pause is over
    running              by when its lease runs out
    dead                 failed, by when

    Besides:

    idempotency:<hash>   the id of the job that has this idempotency key
    expiring             waiting jobs, by when they expire
    canceling            running jobs that are to stop
    claimed              for each route, when the latest message that came through was published
    workers              for each worker, when it was heard of last, and its health
    reaper               the worker that reaps
    ended:<minute>       how many jobs ended in this minute, by route and state; for a quarter of an hour

    On the channel `changed:<id>` the new revision of a job's document is published.

The outbox
    A recipient is one webhook of a job, or a sink that hears of every job; the recipients at one host, or of
    one sink, share a destination.

    events:<recipient>   a list of the events that a recipient is to get, in order
    waiting              for each recipient, how often its first event was tried, and since when it could be
    lane:<destination>   a sorted set of recipients, by when each is due. A recipient that a dispatcher has
                         claimed is due when its lease ends: that moment is also the lease's token
    outbox               a sorted set of destinations, by when something may be tried there
    down                 for each destination that failed the last time, how often in a row, and until when it
                         is left alone
    parked               recipients that were given up, by when
    gone, later          URLs that want to hear nothing, by until when
    sinks                who hears of every job

    A recipient that is not parked stands at its destination exactly as long as it has events. Nothing of all
    this is left when everything has been delivered.
"""
