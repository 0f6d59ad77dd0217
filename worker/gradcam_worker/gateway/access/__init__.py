"""Who may use the HTTP API, and for what: tenants, their API keys, and their limits.

Begin at `caller.Access`, which finds out who asks. Nothing here imports FastAPI: the commands use it, too.
"""
