"""Releases at work side by side: this one, and earlier ones out of the repository's history.

An earlier release runs as it did: its commands, its client, and its own worker of the attacks, whose network
is a small one. It has the interpreter and the libraries of this environment.
"""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devtools.faults import tiny_worker
from gradcam_worker.runtime import parent_watch
from gradcam_worker.settings import Settings

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Release:
    """What runs of a release."""

    name: str
    package: str  # its import name
    worker: Path  # its worker of the attacks: `supervise` starts it
    folder: str = ""  # that has the package; "": it is installed here
    has_gateway: bool = True
    # Whether its workers run the shards that this release submits.
    runs_present_shards: bool = True

    def command(self, *words: str) -> list[str]:
        """`gradcam WORDS` of this release."""
        return [sys.executable, "-P", "-m", self.package, *words]

    @property
    def worker_command(self) -> list[str]:
        """`gradcam worker` of this release, with a small network."""
        if not self.folder:
            return tiny_worker.command(self.worker)
        return [sys.executable, "-P", str(self.worker), "supervise"]

    def environment(self, settings: Settings) -> dict[str, str]:
        """What an operator of this release would have set: it may not know the others."""
        usual = Settings().to_environment()
        own = {name: value for name, value in settings.to_environment().items() if value != usual[name]}
        return {**own, "PYTHONPATH": self.folder}

    def words(self, command: Sequence[str], settings: Settings, **variables: str) -> list[str]:
        """A command with its own variables, which a keeper above it does not have."""
        unset = [word for name in os.environ if name.startswith("GRADCAM_") for word in ("-u", name)]
        own = {**self.environment(settings), **variables}
        return ["env", *unset, *(f"{name}={value}" for name, value in own.items()), *command]

    def spawn(
        self, command: Sequence[str], settings: Settings, log: Path, **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start a command of this release below a keeper; end it with `parent_watch.stop`."""
        words = self.words(command, settings, **variables)
        return parent_watch.spawn(words, log=log, grace_s=settings.shutdown_timeout_s + 15)


PRESENT = Release("present", "gradcam_worker", Path(tiny_worker.__file__))


@dataclass(frozen=True)
class EarlierRelease:
    """Where an earlier release is in the history, and what it does not have."""

    commit: str
    package: str
    worker: str
    has_gateway: bool
    runs_present_shards: bool

    def unpack(self, folder: Path) -> Release:
        """Unpack it into a folder.

        Raises:
            RuntimeError: the history is not here.
        """
        words = ["git", "archive", self.commit, "worker", self.worker]
        archive = subprocess.run(words, cwd=ROOT, capture_output=True, check=False)
        if archive.returncode:
            message = (
                f"Commit {self.commit} cannot be unpacked: this attack needs the repository with its whole "
                f"history. git says: {archive.stderr.decode(errors='replace').strip()}"
            )
            raise RuntimeError(message)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        package = folder if self.package == "worker" else folder / "worker"
        return Release(
            self.commit,
            self.package,
            folder / self.worker,
            str(package),
            has_gateway=self.has_gateway,
            runs_present_shards=self.runs_present_shards,
        )


EARLIER = (
    # The last one whose package was called `worker`.
    EarlierRelease(
        "4f0fcac", "worker", "scripts/programs/faulty_worker.py", has_gateway=False, runs_present_shards=False
    ),
    # The last one before Sentinels, instance ids and checks of the Redis server.
    EarlierRelease(
        "ed7414c",
        "gradcam_worker",
        "scripts/devtools/faults/tiny_worker.py",
        has_gateway=True,
        runs_present_shards=True,
    ),
)
