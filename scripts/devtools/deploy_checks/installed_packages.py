"""What `scripts/setup --packages-only` would install, copied from the environment of this process.

Both hold what constraints.txt says. Installing TensorFlow and what it needs again takes a minute of CPU time.
Large files are linked where any user may read them: to copy three gigabytes takes a quarter of it.
"""

import re
import runpy
import shlex
import stat
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import cache_from_source
from pathlib import Path

from packaging.requirements import Requirement

from devtools import ROOT

LINKED_BYTES = 2**16  # a file, at least
OPEN_FOLDER = stat.S_IROTH | stat.S_IXOTH  # to any user
COMMAND = re.compile(r"python3 scripts/setup --packages-only --venv (\S+) ([\w ]+)")


def copy(extras: Sequence[str], venv: Path) -> str:
    """Copy packages into an environment that has none, without their programs.

    Args:
        extras: As for `scripts/setup`, with names of packages among them.
        venv: The environment.

    Returns:
        What pip has to be asked for, as words of a shell: it finds most of it, and installs the rest.
    """
    (target,) = venv.glob("lib/python*/site-packages")
    wanted = runpy.run_path(str(ROOT / "scripts" / "setup"))["requirements"](extras)
    names: dict[str, list[str]] = {}  # by the folder of packages
    for package in {one.name: one for one in _installed(["pip", *wanted])}.values():
        there = names.setdefault(str(package.locate_file("")), [])
        for file in package.files or ():
            if ".." not in file.parts:  # else it is a program
                there.append(str(file))
                if file.suffix == ".py":
                    there.append(cache_from_source(file))
    for folder, files in names.items():
        _copy(Path(folder), target, files)
    return shlex.join(wanted)


def _copy(source: Path, target: Path, files: Sequence[str]) -> None:
    """Copy files with their times, or link them; a module may not have been compiled yet."""
    there = {file: (source / file).stat() for file in sorted({*files}) if (source / file).exists()}
    is_open = all(folder.stat().st_mode & OPEN_FOLDER == OPEN_FOLDER for folder in (source, *source.parents))
    linked = {
        file
        for file, status in there.items()
        if is_open and status.st_mode & stat.S_IROTH and status.st_size >= LINKED_BYTES
    }
    for file in linked:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (target / file).symlink_to(source / file)
    command = ["xargs", "-0", "cp", "--parents", "--preserve=mode,timestamps", "-t", str(target)]
    names = "\0".join(file for file in there if file not in linked)
    subprocess.run(command, cwd=source, input=names.encode(), check=True)


def _installed(requirements: Sequence[str]) -> Iterator[metadata.Distribution]:
    """What this process's environment has of these and of all that they need."""
    waiting, seen = [(Requirement(one), "") for one in requirements], set[str]()
    while waiting:
        requirement, extra = waiting.pop()
        is_needed = not requirement.marker or requirement.marker.evaluate({"extra": extra})
        found = [*metadata.distributions(name=requirement.name)]
        if str(requirement) in seen or not is_needed or not found:
            continue
        seen.add(str(requirement))
        yield found[0]
        inner = [Requirement(one) for one in found[0].requires or ()]
        waiting += [(one, extra) for one in inner for extra in ("", *requirement.extras)]
