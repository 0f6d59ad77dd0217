"""What `scripts/setup --packages-only` would install, copied from the environment of this process.

Both hold what constraints.txt says. Installing TensorFlow and what it needs again takes a minute of CPU time.
"""

import re
import runpy
import shlex
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import cache_from_source
from pathlib import Path

from packaging.requirements import Requirement

from devtools import ROOT

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
    for package in {one.name: one for one in _installed(["pip", *wanted])}.values():
        for file in package.files or ():
            if ".." not in file.parts:  # else it is a program
                source = Path(str(file.locate()))
                _copy(source, target / file)
                if file.suffix == ".py":
                    _copy(Path(cache_from_source(source)), Path(cache_from_source(target / file)))
    return shlex.join(wanted)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, with its times; a module may not have been compiled yet."""
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


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
