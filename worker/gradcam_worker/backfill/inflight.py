"""Shards in flight: submitted, and not known to have ended.

The id of a shard follows from its content, and the ledger takes an id once: whoever submits a shard that is
already in flight, follows that one. A shard that has failed is submitted again under an id derived from its
own.
"""

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from gradcam_worker.errors import LedgerUnavailable, UnknownJob
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.schemas.earlier import row_state
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument

log = logging.getLogger("gradcam")

# What is wrong with the plan, the output or the workers, and so with every shard.
FATAL_CODES = {
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
    """A shard, and how often it has been tried."""

    shard: Shard
    tries: int = 1
    failed_ids: tuple[str, ...] = ()  # under which it has failed

    def retry(self) -> "InFlightShard":
        """The same shard under its next id."""
        next_shard = with_derived_id(self.shard, "again")
        return InFlightShard(next_shard, self.tries + 1, (*self.failed_ids, self.shard.id))


def with_derived_id(shard: Shard, name: str) -> Shard:
    """The same shard under the id that follows from its own and a name."""
    return shard.model_copy(update={"id": str(uuid.uuid5(uuid.UUID(shard.id), name))})


class InFlight:
    """The shards of one backfill that are in flight. Every method raises LedgerUnavailable."""

    def __init__(
        self,
        ledger: Ledger,
        is_done: Callable[[str], bool],
        announce: Callable[[], object],
        warn: Callable[[str], object],
    ) -> None:
        """No shard yet.

        Args:
            ledger: Where they are submitted.
            is_done: Whether the output holds the shard with a key.
            announce: Called when `ids` has grown, before the new one is submitted.
            warn: Called once for each reason for which shards wait for their next attempt.
        """
        self._ledger, self._is_done, self._announce, self._warn = ledger, is_done, announce, warn
        self.ids: tuple[str, ...] = ()  # of all that may be in flight
        self.shards: dict[str, InFlightShard] = {}  # by id
        self.rows_explained = 0  # in them, as they report
        self._warned: set[str] = set()  # error codes

    def __len__(self) -> int:
        return len(self.shards)

    def submit(self, one: InFlightShard) -> tuple[InFlightShard, StatusDocument]:
        """Submit a shard; return it with the id it got, and its document: final where it was done already."""
        while True:
            shard = one.shard
            self.ids = (*self.ids, shard.id)
            self._announce()
            document = self._ledger.submit(shard)
            if not document.final:
                self.shards[shard.id] = one
                return one, document
            self._remove_id(shard.id)
            if document.status == "succeeded" and not shard.keep and self._is_done(shard.key):
                self._drop_dead_letters(one)
                return one, document
            one = replace(one.retry(), tries=one.tries)  # it ended in an earlier run

    def poll(self) -> list[tuple[InFlightShard, StatusDocument | None]]:
        """Remove and return those that have ended; without a document where the ledger has forgotten them."""
        documents = self._ledger.read_many(list(self.shards)) if self.shards else {}
        ended: list[tuple[InFlightShard, StatusDocument | None]] = []
        self.rows_explained = 0
        for job_id, one in list(self.shards.items()):
            document = documents.get(job_id)
            if document and not document.final:
                self.rows_explained += min(row_state(document).done, len(one.shard.rows))
                self._warn_of_retry(document)
                continue
            del self.shards[job_id]
            self._remove_id(job_id)
            if document and document.status == "succeeded":
                self._drop_dead_letters(one)
            ended.append((one, document))
        return ended

    def _remove_id(self, job_id: str) -> None:
        self.ids = tuple(one for one in self.ids if one != job_id)

    def _warn_of_retry(self, document: StatusDocument) -> None:
        error = document.error
        if document.status == "retrying" and error and error.code not in self._warned:
            self._warned.add(error.code)
            self._warn(f"A shard waits for its next attempt, because of {error.code}: {error.detail}")

    def _drop_dead_letters(self, one: InFlightShard) -> None:
        """A shard that has succeeded is no dead letter, whatever became of it before."""
        try:
            for job_id in one.failed_ids:
                self._ledger.drop_dead_letter(job_id)
        except LedgerUnavailable as error:  # its permissions may be of an earlier version
            log.debug("shard %s stays among the dead letters: %s", one.shard.key, error)

    def cancel(self) -> None:
        """Cancel them all; `ids` are those that a worker still runs."""
        self.ids = tuple(one.id for one in cancel(self._ledger, self.ids) if not one.final)
        self.shards.clear()

    def cancel_others(self, ids: Iterable[str]) -> bool:
        """Cancel shards of an earlier run; whether all of them have ended."""
        return all(one.final for one in cancel(self._ledger, ids))


def cancel(ledger: Ledger, ids: Iterable[str]) -> list[StatusDocument]:
    """Cancel shards; return what those are now that had not ended. Raises LedgerUnavailable."""
    canceled = []
    for one in ledger.read_many(sorted(ids)).values():
        with contextlib.suppress(UnknownJob):  # it was forgotten just now
            if not one.final:
                canceled.append(ledger.cancel(one.id))
    return canceled
