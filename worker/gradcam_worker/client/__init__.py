"""For web apps and scripts: submit, wait, stream, results; the same names for asyncio.

Begin at `client.GradcamClient`. Nothing here imports numpy, TensorFlow or Celery.
"""
