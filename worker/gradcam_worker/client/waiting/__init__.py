"""Waiting for jobs: one thread of a process reads the ledger for all who wait. Begin at `waiter`."""
