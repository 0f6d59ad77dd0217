"""The ledger in the memory of one process, for tests and `eager_client`. Begin at `store.MemoryLedger`."""
