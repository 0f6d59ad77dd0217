"""The ledger in Redis: each change is one Lua script. Begin at `store.RedisLedger`."""
