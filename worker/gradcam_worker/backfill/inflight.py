"""Shards in flight: submitted, and not known to have ended.

The id of a shard is derived from its content, and the ledger accepts each id once: submitting a shard that
is in flight already returns the existing one. A failed shard is submitted again, under an id derived from its
own.
"""

import contextlib
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from gradcam_worker.errors import LedgerUnavailable, UnknownJob
from gradcam_worker.ledger.ledger import Ledger, Tenant
from gradcam_worker.schemas.legacy_rows import row_state
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

# The plan, the output or the workers are at fault, so every shard would fail.
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
    """A shard, with its tries so far."""

    shard: Shard
    tries: int = 1
    failed_ids: tuple[str, ...] = ()  # ids of its failed tries

    def retry(self) -> "InFlightShard":
        """Return the same shard for its next try, under a new id."""
        next_shard = with_derived_id(self.shard, "again")
        return InFlightShard(next_shard, self.tries + 1, (*self.failed_ids, self.shard.id))


def with_derived_id(shard: Shard, name: str) -> Shard:
    """Return the same shard under an id that is derived from its own and `name`."""
    return shard.model_copy(update={"id": str(uuid.uuid5(uuid.UUID(shard.id), name))})


class InFlight:
    """The shards of one backfill that are in flight. Every method raises LedgerUnavailable."""

    def __init__(
        self,
        ledger: Ledger,
        is_done: Callable[[str], bool],
        announce: Callable[[], object],
        warn: Callable[[str], object],
        tenant: Tenant | None = None,
    ) -> None:
        """Start without shards.

        Args:
            ledger: Where shards are submitted.
            is_done: Returns whether the output holds the shard with a key.
            announce: Called when `ids` has grown, before the new shard is submitted.
            warn: Called once for each error code after which shards wait for their next attempt.
            tenant: Whose shards they are; None: nobody's.
        """
        self._tenant = tenant
        self._ledger, self._is_done, self._announce, self._warn = ledger, is_done, announce, warn
        self.ids: tuple[str, ...] = ()  # of all shards that may be in flight
        self.shards: dict[str, InFlightShard] = {}  # by id
        self.rows_explained = 0  # so far, in shards in flight
        self._warned: set[str] = set()  # error codes

    def __len__(self) -> int:
        return len(self.shards)

    def submit(self, entry: InFlightShard) -> tuple[InFlightShard, StatusDocument]:
        """Submit a shard.

        Args:
            entry: The shard, with its tries so far.

        Returns:
            The shard under the id that it was submitted with, and its document: final if it is done already.
        """
        while True:
            shard = entry.shard
            self.ids = (*self.ids, shard.id)
            self._announce()
            document = self._ledger.submit(shard, tenant=self._tenant)
            if not document.final:
                self.shards[shard.id] = entry
                return entry, document
            self._remove_id(shard.id)
            if document.status == "succeeded" and not shard.keep and self._is_done(shard.key):
                self._drop_dead_letters(entry)
                return entry, document
            entry = replace(entry.retry(), tries=entry.tries)  # it ended in an earlier run

    def poll(self) -> list[tuple[InFlightShard, StatusDocument | None]]:
        """Remove and return the shards that have ended; document None: the ledger has it no longer."""
        documents = self._ledger.read_many(list(self.shards)) if self.shards else {}
        ended: list[tuple[InFlightShard, StatusDocument | None]] = []
        self.rows_explained = 0
        for job_id, entry in list(self.shards.items()):
            document = documents.get(job_id)
            if document and not document.final:
                self.rows_explained += min(row_state(document).done, len(entry.shard.rows))
                self._warn_of_retry(document)
                continue
            del self.shards[job_id]
            self._remove_id(job_id)
            if document and document.status == "succeeded":
                self._drop_dead_letters(entry)
            ended.append((entry, document))
        return ended

    def _remove_id(self, job_id: str) -> None:
        self.ids = tuple(other for other in self.ids if other != job_id)

    def _warn_of_retry(self, document: StatusDocument) -> None:
        error = document.error
        if document.status == "retrying" and error and error.code not in self._warned:
            self._warned.add(error.code)
            self._warn(f"A shard waits for its next attempt, because of {error.code}: {error.detail}")

    def _drop_dead_letters(self, entry: InFlightShard) -> None:
        """Remove the failed tries of a shard that has succeeded from the dead letters."""
        try:
            for job_id in entry.failed_ids:
                self._ledger.drop_dead_letter(job_id)
        except LedgerUnavailable as error:  # e.g. without the permissions that this version needs
            log.debug("dead_letter_drop_failed", shard=entry.shard.key, error=error)

    def cancel(self) -> None:
        """Cancel all shards; afterwards `ids` has those that a worker still runs."""
        self.ids = tuple(document.id for document in cancel(self._ledger, self.ids) if not document.final)
        self.shards.clear()

    def cancel_others(self, ids: Iterable[str]) -> bool:
        """Cancel shards of an earlier run; return whether all of them have ended."""
        return all(document.final for document in cancel(self._ledger, ids))


def cancel(ledger: Ledger, ids: Iterable[str]) -> list[StatusDocument]:
    """Cancel shards; return the new documents of those that had not ended. Raises LedgerUnavailable."""
    canceled = []
    for document in ledger.read_many(sorted(ids)).values():
        with contextlib.suppress(UnknownJob):  # it expired just now
            if not document.final:
                canceled.append(ledger.cancel(document.id))
    return canceled
