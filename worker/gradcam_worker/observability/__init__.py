"""What a process reports about itself: logs, traces, metrics, health.

Start with `events.Observer` and `health.Health`.
"""
