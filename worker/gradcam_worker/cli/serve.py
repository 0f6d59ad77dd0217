"""The command `gradcam serve`."""

import click

from gradcam_worker import extras
from gradcam_worker.observability.logs import configure_logging
from gradcam_worker.settings import Settings


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(1, 65_535), default=8000, show_default=True, help="Port.")
def serve(host: str, port: int) -> int:
    """Serve the HTTP API until stopped.

    It needs what a client needs: the queue, and GRADCAM_UPLOADS and the S3 settings for images and results.
    Stop it with SIGTERM or Ctrl-C.

    \b
    Example:
      GRADCAM_BROKER_URL=redis://queue:6379/0 gradcam serve --port 8000
    """
    with extras.required("The command gradcam serve", "serve"), extras.without_garbage_collection():
        from gradcam_worker.gateway import server
    settings = Settings.from_environment()
    configure_logging(settings.log_format, settings.log_level)
    return server.run(settings, host, port)
