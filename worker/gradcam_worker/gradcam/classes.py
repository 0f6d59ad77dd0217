"""The classes of a network, and which of them are to be explained: the top n, or a list."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from gradcam_worker.errors import AmbiguousClass, InvalidJob, UnknownClass
from gradcam_worker.text.comma_lists import QUOTED
from gradcam_worker.text.similar_names import nearest

DATA = Path(__file__).parent / "data"


class Label(NamedTuple):
    """A class: its index in the scores, its WordNet id (may be empty), its name."""

    id: int
    wnid: str
    name: str

    def __str__(self) -> str:
        """For example `517 (n03126707, crane)`."""
        return f"{self.id} ({', '.join(filter(None, (self.wnid, self.name)))})"


WNID = re.compile(r"n[0-9]{4,}")  # WordNet ids
MAX_LISTED_AGAINST = 3  # names in a caption
MIN_SHOWN_PROBABILITY = 0.0005  # a smaller one would be rounded to 0.0 %


def percent(probability: float) -> str:
    """Format a probability: 0.7708 becomes `77.1 %`."""
    return f"{probability * 100:.1f} %" if probability >= MIN_SHOWN_PROBABILITY else "<0.1 %"


def caption(class_id: int, name: str, probability: float) -> str:
    """Format a prediction, as in `718 pier 77.1 %`."""
    return f"{class_id} {name.replace('_', ' ')} {percent(probability)}"


class Named(Protocol):
    """A class with its id and name."""

    @property
    def id(self) -> int:
        """Index of the class in the scores."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...


def versus(against: Sequence[Named]) -> str:
    """Format the classes that another one is explained against, as in `not 536 dock`; none: an empty text."""
    names = [f"{label.id} {label.name.replace('_', ' ')}" for label in against[:MAX_LISTED_AGAINST]]
    others = len(against) - len(names)
    return f"not {' or '.join([*names, *[f'{others} others'] * bool(others)])}" if names else ""


def fold(name: str) -> str:
    """Normalise a name: lower case, and underscores for spaces and hyphens."""
    return name.strip().casefold().replace(" ", "_").replace("-", "_")


