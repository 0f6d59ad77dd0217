"""Benchmarks: what `scripts/bench NAME` measures, a module for each NAME.

Begin with `timing`, in which ways to compute take turns, and with `testbed`, which starts real servers and a
real worker. `service` is a bench that uses both.
"""
