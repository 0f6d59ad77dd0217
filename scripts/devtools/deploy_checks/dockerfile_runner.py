"""A Dockerfile carried out without Docker.

Each stage becomes a folder. Its instructions are run there one after the other by an ordinary user: the
image's own uid where this is root, else the user of this process.

What is understood: FROM (an image, or a stage), ARG, ENV, WORKDIR, COPY [--from=STAGE] without patterns, RUN
in its shell form, also with --mount=type=bind,from=STAGE, USER, and ENTRYPOINT, CMD and HEALTHCHECK in their
exec form; EXPOSE, LABEL and STOPSIGNAL do not say how it is made. Anything else is refused.

What is not as in a container:
* the system below it is this machine's, and so is its Python;
* the paths of MOVED lie below the stage's folder, wherever an instruction names them;
* `RUN useradd` makes its home and no account;
* pip asks the index, and keeps the cache, of this user.
"""

import contextlib
import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypedDict

from devtools import ROOT
from devtools.deploy_checks.dockerfile import (
    DOCKERFILE,
    Instruction,
    Stage,
    allowed,
    instructions,
    stages,
)

MOVED = ("opt", "src", "srv", "dist", "cache")  # first parts of the paths that belong to an image
SILENT = {"EXPOSE", "LABEL", "STOPSIGNAL"}
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_PATHS = re.compile(rf"(?<![\w./-])/(?={'|'.join(MOVED)}\b)")
_MOUNT = re.compile(
    r"--mount=type=bind,from=(?P<stage>[\w-]+),source=(?P<source>\S+?),target=(?P<target>\S+)\s+"
)


class NotUnderstood(Exception):
    """The Dockerfile holds what this does not know."""


class Failed(Exception):
    """An instruction did not do what it should."""


class Identity(TypedDict, total=False):
    """The arguments of subprocess that say which user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass
class Made:
    """A stage that has been carried out: its folder, and what a container of it would be started with."""

    folder: Path
    environment: dict[str, str]
    workdir: str = "/"
    user: str = "0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def moved(self, text: str) -> str:
        """The same with every path of the image's where it lies here."""
        return _PATHS.sub(lambda _: f"{self.folder}/", text)


