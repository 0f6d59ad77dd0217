"""A Dockerfile carried out without Docker.

Each stage becomes a folder. Its instructions are run there one after the other by an ordinary user: the
image's own uid where this is root, else the user of this process.

What is understood: FROM (an image, or a stage), ARG, ENV, WORKDIR, COPY [--from=STAGE] without patterns, RUN
in its shell form, also with --mount=type=bind,from=STAGE, USER, and ENTRYPOINT, CMD and HEALTHCHECK in their
exec form; EXPOSE, LABEL and STOPSIGNAL do not say how it is made. Anything else is refused.

What is not as in a container:
* the system below it is this machine's; so is its Python: ours where the user may run it, else `python3`;
* the paths of MOVED lie below the stage's folder, wherever an instruction names them;
* `RUN useradd` makes its home and no account: its uid is the only user there is, of group 0;
* pip asks the index, and keeps the cache, of this user, unless packages are copied: see `Builder`.
"""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from devtools import ROOT
from devtools.deploy_checks import installed_packages
from devtools.deploy_checks.dockerfile import DOCKERFILE, Instruction, Stage, allowed, stages

MOVED = ("opt", "src", "srv", "dist", "cache")  # first parts of the paths that belong to an image
SILENT = {"EXPOSE", "LABEL", "STOPSIGNAL"}
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
_PATHS = re.compile(rf"(?<![\w./-])/(?={'|'.join(MOVED)}\b)")
_MOUNT = re.compile(r"--mount=type=bind,from=([\w-]+),source=(\S+?),target=(\S+)\s+")


class Failed(Exception):
    """An instruction is not known here, or did not do what it should."""


@dataclass
class Made:
    """A stage that has been carried out: its folder, and what a container of it would be started with."""

    folder: Path
    environment: dict[str, str]
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    started_with: dict[str, str] = field(default_factory=dict)  # what USER, ENTRYPOINT, CMD, HEALTHCHECK say

    def words(self, name: str) -> list[str]:
        """The command line of ENTRYPOINT, CMD or HEALTHCHECK: a JSON list, behind any options."""
        _, bracket, rest = self.started_with.get(name, "").partition("[")
        return list(json.loads(bracket + rest or "[]"))

    def moved(self, text: str) -> str:
        """The same with every path of the image's where it lies here."""
        return _PATHS.sub(lambda _: f"{self.folder}/", text)

    def place(self, path: str) -> Path:
        """Where a path of the image's lies here."""
        return Path(self.moved(path if path.startswith("/") else f"{self.workdir}/{path}"))


