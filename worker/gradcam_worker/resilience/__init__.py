"""Deadlines, retries, the circuit breaker, budgets, the exclusive gate, the watch over stalled work.

Independent of jobs. Begin at `deadline.Deadline`.
"""
