"""The other end of `peer_serve`: a library in a process of its own, waiting for its turn."""

import json
import os
import subprocess
import tempfile
from typing import Any

from devtools import IMPORT_PATH


class Failed(Exception):
    """A library said that it cannot; the message is its own."""


class Process:
    """A library loaded with a network, waiting for its turn. See `peer_serve` for what it is told."""

    def __init__(self, command: list[str]) -> None:
        """Start it; it is ready once `answer` has been read."""
        quiet = {**os.environ, **IMPORT_PATH, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=quiet
        )

    def answer(self) -> dict[str, Any]:
        """Its next line. Raises Failed with what it says, or with its last words."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        found: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in found:
            raise Failed(found["error"])
        return found

    def ask(self, line: str) -> dict[str, Any]:
        """Tell it to do something, and wait until it has. Raises Failed."""
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Failed(self._last_words()) from None
        return self.answer()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().split("\n")
        said = [line for line in lines if line.strip()]
        return f"ended with {self._process.wait()}: {said[-1] if said else 'without a word'}"

    def close(self) -> None:
        """End it: it ends when nothing more can be said to it."""
        with self._process as ending:
            ending.kill()
        self._log.close()
