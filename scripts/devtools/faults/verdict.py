"""What an attack found, counted in the same way for all of them."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

PROMISES = ("lost", "without_final_state", "doubled", "wrong_bytes", "early_manifests", "untyped")


@dataclass
class Verdict:
    """Counts of what was done and of what must not have happened, and the longest recovery."""

    jobs: int = 0
    faults: int = 0  # injected
    lost: int = 0  # accepted, and the ledger does not know them
    without_final_state: int = 0
    doubled: int = 0  # more than one final state, or more than one result
    wrong_bytes: int = 0  # jobs whose objects differ from those of a run that nothing disturbs
    early_manifests: int = 0  # seen before the objects that they name
    untyped: int = 0  # ended with an error that has no code, or with `internal`
    recovery_s_max: float = 0.0  # from a fault until what it hit runs again
    figures: dict[str, Any] = field(default_factory=dict)  # of this attack alone
    broken: list[str] = field(default_factory=list)  # other promises that were broken, a sentence each

    def require(self, condition: object, sentence: str) -> None:
        """Note a broken promise, in a sentence, unless the condition holds."""
        if not condition:
            self.broken.append(sentence)

    def forbid(self, cases: Collection[object], sentence: str) -> None:
        """Note a broken promise if there are any such cases: how many, and one of them."""
        self.require(not cases, f"{len(cases)} {sentence}: {next(iter(cases), None)}")

    def add(self, name: str, part: "Verdict") -> None:
        """Count what a part of the attack has found, whose figures and sentences have this name."""
        for key in ("jobs", "faults", *PROMISES):
            setattr(self, key, getattr(self, key) + getattr(part, key))
        self.recovery_s_max = max(self.recovery_s_max, part.recovery_s_max)
        self.figures[name] = part.figures
        self.broken += [f"{name}: {sentence}" for sentence in part.broken]

    @property
    def kept(self) -> bool:
        """Whether every promise was kept."""
        return not self.broken and not any(getattr(self, name) for name in PROMISES)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**vars(self), "recovery_s_max": round(self.recovery_s_max, 2)}
