"""The Python client of a release, in a process of its own: `release_client.py PACKAGE`.

It reads calls from standard input and answers each on standard output when it has ended, a line of JSON each:
`{"number": 1, "call": "submit", "given": {...}}`, `{"number": 1, "answer": ...}` or, where the
client has raised an error, `{"number": 1, "error": ["LedgerUnavailable", "..."]}`.

It imports no other package of this repository: PACKAGE may be that of an earlier release.
"""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

THREADS = 32  # each job that is watched has one
WATCH_S = 240.0


class Calls:
    """What may be called."""

    def __init__(self, package: str) -> None:
        """The client has the settings of the environment."""
        self._client = import_module(f"{package}.client").GradcamClient()

    def submit(self, given: Any) -> Any:
        """Submit a job: its id."""
        return str(self._client.submit(given))

    def cancel(self, given: Any) -> Any:
        """Cancel a job: its status."""
        return self._client.cancel(given).status

    def watch(self, given: Any) -> Any:
        """Follow a job to its end: status, revision and attempt of each document that came."""
        return [
            [document.status, document.revision, document.attempt]
            for document in self._client.stream(given, WATCH_S)
        ]

    def read(self, given: Any) -> Any:
        """Job id -> its document."""
        documents = self._client.statuses(given)
        return {job_id: json.loads(document.to_json()) for job_id, document in documents.items()}


def main(package: str) -> None:
    """Answer until standard input ends."""
    calls, lock = Calls(package), threading.Lock()

    def answer(asked: dict[str, Any]) -> None:
        try:
            told = {"answer": getattr(calls, asked["call"])(asked["given"])}
        except Exception as error:  # noqa: BLE001  # whoever asked decides what it means
            told = {"error": [type(error).__name__, str(error)]}
        with lock:
            sys.stdout.write(json.dumps({"number": asked["number"], **told}) + "\n")
            sys.stdout.flush()

    with ThreadPoolExecutor(THREADS) as pool:
        for line in sys.stdin:
            pool.submit(answer, json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1])
