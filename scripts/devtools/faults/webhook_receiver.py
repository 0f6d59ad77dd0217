"""A receiver of webhooks in a process of its own, so that it can be killed: writes down each event.

    python -m devtools.faults.webhook_receiver PORT FILE

Each event is one line of FILE: its webhook-id, and the body as JSON text.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def events(file: Path) -> list[dict[str, Any]]:
    """Return all events until now, in their order: `id`, and the fields of the body."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be half of one
    return [json.loads(line) for line in lines]


def serve(port: int, file: Path) -> None:
    """Answer 204 to everything that is JSON, until killed."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            line = json.dumps({"id": self.headers.get("webhook-id"), **json.loads(body)})
            with file.open("a", encoding="utf-8") as out:
                out.write(line + "\n")
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            """A connection that is cut or talks garbage is what it is there for."""

    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
