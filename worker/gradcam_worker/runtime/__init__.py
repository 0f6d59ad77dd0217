"""The processes of a worker: supervisor, worker process, delivery process, devices, liveness, start checks.

Begin at `supervisor`, which starts `worker_process`; `bootstrap` builds what a worker process needs.
"""
