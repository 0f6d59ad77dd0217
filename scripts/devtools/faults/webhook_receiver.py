"""A receiver of webhooks in a process of its own, so that it can be killed: writes down each event.

    webhook_receiver.py PORT FILE

Each event is one line of FILE: the request's headers, and its body as text.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def events(file: Path) -> list[dict[str, Any]]:
    """Return all events until now, in their order: `headers`, `body` and the body's `data`."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be half of one
    requests = [json.loads(line) for line in lines]
    return [{**request, "data": json.loads(request["body"])["data"]} for request in requests]


class Server(ThreadingHTTPServer):
    """Answers 204 to every event."""

    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *args: object) -> None:
        """A connection that is cut or talks garbage is what it is there for."""


class Handler(BaseHTTPRequestHandler):
    """Writes an event into the file."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Write it down first."""
        body = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
        json.loads(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        with Path(sys.argv[2]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"headers": headers, "body": body}) + "\n")
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
