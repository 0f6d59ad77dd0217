"""Shards in flight: submitted, and not known to have ended.

Ids follow from what a shard is to hold, and the ledger takes an id once: so whoever submits a shard that is
in flight already follows that one. One that has ended badly goes on under the id that follows from its own.
"""

import contextlib
import logging
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from gradcam_worker.errors import LedgerUnavailable, UnknownJob
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument

log = logging.getLogger("gradcam")

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
class InFlightShard:
    """A shard on its way."""

    shard: Shard
    tries: int = 1
    before: tuple[str, ...] = ()  # ids under which it has ended, and not well

    def again(self) -> "InFlightShard":
        """The same shard, once more."""
        return InFlightShard(renamed(self.shard, "again"), self.tries + 1, (*self.before, self.shard.id))


def renamed(shard: Shard, name: str) -> Shard:
    """The same shard under the id that follows from its own by a name."""
    return shard.model_copy(update={"id": str(uuid.uuid5(uuid.UUID(shard.id), name))})


class InFlight:
    """Those of one backfill. Raises LedgerUnavailable wherever the ledger cannot be reached."""

    def __init__(
        self,
        ledger: Ledger,
        done: Callable[[str], bool],
        announce: Callable[[], object],
        say: Callable[[str], object],
    ) -> None:
        """`done` says whether the shard with a key lies in the output.

        `announce` is called when `ids` have become more, before they are in flight. `say` is told, once, why
        some wait for their next attempt.
        """
        self._ledger, self._done, self._announce, self._say = ledger, done, announce, say
        self.ids: tuple[str, ...] = ()  # of all that may be in flight
        self.held: dict[str, InFlightShard] = {}
        self.partly = 0  # rows of them that are explained
        self._said: set[str] = set()  # codes

    def __len__(self) -> int:
        return len(self.held)

    def submit(self, flight: InFlightShard) -> tuple[InFlightShard, StatusDocument]:
        """Submit a shard; return it as it was, and its document: final where it was done already."""
        while True:
            shard = flight.shard
            self.ids = (*self.ids, shard.id)
            self._announce()
            document = self._ledger.submit(shard)
            if not document.final:
                self.held[shard.id] = flight
                return flight, document
            self._leave(shard.id)
            if document.status == "succeeded" and not shard.keep and self._done(shard.key):
                self._bury(flight)
                return flight, document
            flight = replace(flight.again(), tries=flight.tries)  # that was in an earlier run

    def look(self) -> list[tuple[InFlightShard, StatusDocument | None]]:
        """Those that have ended since; without a document where the ledger has forgotten them."""
        documents = self._ledger.read_many(list(self.held)) if self.held else {}
        ended: list[tuple[InFlightShard, StatusDocument | None]] = []
        self.partly = 0
        for job_id, flight in list(self.held.items()):
            document = documents.get(job_id)
            if document and not document.final:
                said = STAGE.fullmatch(document.stage or "")
                self.partly += min(int(said[1]), len(flight.shard.rows)) if said else 0
                self._say_why(document)
                continue
            del self.held[job_id]
            self._leave(job_id)
            if document and document.status == "succeeded":
                self._bury(flight)
            ended.append((flight, document))
        return ended

    def _leave(self, job_id: str) -> None:
        self.ids = tuple(one for one in self.ids if one != job_id)

    def _say_why(self, document: StatusDocument) -> None:
        why = document.error
        if document.status == "retrying" and why and why.code not in self._said:
            self._said.add(why.code)
            self._say(f"A shard waits for its next attempt, because of {why.code}: {why.detail}")

    def _bury(self, flight: InFlightShard) -> None:
        """A shard that has succeeded is no dead letter, whatever became of it before."""
        try:
            for one in flight.before:
                self._ledger.drop_dead_letter(one)
        except LedgerUnavailable as error:  # its permissions may be of an earlier version
            log.debug("shard %s stays among the dead letters: %s", flight.shard.key, error)

    def cancel(self) -> None:
        """Stop them all; `ids` are those that a worker still runs."""
        self.ids = tuple(one.id for one in cancel(self._ledger, self.ids) if not one.final)
        self.held.clear()

    def settled(self, ids: Iterable[str]) -> bool:
        """Whether nothing of these is in flight any more; they are cancelled."""
        return all(one.final for one in cancel(self._ledger, ids))


def cancel(ledger: Ledger, ids: Iterable[str]) -> list[StatusDocument]:
    """Cancel shards; return what those are now that had not ended. Raises LedgerUnavailable."""
    stopped = []
    for one in ledger.read_many(sorted(ids)).values():
        with contextlib.suppress(UnknownJob):  # it was forgotten just now
            if not one.final:
                stopped.append(ledger.cancel(one.id))
    return stopped