@dataclass
class Builder:
    """Carries out a Dockerfile below `folder`, as `uid` where this is root.

    Where it `copies_packages`, those of this process's environment are taken; pip installs what is missing.
    """

    folder: Path
    uid: int
    copies_packages: bool = False
    stages: dict[str, Stage] = field(default_factory=lambda: stages(DOCKERFILE.read_text()))
    made: dict[str, Made] = field(default_factory=dict)

    @property
    def as_user(self) -> dict[str, Any]:
        """The arguments of subprocess that say as whom programs are started."""
        return {"user": self.uid, "group": 0, "extra_groups": []} if os.getuid() == 0 else {}

    def make(self, name: str) -> Made:
        """Carry out a stage, and before it those that it stands on. Raises Failed."""
        if name not in self.made:
            stage, folder = self.stages[name], self.folder / name
            if stage.parent in self.stages:
                parent = self.make(stage.parent)
                self._copy(parent.folder, folder)
                made = replace(copy.deepcopy(parent), folder=folder)
            else:
                made = Made(self.own(folder), {"PATH": SYSTEM_PATH})
            for instruction in stage.instructions:
                self._carry_out(instruction, made)
            self.own(folder)
            self.made[name] = made
        return self.made[name]

    def own(self, folder: Path) -> Path:
        """Make a folder where it is missing, and give it to the user with all that it holds."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.as_user:
            subprocess.run(["/bin/chown", "--recursive", f"{self.uid}:0", folder], check=True)
        return folder

    def _carry_out(self, instruction: Instruction, made: Made) -> None:
        match instruction:
            case "ARG", text:
                name, _, value = text.partition("=")
                made.arguments[name] = value or made.arguments.get(name, "")
            case "ENV", text:
                values = Template(text).safe_substitute(made.arguments | made.environment)
                made.environment |= dict(pair.split("=", 1) for pair in shlex.split(values))
            case "WORKDIR", text:
                made.workdir = text
                made.place(text).mkdir(parents=True, exist_ok=True)
            case "COPY", _:
                self._copy_in(instruction, made)
            case "RUN", _:
                self._run(instruction, made)
            case "USER" | "ENTRYPOINT" | "CMD" | "HEALTHCHECK" as name, text:
                made.started_with[name] = text
                if name == "ENTRYPOINT":
                    made.started_with.pop("CMD", None)  # the parent's
            case name, _ if name not in SILENT:
                message = f"The builder does not know this instruction of docker/Dockerfile: {instruction}"
                raise Failed(message)

    def _copy_in(self, instruction: Instruction, made: Made) -> None:
        words = shlex.split(instruction.text)
        options = [word for word in words if word.startswith("--")]
        *sources, target = words[len(options) :]
        if len(options) > 1 or any(not option.startswith("--from=") for option in options):
            message = f"This builder knows no option of COPY but --from: {instruction}"
            raise Failed(message)
        into_folder = len(sources) > 1 or target.endswith("/")
        for source in sources:
            if options:
                self._copy(self.make(options[0].removeprefix("--from=")).place(source), made.place(target))
                continue
            if not allowed(source):
                message = f"docker/Dockerfile.dockerignore keeps {source} from the builder: {instruction}"
                raise Failed(message)
            here = ROOT / source
            name = here.name if here.is_file() and into_folder else ""
            self._copy(here, made.place(target) / name)

    def _copy(self, source: Path, target: Path) -> None:
        """Copy a file, or what a folder holds; what was made here is linked."""
        target.parent.mkdir(parents=True, exist_ok=True)
        link = ["--link"] if source.is_relative_to(self.folder) else []
        options = ["--archive", "--no-target-directory", *link]
        subprocess.run(["/bin/cp", *options, str(source), str(target)], check=True)

    def _run(self, instruction: Instruction, made: Made) -> None:
        text = instruction.text
        if text.startswith("useradd "):
            account, _, text = text.partition(" && ")
            for home in re.findall(r"--create-home --home-dir (\S+)", account):
                made.place(home).mkdir(parents=True)
            if not text:
                return
        mounted = [made.place(target) for _, _, target in _MOUNT.findall(text)]
        for (stage, source, _), folder in zip(_MOUNT.findall(text), mounted, strict=True):
            self._copy(self.make(stage).place(source), folder)
        script = made.moved(_MOUNT.sub("", text))
        if script.startswith(("--", "[")):
            message = f"This builder does not know this way of RUN: {instruction}"
            raise Failed(message)
        self.own(made.folder)
        packages = installed_packages.COMMAND.match(script) if self.copies_packages else None
        try:
            if packages:
                venv, extras = packages[1], packages[2].split()
                self._shell(f"python3 -m venv --without-pip {venv}", made)
                missing = installed_packages.copy(extras, Path(venv))
                self.own(made.folder)
                self._shell(f"{venv}/bin/python -m pip install -qq -c constraints.txt {missing}", made)
                script = f"true {script[packages.end() :]}"
            self._shell(script, made)
        except Failed as error:
            message = f"{instruction}\n{error}"
            raise Failed(message) from None
        for folder in mounted:
            shutil.rmtree(folder)

    def _shell(self, script: str, made: Made) -> None:
        """Run a script as the user. Raises Failed."""
        environment = {**pip_configuration(), **self.environment(made), **made.arguments}
        environment.pop("PIP_NO_CACHE_DIR", None)
        shell, where = ["/bin/sh", "-c", script], made.place("")
        done = subprocess.run(
            shell, cwd=where, env=environment, check=False, capture_output=True, text=True, **self.as_user
        )
        if done.returncode:
            output = f"{done.stdout}{done.stderr}"[-2000:]
            message = f"ended with {done.returncode}: {output}"
            raise Failed(message)

    def environment(self, made: Made) -> dict[str, str]:
        """What a container of this stage has in its environment, and nothing of this machine's."""
        scratch = str(self.own(self.folder / "tmp"))
        variables = {name: made.moved(value) for name, value in made.environment.items()}
        ours = Path(sys.executable).resolve().parent
        path = variables["PATH"].replace(SYSTEM_PATH, f"{ours}:{SYSTEM_PATH}")
        return {"HOME": scratch, **variables, "PATH": path, "TMPDIR": scratch}


@cache
def pip_configuration() -> dict[str, str]:
    """The configuration of this user's pip as variables: another user cannot read its files."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    return {f"PIP_{name.replace('-', '_').upper()}": value for name, value in values}
