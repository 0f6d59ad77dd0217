"""Deadlines, retries, the circuit breaker, budgets, the exclusive gate, the watch over stalled work.

It knows neither networks nor storage. Begin at `deadline.Deadline`.
"""
