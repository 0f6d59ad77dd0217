"""Replays of dead letters: a failed job is submitted again as a new one, and its dead letter is removed.

A failed job's state is final, so a replay is a separate job with the same content. Its id is derived from the
failed job's id: a replay that is interrupted and repeated creates no second job. It has no idempotency key,
since that would find the failed job. To run the failed job itself again, under its id and key, use
`gradcam_worker.client.client.GradcamClient.retry`.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gradcam_worker.errors import GradcamError, LedgerUnavailable, UnknownJob
from gradcam_worker.ledger.ledger import Ledger, Tenant
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument

REPLAY_OF = "replay_of"  # the metadata field of a replay that holds the failed job's id
MAX_METADATA_ENTRIES = 16  # of a job: see `gradcam_worker.schemas.job.Job`
READ_BATCH = 500  # documents that are read in one round trip


@dataclass(frozen=True)
class DeadLetter:
    """A failed job that has not been replayed."""

    id: str
    failed_s: float  # seconds since the epoch
    document: StatusDocument | None  # None: the job is forgotten by now

    @property
    def code(self) -> str:
        """The error code of the job; `forgotten` without a document."""
        return self.document.error.code if self.document and self.document.error else "forgotten"


@dataclass(frozen=True)
class ReplayResult:
    """The outcome of one replay. `gradcam replay --json` prints its fields."""

    id: str
    new_id: str | None  # None: it was not replayed
    why: str = ""  # the reason why it was not replayed


class DeadLetters:
    """The dead letters of a ledger. Its methods raise LedgerUnavailable if that cannot be reached."""

    def __init__(self, ledger: Ledger, submit: Callable[[Job, Tenant], object]) -> None:
        """Use a ledger.

        Args:
            ledger: The ledger.
            submit: Enters a job of a tenant and publishes it, as `GradcamClient.submit` does.
        """
        self._ledger, self._submit = ledger, submit

    def find(
        self,
        ids: Sequence[str] = (),
        *,
        code: str | None = None,
        since_s: float | None = None,
        limit: int | None = None,
    ) -> list[DeadLetter]:
        """Find dead letters.

        Args:
            ids: Only these jobs; empty: all.
            code: Only jobs that failed with this error code.
            since_s: Only jobs that failed in the last `since_s` seconds.
            limit: The maximum number of letters.

        Returns:
            The letters, newest first.

        Raises:
            UnknownJob: One of `ids` is not a dead letter.
        """
        failed_s = dict(self._ledger.find_dead_letters())
        for job_id in ids:
            if job_id not in failed_s:
                raise UnknownJob(self._explain_missing(job_id))
        earliest = 0 if since_s is None else time.time() - since_s
        chosen = [job_id for job_id, at in failed_s.items() if at >= earliest and (not ids or job_id in ids)]
        letters: list[DeadLetter] = []
        for begin in range(0, len(chosen), READ_BATCH):
            batch = chosen[begin : begin + READ_BATCH]
            documents = self._ledger.read_many(batch)
            read = (DeadLetter(job_id, failed_s[job_id], documents.get(job_id)) for job_id in batch)
            letters += [letter for letter in read if code in {None, letter.code}]
            if limit is not None and len(letters) >= limit:
                break
        return letters[:limit]

    def replay(self, letters: Sequence[DeadLetter], rate: float) -> Iterator[ReplayResult]:
        """Replay dead letters, oldest first.

        Args:
            letters: What to replay.
            rate: The maximum number of replays per second.

        Yields:
            The outcome of each.
        """
        begun = time.monotonic()
        sent = 0
        for letter in sorted(letters, key=lambda letter: letter.failed_s):
            replay = self.prepare_replay(letter)
            if isinstance(replay, str):
                yield ReplayResult(letter.id, None, replay)
                continue
            time.sleep(max(begun + sent / rate - time.monotonic(), 0))
            sent += 1
            yield self._submit_replay(replay, letter.id)

    def prepare_replay(self, letter: DeadLetter) -> Job | str:
        """Make the job that a replay would submit.

        Args:
            letter: The dead letter.

        Returns:
            The job; the reason, as a sentence, if the letter cannot be replayed.
        """
        job = self._ledger.read_job(letter.id)
        if isinstance(job, Shard):
            return f"It is a shard of backfill {job.backfill}: `gradcam backfill --resume` runs it again."
        if job is None:
            return "Cannot be replayed: this version can read no job in its message."
        return make_replay(job, letter.id)

    def _submit_replay(self, job: Job, failed_id: str) -> ReplayResult:
        try:
            if self._ledger.read_many([job.id]):  # an earlier replay was interrupted, or is still under way
                entered = self._ledger.read_job(job.id)
                job = entered if isinstance(entered, Job) else job
            self._submit(job, self._ledger.read_tenant(failed_id))
        except LedgerUnavailable:
            raise
        except GradcamError as error:
            return ReplayResult(failed_id, None, str(error))
        self._ledger.drop_dead_letter(failed_id)
        return ReplayResult(failed_id, job.id)

    def _explain_missing(self, job_id: str) -> str:
        document = self._ledger.read(job_id)  # raises UnknownJob
        if self._ledger.read_many([make_replay_id(job_id)]):
            return f"Job {job_id} has been replayed already, as {make_replay_id(job_id)}."
        return f"Job {job_id} is {document.status}: only a failed one can be replayed."


def make_replay(job: Job, failed_id: str) -> Job:
    """Make a new job with the content of a failed one.

    Args:
        job: The failed job.
        failed_id: The id under which it failed.

    Returns:
        The new job. `replay_of` in its metadata names the failed job, unless the metadata is full. An
        `expires_at` that has passed is removed.
    """
    metadata = {**job.metadata, REPLAY_OF: failed_id}
    expired = job.expires_at is not None and job.expires_at <= utc_now()
    return job.model_copy(
        update={
            "id": make_replay_id(failed_id),
            "idempotency_key": None,
            "metadata": metadata if len(metadata) <= MAX_METADATA_ENTRIES else job.metadata,
            "expires_at": None if expired else job.expires_at,
        }
    )


def make_replay_id(failed_id: str) -> str:
    """Derive the id of a replay, a UUIDv5 (RFC 9562, section 5.5), from the id of the failed job."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:gradcam:replay:{failed_id}"))
