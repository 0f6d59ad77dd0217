"""Dead letters, once more: a failed job is submitted again as a new one, and the old one is buried.

Final states absorb, so a replay is a job of its own, with the same content. Its id follows from the old
one's: a replay that is interrupted and repeated doubles nothing. It has no idempotency key: that one
belongs to the job that failed, and would find it. Who wants the job itself to be tried again, under its id
and key, asks for that: `gradcam_worker.client.client.GradcamClient.retry`.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gradcam_worker.errors import GradcamError, LedgerUnavailable, UnknownJob
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument

REPLAY_OF = "replay_of"  # in a job's metadata: the id of the one that failed
METADATA_ENTRIES = 16  # that a job may have: see `gradcam_worker.schemas.job.Job`
AT_ONCE = 500  # documents that are read in one round trip


@dataclass(frozen=True)
class DeadLetter:
    """A job that failed, and that nobody has replayed."""

    id: str
    failed_s: float  # since the epoch
    document: StatusDocument | None  # none where it is forgotten by now

    @property
    def code(self) -> str:
        """Of its problem."""
        return self.document.error.code if self.document and self.document.error else "forgotten"


@dataclass(frozen=True)
class Replayed:
    """What became of one letter."""

    id: str
    new_id: str | None  # none: it was not replayed
    why: str = ""  # it was not


class DeadLetters:
    """Failed jobs in a ledger. Raises LedgerUnavailable wherever that cannot be reached."""

    def __init__(self, ledger: Ledger, submit: Callable[[Job], str]) -> None:
        """`submit` enters a job and publishes it, as `GradcamClient.submit` does."""
        self._ledger, self._submit = ledger, submit

    def find(
        self,
        ids: Sequence[str] = (),
        *,
        code: str | None = None,
        since_s: float | None = None,
        limit: int | None = None,
    ) -> list[DeadLetter]:
        """Those that fit, newest first: with these ids or all, of this code, failed in the last `since_s`.

        Raises UnknownJob where one of `ids` is none.
        """
        dead = dict(self._ledger.find_dead_letters())
        for job_id in ids:
            if job_id not in dead:
                raise UnknownJob(self._why_not(job_id))
        earliest = 0 if since_s is None else time.time() - since_s
        chosen = [one for one, at in dead.items() if at >= earliest and (not ids or one in ids)]
        found: list[DeadLetter] = []
        for begin in range(0, len(chosen), AT_ONCE):
            some = chosen[begin : begin + AT_ONCE]
            documents = self._ledger.read_many(some)
            letters = (DeadLetter(one, dead[one], documents.get(one)) for one in some)
            found += [one for one in letters if code in {None, one.code}]
            if limit is not None and len(found) >= limit:
                break
        return found[:limit]

    def replay(self, letters: Sequence[DeadLetter], rate: float) -> Iterator[Replayed]:
        """Replay letters, the oldest first, at most `rate` a second; say of each what became of it."""
        begun = time.monotonic()
        sent = 0
        for letter in sorted(letters, key=lambda one: one.failed_s):
            found = self.look(letter)
            if isinstance(found, str):
                yield Replayed(letter.id, None, found)
                continue
            time.sleep(max(begun + sent / rate - time.monotonic(), 0))
            sent += 1
            yield self._again(found, letter.id)

    def look(self, letter: DeadLetter) -> Job | str:
        """The job that a replay of this letter would be; else why it cannot be replayed."""
        job = self._ledger.job(letter.id)
        if isinstance(job, Shard):
            return f"It is a shard of backfill {job.backfill}: `gradcam backfill --resume` runs it again."
        if job is None:
            return "Cannot be replayed: this version can read no job in its message."
        return once_more(job, letter.id)

    def _again(self, job: Job, old_id: str) -> Replayed:
        try:
            if self._ledger.read_many([job.id]):  # an earlier replay was interrupted, or is still going on
                held = self._ledger.job(job.id)
                job = held if isinstance(held, Job) else job
            self._submit(job)
        except LedgerUnavailable:
            raise
        except GradcamError as error:
            return Replayed(old_id, None, str(error))
        self._ledger.drop_dead_letter(old_id)
        return Replayed(old_id, job.id)

    def _why_not(self, job_id: str) -> str:
        document = self._ledger.read(job_id)  # raises UnknownJob
        if self._ledger.read_many([id_of_replay(job_id)]):
            return f"Job {job_id} has been replayed already, as {id_of_replay(job_id)}."
        return f"Job {job_id} is {document.status}: only a failed one can be replayed."


def once_more(job: Job, old_id: str) -> Job:
    """The same work as a new job. A time to expire that has passed is left out.

    It says in its metadata whom it replaces, where there is room for that.
    """
    metadata = {**job.metadata, REPLAY_OF: old_id}
    late = job.expires_at is not None and job.expires_at <= utc_now()
    return job.model_copy(
        update={
            "id": id_of_replay(old_id),
            "idempotency_key": None,
            "metadata": metadata if len(metadata) <= METADATA_ENTRIES else job.metadata,
            "expires_at": None if late else job.expires_at,
        }
    )


def id_of_replay(old_id: str) -> str:
    """A UUIDv5 (RFC 9562, section 5.5) of the id of the job that failed."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:gradcam:replay:{old_id}"))
