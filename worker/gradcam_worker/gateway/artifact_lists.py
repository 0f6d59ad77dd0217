"""A cache of the lists of jobs' artifacts: a job that is read again costs no request to the storage."""

from collections import OrderedDict

KEPT = 1000  # lists, of a few hundred bytes each


class ArtifactLists:
    """The lists of artifacts that were read last, as JSON: they never change."""

    def __init__(self) -> None:
        self._lists: OrderedDict[str, bytes] = OrderedDict()

    def find(self, key: str) -> bytes | None:
        """The list of a manifest, if it was read."""
        if key in self._lists:
            self._lists.move_to_end(key)
        return self._lists.get(key)

    def keep(self, key: str, artifacts: bytes) -> None:
        """Keep the list of a manifest; the one that was not used for the longest time makes room."""
        self._lists[key] = artifacts
        while len(self._lists) > KEPT:
            self._lists.popitem(last=False)
