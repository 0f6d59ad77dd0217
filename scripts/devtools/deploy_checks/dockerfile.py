"""What docker/Dockerfile says, instruction by instruction, and what its builder is given."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from devtools import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"


class Instruction(NamedTuple):
    """One instruction, on one line."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name} {self.text}"


class Stage(NamedTuple):
    """A stage: what it begins with, and what is done there."""

    parent: str
    instructions: list[Instruction]

    def texts(self, name: str) -> list[str]:
        """The texts of its instructions of one kind."""
        return [instruction.text for instruction in self.instructions if instruction.name == name]


def instructions(text: str) -> Iterator[Instruction]:
    """What a Dockerfile says, without comments and line breaks."""
    without_comments = re.sub(r"^\s*(#.*)?\n", "", text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", without_comments).splitlines():
        name, _, rest = line.strip().partition(" ")
        yield Instruction(name.upper(), rest.strip())


def stages(text: str) -> dict[str, Stage]:
    """Every stage by its name."""
    by_name: dict[str, Stage] = {}
    for instruction in instructions(text):
        if instruction.name == "FROM":
            parent, _, name = instruction.text.partition(" AS ")
            by_name[name] = Stage(parent, [])
        elif by_name:  # not before the first stage
            by_name[name].instructions.append(instruction)
    return by_name


def allowed(path: str) -> bool:
    """Whether the builder gets this file or folder of the repository."""
    lines = (DOCKERFILE.parent / f"{DOCKERFILE.name}.dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in lines if line.startswith("!")]
    return any(path == name or path.startswith(f"{name}/") for name in let_in)
