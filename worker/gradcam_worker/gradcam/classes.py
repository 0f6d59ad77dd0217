"""A wish (the top n, or a list of ids, wnids and names) -> the classes to explain."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from gradcam_worker.errors import AmbiguousClass, InvalidJob, UnknownClass
from gradcam_worker.text.comma_lists import QUOTED
from gradcam_worker.text.similar_names import nearest

DATA = Path(__file__).parent / "data"


class Label(NamedTuple):
    """One class: its place in the scores, its WordNet id (empty where it has none), its name."""

    id: int
    wnid: str
    name: str

    def __str__(self) -> str:
        """Read like `517 (n03126707, crane)`."""
        return f"{self.id} ({', '.join(filter(None, (self.wnid, self.name)))})"


WNID = re.compile(r"n[0-9]{4,}")  # what looks like one
LEAST_SHOWN = 0.0005  # below it a probability would read as 0.0 %


def percent(probability: float) -> str:
    """0.7708 -> `77.1 %`."""
    return f"{probability * 100:.1f} %" if probability >= LEAST_SHOWN else "<0.1 %"


def caption(class_id: int, name: str, probability: float) -> str:
    """`718 pier 77.1 %`."""
    return f"{class_id} {name.replace('_', ' ')} {percent(probability)}"


def fold(name: str) -> str:
    """Spelling that does not matter: case, and a space or hyphen for an underscore."""
    return name.strip().casefold().replace(" ", "_").replace("-", "_")


@dataclass(frozen=True)
class ClassIndex:
    """The labels of a network, in the order of its scores."""

    labels: tuple[Label, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "ClassIndex":
        """Somebody's own names, in the order of the scores."""
        return cls(tuple(Label(index, "", name) for index, name in enumerate(names)))

    @classmethod
    def numbered(cls, count: int) -> "ClassIndex":
        """Classes of which nothing is known but how many there are."""
        return cls.of([f"class_{index}" for index in range(count)])

    def __len__(self) -> int:
        """How many classes."""
        return len(self.labels)

    def __getitem__(self, class_id: int) -> Label:
        """The label of one class."""
        return self.labels[class_id]

    @cached_property
    def _by_spelling(self) -> dict[str, list[Label]]:
        """Exact and folded wnids and names -> every label that answers to them."""
        table: dict[str, list[Label]] = {}
        for label in self.labels:
            for spelling in {label.wnid, label.name, fold(label.wnid), fold(label.name)} - {""}:
                table.setdefault(spelling, []).append(label)
        return table

    @cached_property
    def _by_name(self) -> dict[str, list[Label]]:
        table: dict[str, list[Label]] = {}
        for label in self.labels:
            table.setdefault(label.name, []).append(label)
        return table

    def _spellings(self, wish: str) -> list[str]:
        """Those that a misspelt wish may have meant: of names, or of wnids where it looks like one."""
        like_wnid = bool(WNID.fullmatch(fold(wish)))
        return [fold(label.wnid if like_wnid else label.name) for label in self.labels]

    def find(self, wish: int | str) -> Label:
        """One id, wnid or name -> its label.

        A name is first taken as it is spelled, so that every unique name that a prediction shows can
        be asked for; then without regard to case, spaces and hyphens.

        Raises UnknownClass with the nearest names, AmbiguousClass with every class of that name.
        """
        spelled = isinstance(wish, str) and wish in self._by_name
        if not spelled and (not isinstance(wish, str) or wish.strip().isdecimal()):
            if isinstance(wish, bool | float) or not 0 <= int(wish) < len(self):
                message = f"There is no class {wish}: ids run from 0 to {len(self) - 1}."
                raise UnknownClass(message)
            return self[int(wish)]
        wish = str(wish)
        found = self._by_name.get(wish) or self._by_spelling.get(fold(wish), [])
        if not found:
            near = nearest(fold(wish), self._spellings(wish), 6)
            hint = list(dict.fromkeys(str(self._by_spelling[spelling][0]) for spelling in near))[:3]
            message = f"There is no class {wish!r}." + (f" Near: {'; '.join(hint)}." if hint else "")
            if any("," in self._by_spelling[spelling][0].name for spelling in near[:3]):
                message += f" On a command line {QUOTED}."
            raise UnknownClass(message)
        if len(found) > 1:
            choices = " or ".join(str(label) for label in found)
            message = f"{wish!r} is the name of {len(found)} classes: ask for {choices} by id or wnid."
            raise AmbiguousClass(message)
        return found[0]

    def wanted(
        self, *, top_n: int | None = None, classes: Sequence[int | str] | None = None
    ) -> tuple[int, ...]:
        """A wish -> what `Network.compute` understands: ids, or -1, -2, ... for the ranks 1, 2, ...

        A class that is named twice is explained once.
        """
        if (top_n is None) == (classes is None):
            message = "Ask for exactly one of top_n and classes."
            raise InvalidJob(message)
        if classes is not None:
            if isinstance(classes, str | bytes):
                message = (
                    f"classes is a list, as in [{classes!r}]: a single text would be read letter by letter."
                )
                raise InvalidJob(message)
            if not classes:
                message = "The list of classes is empty: name at least one, or ask for top_n."
                raise InvalidJob(message)
            return tuple(dict.fromkeys(self.find(wish).id for wish in classes))
        if top_n is None or not 1 <= top_n <= len(self):
            message = f"top_n is {top_n}: it must be from 1 to {len(self)}, the number of classes."
            raise InvalidJob(message)
        return tuple(-rank for rank in range(1, top_n + 1))


@lru_cache(maxsize=1)
def imagenet() -> ClassIndex:
    """The 1000 classes of ILSVRC 2012, in the order that Keras uses."""
    rows = json.loads((DATA / "imagenet_class_index.json").read_text(encoding="utf-8"))
    return ClassIndex(tuple(Label(int(key), wnid, name) for key, (wnid, name) in rows.items()))
