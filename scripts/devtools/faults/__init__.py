"""Attacks on the worker's promises: what `scripts/faults` runs.

Begin with `campaign`, which knows every attack, and with `kill`, an attack that uses what most of them use:
`cluster` (servers behind proxies that misbehave, and workers), `observer` (what became of the jobs) and
`verdict`.
"""
