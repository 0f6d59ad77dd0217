"""The ledger, the authoritative record of every job: rules, states, outbox, reaper and dead letters.

Begin at `ledger.Ledger`. Its subclasses in `redis` and `memory` store the jobs.
"""
