"""The processes of a host: supervisor, worker, engine and delivery process, their start and their checks.

Begin at `supervisor`, which starts `worker_process`; `bootstrap` builds what a worker process needs.
"""