@dataclass(frozen=True)
class ClassIndex:
    """The labels of a network, in the order of its scores."""

    labels: tuple[Label, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "ClassIndex":
        """Make an index of custom names, in the order of the scores."""
        return cls(tuple(Label(index, "", name) for index, name in enumerate(names)))

    @classmethod
    def numbered(cls, count: int) -> "ClassIndex":
        """Make an index of classes without names, by their number."""
        return cls.of([f"class_{index}" for index in range(count)])

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.labels)

    def __getitem__(self, class_id: int) -> Label:
        """The label of a class."""
        return self.labels[class_id]

    @cached_property
    def _by_spelling(self) -> dict[str, list[Label]]:
        """Exact and folded wnids and names, with all labels that match them."""
        labels_by_spelling: dict[str, list[Label]] = {}
        for label in self.labels:
            for spelling in {label.wnid, label.name, fold(label.wnid), fold(label.name)} - {""}:
                labels_by_spelling.setdefault(spelling, []).append(label)
        return labels_by_spelling

    @cached_property
    def _by_name(self) -> dict[str, list[Label]]:
        labels_by_name: dict[str, list[Label]] = {}
        for label in self.labels:
            labels_by_name.setdefault(label.name, []).append(label)
        return labels_by_name

    def _spellings(self, name_or_id: str) -> list[str]:
        """The spellings that a misspelt name may mean: all names, or all wnids if it looks like one."""
        is_wnid = bool(WNID.fullmatch(fold(name_or_id)))
        return [fold(label.wnid if is_wnid else label.name) for label in self.labels]

    def _is_id(self, name_or_id: int | str) -> bool:
        """Whether it is read as the id of a class, since no class has this very name."""
        is_exact = isinstance(name_or_id, str) and name_or_id in self._by_name
        return not is_exact and (not isinstance(name_or_id, str) or name_or_id.strip().isdecimal())

    def matches(self, name_or_id: int | str) -> Sequence[Label]:
        """All classes that an id, a wnid or a name may mean; `find` costs more where there is none.

        Args:
            name_or_id: An id, a wnid or a name.
        """
        if self._is_id(name_or_id):
            is_known = not isinstance(name_or_id, bool | float) and 0 <= int(name_or_id) < len(self)
            return [self[int(name_or_id)]] if is_known else []
        name = str(name_or_id)
        return self._by_name.get(name) or self._by_spelling.get(fold(name), [])

    def find(self, name_or_id: int | str) -> Label:
        """Find a class.

        A name is compared exactly first, so that every unique name in a prediction can be used; then without
        regard to case, spaces and hyphens.

        Args:
            name_or_id: An id, a wnid or a name.

        Returns:
            Its label.

        Raises:
            UnknownClass: There is no such class; the message suggests similar names.
            AmbiguousClass: Several classes have this name; the message lists them.
        """
        matches = self.matches(name_or_id)
        if not matches and self._is_id(name_or_id):
            message = f"There is no class {name_or_id}: ids run from 0 to {len(self) - 1}."
            raise UnknownClass(message)
        name_or_id = str(name_or_id)
        if not matches:
            similar = nearest(fold(name_or_id), self._spellings(name_or_id), 6)
            suggestions = list(dict.fromkeys(str(self._by_spelling[spelling][0]) for spelling in similar))[:3]
            message = f"There is no class {name_or_id!r}." + (
                f" Near: {'; '.join(suggestions)}." if suggestions else ""
            )
            if any("," in self._by_spelling[spelling][0].name for spelling in similar[:3]):
                message += f" On a command line {QUOTED}."
            raise UnknownClass(message)
        if len(matches) > 1:
            choices = " or ".join(str(label) for label in matches)
            message = (
                f"{name_or_id!r} is the name of {len(matches)} classes: ask for {choices} by id or wnid."
            )
            raise AmbiguousClass(message)
        return matches[0]

    def select_against(
        self, against: Sequence[int | str] | None, selection: Sequence[int]
    ) -> tuple[int, ...]:
        """Select the classes that others are explained against: why it is A and not B.

        Args:
            against: Ids, wnids or names; repeated classes count once. None: there are none.
            selection: The classes to explain, from `select`. A class that is `against` has no rank.

        Returns:
            Their ids.

        Raises:
            InvalidJob: A class would be explained against itself, or fewer than `top_n` classes are left.
            UnknownClass: There is no such class.
            AmbiguousClass: Several classes have this name.
        """
        if against is None:
            return ()
        _refuse_single_class("against", against)
        ids = tuple(dict.fromkeys(self.find(name_or_id).id for name_or_id in against))
        if both := {*ids} & {*selection}:
            message = f"Class {self[min(both)]} would be explained against itself: name it in one list only."
            raise InvalidJob(message)
        if ids and -min(selection) > len(self) - len(ids):
            message = (
                f"top_n is {-min(selection)}: it must be from 1 to {len(self) - len(ids)}, the number of "
                "classes without those against."
            )
            raise InvalidJob(message)
        return ids

    def select(
        self, *, top_n: int | None = None, classes: Sequence[int | str] | None = None
    ) -> tuple[int, ...]:
        """Select the classes to explain, either the top n or a list.

        Args:
            top_n: The number of most probable classes.
            classes: Ids, wnids or names; repeated classes count once.

        Returns:
            What `Network.compute` takes: ids, or -1, -2, ... for the ranks 1, 2, ...

        Raises:
            InvalidJob: Both or neither are given, the list is empty or no list, or top_n is out of range.
            UnknownClass: There is no such class.
            AmbiguousClass: Several classes have this name.
        """
        if (top_n is None) == (classes is None):
            message = "Ask for exactly one of top_n and classes."
            raise InvalidJob(message)
        if classes is not None:
            _refuse_single_class("classes", classes)
            if not classes:
                message = "The list of classes is empty: name at least one, or ask for top_n."
                raise InvalidJob(message)
            return tuple(dict.fromkeys(self.find(name_or_id).id for name_or_id in classes))
        if top_n is None or not 1 <= top_n <= len(self):
            message = f"top_n is {top_n}: it must be from 1 to {len(self)}, the number of classes."
            raise InvalidJob(message)
        return tuple(-rank for rank in range(1, top_n + 1))


def _refuse_single_class(name: str, classes: object) -> None:
    """Raise InvalidJob for a text, which is a sequence, too."""
    if isinstance(classes, str | bytes):
        message = f"{name} is a list, as in [{classes!r}]: a single text would be read letter by letter."
        raise InvalidJob(message)


@lru_cache(maxsize=1)
def imagenet() -> ClassIndex:
    """The 1000 classes of ILSVRC 2012, in the order that Keras uses."""
    rows = json.loads((DATA / "imagenet_class_index.json").read_text(encoding="utf-8"))
    return ClassIndex(tuple(Label(int(key), wnid, name) for key, (wnid, name) in rows.items()))