@dataclass
class Builder:
    """Carries out a Dockerfile below `folder`, as `uid` where this is root."""

    folder: Path
    uid: int
    arguments: Mapping[str, str] = field(default_factory=dict)  # as --build-arg
    made: dict[str, Made] = field(default_factory=dict)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """What the Dockerfile holds."""
        return stages(DOCKERFILE.read_text())

    @property
    def identity(self) -> Identity:
        """As whom programs are started."""
        return Identity(user=self.uid, group=self.uid, extra_groups=[]) if os.getuid() == 0 else Identity()

    @cached_property
    def python(self) -> Path:
        """A Python that the user may run and that can make environments."""
        check = "import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
        for path in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
            command = [os.path.realpath(path), "-c", check]
            with contextlib.suppress(OSError):  # not there, or closed to the user
                if not subprocess.run(
                    command, capture_output=True, cwd="/", check=False, **self.identity
                ).returncode:
                    return Path(command[0])
        message = "No Python 3.11 to 3.13 with ensurepip can be run by the image's user: install one in /usr."
        raise Failed(message)

    def make(self, name: str) -> Made:
        """Carry out a stage, and before it those that it stands on. Raises NotUnderstood, Failed."""
        if name not in self.made:
            stage = self.stages[name]
            folder = self.folder / name
            self.own_folder(folder)
            if stage.parent in self.stages:
                parent = self.make(stage.parent)
                made = copy.deepcopy(parent)
                made.folder = folder
                self._copy(f"{parent.folder}/.", folder)
            else:
                made = Made(folder, {"PATH": SYSTEM_PATH})
            self.made[name] = made
            arguments: dict[str, str] = {}
            for one in stage.instructions:
                self._do(one, made, arguments)
        return self.made[name]

    def _do(self, one: Instruction, made: Made, arguments: dict[str, str]) -> None:
        known = {**arguments, **made.environment}
        if one.name == "ARG":
            key, _, value = one.text.partition("=")
            arguments[key] = self.arguments.get(key) or value or self._default(key)
        elif one.name == "ENV":
            made.environment |= dict(_filled(pair, known).split("=", 1) for pair in shlex.split(one.text))
        elif one.name == "WORKDIR":
            made.workdir = one.text
            self.own_folder(Path(made.moved(one.text)))
        elif one.name == "COPY":
            self._copy_in(one, made)
        elif one.name == "RUN":
            self._run(one, made, arguments)
        elif not _started_with(one, made) and one.name not in SILENT:
            message = f"The builder does not know this instruction of docker/Dockerfile: {one}"
            raise NotUnderstood(message)

    def _default(self, key: str) -> str:
        """What an ARG says elsewhere: in the stage that has its value, or before all."""
        text = DOCKERFILE.read_text()
        said = [
            one.text for one in instructions(text) if one.name == "ARG" and one.text.startswith(f"{key}=")
        ]
        return said[0].partition("=")[2] if said else ""

    def _copy_in(self, one: Instruction, made: Made) -> None:
        words = shlex.split(one.text)
        options = [words.pop(0) for _ in list(words) if words[0].startswith("--")]
        if len(options) > 1 or any(not option.startswith("--from=") for option in options):
            message = f"This builder knows no option of COPY but --from: {one}"
            raise NotUnderstood(message)
        *sources, target = words
        place = (
            Path(made.moved(target)) if target.startswith("/") else Path(made.moved(made.workdir)) / target
        )
        for source in sources:
            if options:
                origin = self.make(options[0].partition("=")[2])
                self._copy(f"{origin.moved(source)}/.", place)
                continue
            if not allowed(source):
                message = f"docker/Dockerfile.dockerignore keeps {source} from the builder: {one}"
                raise Failed(message)
            here = ROOT / source
            whole = here.is_dir() or (len(sources) == 1 and not target.endswith("/"))
            self._copy(f"{here}/." if here.is_dir() else str(here), place if whole else place / here.name)

    def _copy(self, source: str, target: Path) -> None:
        """Copy a file, or what is in a folder (`FOLDER/.`), for the user; what was made here is linked."""
        self.own_folder(target if source.endswith("/.") else target.parent)
        if source.startswith(f"{self.folder}/"):
            subprocess.run(["/bin/cp", "--archive", "--link", source, str(target)], check=True)
            return
        subprocess.run(["/bin/cp", "--archive", source, str(target)], check=True)
        for old in target.rglob("__pycache__"):
            shutil.rmtree(old)
        if self.identity:
            subprocess.run(["/bin/chown", "--recursive", f"{self.uid}:{self.uid}", str(target)], check=True)

    def own_folder(self, folder: Path) -> None:
        """Make a folder of the user's, with those above it."""
        if not folder.exists():
            self.own_folder(folder.parent)
            folder.mkdir()
            if self.identity:
                os.chown(folder, self.uid, self.uid)

    def _run(self, one: Instruction, made: Made, arguments: Mapping[str, str]) -> None:
        text = one.text
        if text.startswith("useradd "):
            home = re.search(r"--home-dir (\S+)", text)
            if home and "--create-home" in text:
                self.own_folder(Path(made.moved(home[1])))
            return
        for mount in _MOUNT.finditer(text):
            origin = self.make(mount["stage"])
            self._copy(f"{origin.moved(mount['source'])}/.", Path(made.moved(mount["target"])))
        text = made.moved(_MOUNT.sub("", text))
        if text.startswith(("--", "[")):
            message = f"This builder does not know this way of RUN: {one}"
            raise NotUnderstood(message)
        environment = {**pips(), **self.environment(made), **arguments}
        environment.pop("PIP_NO_CACHE_DIR", None)
        where = made.moved(made.workdir)
        done = subprocess.run(
            ["/bin/sh", "-c", text],
            cwd=where,
            env=environment,
            check=False,
            **self.identity,
            capture_output=True,
            text=True,
        )
        for mount in _MOUNT.finditer(one.text):
            shutil.rmtree(made.moved(mount["target"]))
        if done.returncode:
            message = f"{one}\nended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
            raise Failed(message)

    def environment(self, made: Made) -> dict[str, str]:
        """What a container of this stage has in its environment, and nothing of this machine's."""
        said = {name: made.moved(value) for name, value in made.environment.items()}
        scratch = self.folder / "tmp"
        self.own_folder(scratch)
        path = said.get("PATH", SYSTEM_PATH).replace(SYSTEM_PATH, f"{self.python.parent}:{SYSTEM_PATH}")
        return {"HOME": str(scratch), **said, "PATH": path, "TMPDIR": str(scratch)}


def _started_with(one: Instruction, made: Made) -> bool:
    """Whether an instruction says how a container is started; if so, it is noted."""
    if one.name == "USER":
        made.user = one.text.partition(":")[0]
    elif one.name == "ENTRYPOINT":
        made.entrypoint, made.command = json.loads(one.text), []
    elif one.name == "CMD":
        made.command = json.loads(one.text)
    elif one.name == "HEALTHCHECK":
        made.healthcheck = json.loads(one.text.partition(" CMD ")[2] or "[]")
    else:
        return False
    return True


def _filled(text: str, known: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda name: known.get(name[1], ""), text)


def pips() -> dict[str, str]:
    """Return the configuration of this user's pip as variables: another user cannot read its files."""
    asked = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    return {f"PIP_{name.replace('-', '_').upper()}": value for name, value in found}
