"""Python environments beside the project's own, for programs whose packages must not be among its."""

import hashlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


def fingerprint(pins: Path) -> str:
    """Return what changes with the pinned packages, or with this Python."""
    return hashlib.sha256((pins.read_text() + sys.version).encode()).hexdigest()


@dataclass(frozen=True)
class Environment:
    """A virtual environment in a folder, with the words that say what it holds: its stamp."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter; other programs stand beside it."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> list[str]:
        """What `keep` wrote; nothing where the environment was never made."""
        file = self.folder / "installed.txt"
        return file.read_text().split() if file.is_file() else []

    def keep(self, *words: str) -> None:
        """Write the stamp, when all is installed."""
        (self.folder / "installed.txt").write_text(" ".join(words))

    def create(self) -> None:
        """Make it anew, without packages, and without a pip of its own, which takes longest."""
        words = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(self.folder)]
        subprocess.run(words, check=True)

    def pip(self, *arguments: str) -> str:
        """Install into it with the pip of the Python that runs this; return why that failed, else nothing."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        command = [*pip, "install", "-q", "--no-compile", *arguments]  # Python does, what it imports
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reasons = [
            f"pip ended with {done.returncode}",
            *re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE),
        ]
        return reasons[-1] if done.returncode else ""
