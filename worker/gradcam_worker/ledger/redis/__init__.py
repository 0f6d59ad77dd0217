"""The ledger in Redis: each change is one Lua script, and so atomic. Begin at `store.RedisLedger`.

The scripts of the ledger and its outbox are in `lua/`, what several of them share in `lua/include/`.
`scripts` and `outbox_scripts` contain the calls. `gradcam_worker.redis_server` has the connections, and
defines how a script becomes a typed call.

Every key begins with a prefix, the setting `key_prefix`. Times are the server's, in milliseconds, so that the
clocks of workers do not matter.

The jobs
    A job is a hash `job:<id>`. Its field `place` names the sorted set that contains the job:

    queued:<route>       queued jobs, by the time when the message was published
    retrying             retrying jobs, by the end of the pause
    running              running jobs, by the end of the lease
    dead                 failed jobs, by the time of the failure

    Other keys:

    idempotency:<hash>   the id of the job with this idempotency key
    idempotency:<tenant>:<hash>   the same for the jobs of a tenant, whose name is the field `tenant` of a job
    expiring             waiting jobs, by the time when they expire
    canceling            running jobs to be canceled
    claimed              for each route, when the latest received message was published
    workers              for each worker, when it last renewed its leases, and its health report
    reaper               the worker that runs the reaper
    ended:<minute>       the number of jobs that became final in this minute, by route and status; kept for a
                         quarter of an hour

    The new revision of a job's document is published on the channel `changed:<id>`.

The turns
    Where jobs of tenants wait in a route, a message there is not for the job that it names, but for the job
    whose turn it is: see `include/turns.lua`, and `ledger/memory/turns.py` for the rule in Python.

    turn:<route>:<tenant>  the tenant's queued jobs, by the time when each was queued. A job whose message was
                           used for another is before those: its place is a negative number
    turns:<route>          the tenants that have queued jobs, by their virtual time: the smallest is next, and
                           a claim adds 1 / share to it. Nobody's jobs have the turns of a tenant without name
    rested:<route>         the virtual times of tenants that had turns lately and have no queued job now: who
                           comes back begins there; and, as `:present`, the largest of which a job was claimed

    As long as no tenant has a queued job in a route, none of its keys exists, and jobs are claimed as their
    messages come. Shards have no turns, nor have jobs whose last worker died: each is claimed for a message
    of its own. In each route there are at least as many messages as queued jobs: a message whose job is not
    queued is used for the job whose turn it is. Where one is lost or dropped (by a worker of an earlier
    version), some job waits until the queue is empty, and the reaper finds it: see `find_unpublished.lua`.

The lists
    For each list of jobs a sorted set of their ids, by the time when they were created, in microseconds.
    There are lists of all jobs, whose scope is empty, and lists of each tenant's, whose scope is its name:

    listed:<scope>:all              all jobs
    listed:<scope>:status:<status>  the jobs in this state
    listed:<scope>:network:<hash>   the jobs for this network
    listed:<scope>:label:<hash>     the jobs with this entry in their metadata

    They are made from the jobs' records, and read with them: a job that an earlier version has entered, or
    has changed, is in the wrong list until this version changes it, and is left out there.

    usage:<tenant>:<day>            the number of a tenant's jobs that ended on a day, counted from the epoch,
                                    and their microseconds on the device; kept for 400 days

The outbox
    A recipient is one webhook of a job, or a sink that receives the events of every job. The recipients at
    one host, or of one sink, share a destination.

    events:<recipient>   a list of the events to deliver, in order
    waiting              for each recipient, the failed tries of its first event, and when that was first due
    lane:<destination>   a sorted set of recipients, by the time when each is due. A claimed recipient is due
                         when its lease ends: that time is also the token of the lease
    outbox               a sorted set of destinations, by the time when the next delivery is due
    down                 for each destination whose last delivery failed, the failures in a row, and the end
                         of its pause
    parked               parked recipients, by the time when they were parked
    gone, later          URLs to which nothing is delivered (gone: disabled), by the end of that
    sinks                the names of sinks

    A recipient that is not parked is in the set of its destination exactly as long as it has events. When
    everything is delivered, none of these keys is left except `sinks`.
"""
