"""The ledger in this process's memory, for tests and `eager_client`. Begin at `store.MemoryLedger`."""
