"""The environment that other libraries are measured in: made once, with the pip that the user has set up.

Its folder is what the environment variable BENCH_PEERS names, else `gradcam-worker/peers` in the
user's cache. What is installed stands in peers.txt.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`; `peers` are measured, whatever else peers.txt holds carries them."""

    folder: Path
    peers: tuple[str, ...]

    @classmethod
    def of_user(cls, peers: tuple[str, ...]) -> "Environment":
        """Where the user wants it, or in the user's cache."""
        named = os.environ.get("BENCH_PEERS")  # no GRADCAM_: those are settings of the worker
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(Path(named) if named else cache / "gradcam-worker" / "peers", peers)

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @cached_property
    def pins(self) -> dict[str, str]:
        """Package -> how peers.txt pins it."""
        lines = PINS.read_text(encoding="utf-8").splitlines()
        pinned = [line for line in lines if line and not line.startswith("#")]
        return {line.partition("==")[0]: line for line in pinned}

    def versions(self, *packages: str) -> dict[str, str]:
        """Package -> its version, as pinned."""
        return {name: self.pins[name].partition("==")[2] for name in packages}

    def make(self) -> dict[str, str]:
        """Install what is not there yet; peer -> why it could not be installed."""
        stamp = self.folder / "installed.txt"
        wanted = hashlib.sha256((PINS.read_text() + sys.version).encode()).hexdigest()
        have = stamp.read_text().split() if stamp.is_file() else []
        if have[:1] != [wanted]:
            say(f"Making the environment {self.folder}: some minutes, and about 1.5 GB of downloads.")
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
            carrying = [pin for name, pin in self.pins.items() if name not in self.peers]
            if failed := self._install(*carrying) or self._make_torch_start():
                return dict.fromkeys(self.peers, failed)
            have = [wanted]
        found = {peer: self._install(self.pins[peer]) for peer in self.peers if peer not in have}
        missing = {peer: reason for peer, reason in found.items() if reason}
        stamp.write_text(" ".join([*have, *(found.keys() - missing.keys())]))
        return missing

    def _make_torch_start(self) -> str:
        """Where only a torch for GPUs is to be had, it does not start without their libraries: add them."""
        command = [str(self.python), "-c", "import torch"]
        if not subprocess.run(command, capture_output=True, check=False).returncode:
            return ""
        say(
            "This torch is made for GPUs and wants their libraries, several GB: an index that has torch's CPU"
        )
        say("builds, given to pip, saves them (pip config set global.extra-index-url ...).")
        return self._install(self.pins["torch"], alone=False)

    def _install(self, *pins: str, alone: bool = True) -> str:
        """Install; why not, or nothing. `alone`: without looking at what the packages ask for."""
        options = ["-q", "--disable-pip-version-check", *(["--no-deps"] if alone else [])]
        command = [str(self.python), "-m", "pip", "install", *options, *pins]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if not done.returncode:
            return ""
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        return (errors or [f"pip ended with {done.returncode}"])[-1].removeprefix("ERROR: ")


def say(line: str) -> None:
    """To a person, beside whatever goes to standard output."""
    print(line, file=sys.stderr, flush=True)
