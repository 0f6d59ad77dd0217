"""What broker, ledger and backfill share to use a Redis or Valkey server.

`client` has the connections and turns errors of redis-py into ours. `script` defines how a Lua script becomes
a typed call, and `server_checks` checks that a server is set up to lose nothing. The keys are described where
they are used: see `gradcam_worker.ledger.redis`, `gradcam_worker.broker` and
`gradcam_worker.backfill.registry`.
"""
