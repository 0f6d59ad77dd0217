"""The names of classes, as far as a dataset tells them."""

from collections import Counter

from gradcam_worker.audit.exports.images import ExportedImage


class ClassNames:
    """The names of the classes that were explained."""

    def __init__(self) -> None:
        """None is known yet."""
        self._names: dict[int, str] = {}
        self._wnids: dict[int, str] = {}
        self._count: Counter[str] = Counter()

    def add(self, image: ExportedImage) -> None:
        """Learn from an image; of its true classes at least the ids."""
        for one in image.explanations:
            if not self._names.get(one.class_id):
                self._names[one.class_id], self._wnids[one.class_id] = one.class_name, one.wnid
                self._count[one.class_name] += 1
        for class_id in image.truths:
            self._names.setdefault(class_id, "")

    def of(self, class_id: int) -> str:
        """The name of a class; with its id where another class has the same name, or it is not known."""
        name = self._names.get(class_id)
        if not name:
            return f"class {class_id}"
        return name if self._count[name] == 1 else f"{name} ({class_id})"

    def wnid(self, class_id: int) -> str:
        """The WordNet id of a class, or nothing."""
        return self._wnids.get(class_id, "")

    def ids(self) -> list[int]:
        """The classes that occur, in order."""
        return sorted(self._names)
