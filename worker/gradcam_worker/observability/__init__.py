"""What is seen of a process: logs, traces, metrics, health.

Begin at `events.Observer` and `health.Health`.
"""
