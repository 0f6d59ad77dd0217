"""The truth about every job: rules and states, the outbox, the reaper, dead letters.

Begin at `ledger.Ledger`; `redis` and `memory` keep it.
"""
