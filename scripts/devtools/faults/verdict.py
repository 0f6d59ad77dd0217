"""What an attack found, in the same words for all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROMISES = ("lost", "without_final_state", "doubled", "wrong_bytes", "early_manifests", "untyped")


@dataclass
class Verdict:
    """Counts of what was done and of what must not have happened, and how long the worst of it lasted."""

    jobs: int = 0
    faults: int = 0  # injected
    lost: int = 0  # accepted, and the ledger does not know them
    without_final_state: int = 0
    doubled: int = 0  # more than one final state, or more than one result
    wrong_bytes: int = 0  # jobs whose objects differ from a quiet run's
    early_manifests: int = 0  # seen before what they name
    untyped: int = 0  # ended with an error that has no code, or with `internal`
    recovery_s_max: float = 0.0  # from a fault until what it hit runs again
    figures: dict[str, Any] = field(default_factory=dict)  # of this attack alone
    broken: list[str] = field(default_factory=list)  # what else was promised and not kept, a sentence each

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> "Verdict":
        """What `to_dict` wrote, or what another attack counted: what has no place here is a figure."""
        own = {name: value for name, value in found.items() if name in cls.__dataclass_fields__}
        others = {name: value for name, value in found.items() if name not in own}
        figures = {**own.pop("figures", {}), **others}
        return cls(**own, figures=figures)

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return not self.broken and not any(getattr(self, name) for name in PROMISES)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "recovery_s_max": round(self.recovery_s_max, 2)}
