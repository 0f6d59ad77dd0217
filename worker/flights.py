"""Shards in flight: submitted, and not known to have ended.

Ids follow from what a shard is to hold, and the ledger takes an id once: so whoever submits a shard that is
in flight already follows that one. One that has ended badly goes on under the id that follows from its own.
"""

import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from worker.contract import StatusDocument
from worker.errors import UnknownJob
from worker.ledger import Ledger
from worker.shard import Shard

STAGE = re.compile(r"explain (\d+) of \d+")
# What is wrong with the wish, the output or the workers, and so with every shard.
HOPELESS = {
    "unknown_network",
    "unknown_class",
    "unknown_layer",
    "output_not_allowed",
    "weights_checksum_mismatch",
    "network_incompatible",
    "invalid_job",
}


@dataclass(frozen=True)
class Flight:
    """A shard on its way."""

    shard: Shard
    tries: int = 1

    def again(self) -> "Flight":
        """The same shard, once more."""
        return Flight(renamed(self.shard, "again"), self.tries + 1)


def renamed(shard: Shard, name: str) -> Shard:
    """The same shard under the id that follows from its own by a name."""
    return shard.model_copy(update={"id": str(uuid.uuid5(uuid.UUID(shard.id), name))})


class Flights:
    """Those of one backfill. Raises LedgerUnavailable wherever the ledger cannot be reached."""

    def __init__(
        self, ledger: Ledger, done: Callable[[str], bool], announce: Callable[[tuple[str, ...]], object]
    ) -> None:
        """`done` says whether the shard with a key lies in the output.

        `announce` is told the ids of all shards that may be in flight, before they are.
        """
        self._ledger, self._done, self._announce = ledger, done, announce
        self.held: dict[str, Flight] = {}
        self.partly = 0  # rows of them that are explained
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self.held)

    def submit(self, flight: Flight) -> tuple[Flight, StatusDocument]:
        """Submit a shard; return it as it was, and its document: final where it was done already."""
        while True:
            shard = flight.shard
            self._ids.add(shard.id)
            self._announce(tuple(sorted(self._ids)))
            document = self._ledger.submit(shard)
            if not document.final:
                self.held[shard.id] = flight
                return flight, document
            self._ids.discard(shard.id)
            if document.status == "succeeded" and not shard.keep and self._done(shard.key):
                return flight, document
            flight = replace(flight.again(), tries=flight.tries)  # that was in an earlier run

    def look(self) -> list[tuple[Flight, StatusDocument | None]]:
        """Those that have ended since; without a document where the ledger has forgotten them."""
        documents = self._ledger.read_many(list(self.held)) if self.held else {}
        ended: list[tuple[Flight, StatusDocument | None]] = []
        self.partly = 0
        for job_id, flight in list(self.held.items()):
            document = documents.get(job_id)
            if document and not document.final:
                said = STAGE.fullmatch(document.stage or "")
                self.partly += min(int(said[1]), len(flight.shard.rows)) if said else 0
                continue
            del self.held[job_id]
            self._ids.discard(job_id)
            ended.append((flight, document))
        return ended

    def cancel(self) -> None:
        """Stop them all."""
        cancel(self._ledger, self._ids)
        self._ids.clear()
        self.held.clear()

    def settled(self, ids: Iterable[str]) -> bool:
        """Whether nothing of these is in flight any more; they are cancelled."""
        cancel(self._ledger, ids)
        return all(one.final for one in self._ledger.read_many(sorted(ids)).values())


def cancel(ledger: Ledger, ids: Iterable[str]) -> int:
    """Cancel shards; return how many had not ended. Raises LedgerUnavailable."""
    stopped = 0
    for one in sorted(ids):
        try:
            stopped += ledger.cancel(one).cancel_requested_at is not None
        except UnknownJob:
            continue
    return stopped
