"""The HTTP API, `gradcam serve`: jobs, events, results, uploads and backfills over `AsyncGradcamClient`.

Begin at `app.create_app`; `routes` has a module for each resource. FastAPI, Starlette and uvicorn are
imported in this package alone.
"""
