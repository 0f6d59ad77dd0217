"""What docker/Dockerfile says, instruction by instruction, and what its builder is given."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from devtools import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    """One instruction, on one line."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name} {self.text}"


@dataclass(frozen=True)
class Stage:
    """A stage: its name, what it begins with, and what is done there."""

    name: str
    parent: str
    instructions: tuple[Instruction, ...]


def instructions(text: str) -> Iterator[Instruction]:
    """What a Dockerfile says, without comments and line breaks."""
    lines = "\n".join(
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    )
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        name, _, rest = line.strip().partition(" ")
        yield Instruction(name.upper(), rest.strip())


def stages(text: str) -> dict[str, Stage]:
    """Every stage by its name."""
    found: dict[str, Stage] = {}
    name, parent, said = "", "", []
    for one in [*instructions(text), Instruction("FROM", "")]:
        if one.name != "FROM":
            said.append(one)
            continue
        if name:
            found[name] = Stage(name, parent, tuple(said))
        parent, _, name = one.text.partition(" AS ")
        said = []
    return found


def allowed(path: str) -> bool:
    """Whether the builder gets this file or folder of the repository."""
    lines = (DOCKERFILE.parent / f"{DOCKERFILE.name}.dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    return any(path == one or path.startswith(f"{one}/") for one in let_in)
