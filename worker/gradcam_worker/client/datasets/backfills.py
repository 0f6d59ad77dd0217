"""A backfill's state, its end from another process, its files: for the command line and the HTTP API."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gradcam_worker.backfill.inflight import cancel as cancel_shards
from gradcam_worker.backfill.output import DatasetDir
from gradcam_worker.backfill.registry import BackfillLease, BackfillRecord, RedisBackfillRegistry
from gradcam_worker.errors import BackfillCanceled, BackfillConflict, GradcamError, InvalidJob, error_class
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.model import ResponseModel
from gradcam_worker.settings import Settings

if TYPE_CHECKING:
    from gradcam_worker.backfill.compaction import Compaction
    from gradcam_worker.storage.s3 import S3

POLL_INTERVAL_S = 0.2
CANCEL_TIMEOUT_S = 15.0
ERROR_LINE = '{"event": "error"'  # how the line begins that a command prints as it fails
USAGE = "usage"  # the code of an option that the command does not take
MAX_MESSAGE = 1000  # characters of an error's message that are kept


@dataclass(frozen=True)
class Cancellation:
    """How far a backfill was stopped."""

    output: str
    was_running: bool
    ended: bool
    """whether no process runs it any more"""
    canceled: int
    """shards in flight that were cancelled"""
    unfinished: int
    """of these, those that a worker still runs"""


class BackfillStatus(ResponseModel):
    """The state of a backfill."""

    backfill: str
    """its id"""
    output: str
    input: str
    network: str
    state: Literal["running", "complete", "stopped", "damaged"]
    shards_done: int
    dataset: dict[str, Any] | None = None
    """the summary of a complete dataset"""
    last: dict[str, Any] | None = None
    """the progress of the latest run"""

    @property
    def rows(self) -> int:
        """The number of rows that are done, failed ones included."""
        last = self.last or {"before": 0, "done": 0}
        return int(self.dataset["rows"] if self.dataset else last["before"] + last["done"])

    @property
    def failed(self) -> int:
        """The number of rows that have failed; before the end, in the latest run."""
        return int((self.dataset or self.last or {"failed": 0})["failed"])


def open_dataset(output: str, settings: Settings, s3: "S3 | None" = None) -> DatasetDir:
    """Open the folder of a dataset. Raises OutputNotAllowed."""
    from gradcam_worker.storage.s3 import S3  # 30 MB, which a gateway without backfills does not need
    from gradcam_worker.storage.stores import Stores

    return DatasetDir(Stores(settings, s3 or S3(settings)).open(output))


def error_of(printed: str) -> GradcamError | None:
    """The error that `gradcam backfill --json` has ended with.

    Args:
        printed: What it has printed.

    Returns:
        The error; None where it has printed none.
    """
    for line in reversed(printed.splitlines()):
        if line.startswith(ERROR_LINE):
            error = json.loads(line)["error"]
            kind = InvalidJob if error["code"] == USAGE else error_class(error["code"])
            return kind(error["message"][:MAX_MESSAGE])
    return None


def read_status(output: str, settings: Settings, s3: "S3 | None" = None) -> dict[str, Any]:
    """Read the state of a backfill.

    Args:
        output: The dataset that it writes.
        settings: Of a client.
        s3: The client of its storage, for who asks often: a new one takes a tenth of a second to make.

    Returns:
        The facts that `gradcam backfill status --json` prints.

    Raises:
        OutputNotAllowed: The dataset may not be there.
        BackfillConflict: There is no backfill.
        StorageUnavailable: The storage cannot be reached.
        LedgerUnavailable: The ledger cannot be reached.
    """
    dataset = open_dataset(output, settings, s3)
    plan, summary = dataset.require_plan(), dataset.read_summary()
    ledger = RedisLedger(settings)
    record = RedisBackfillRegistry(ledger.server).find(dataset.uri)
    running, done = record is not None and record.is_running, sum(map(len, dataset.done_keys().values()))
    final_state = "stopped" if not summary else "complete" if summary["shards"] == done else "damaged"
    return {
        "backfill": plan.id,
        "output": dataset.uri,
        "input": plan.input,
        "network": plan.network,
        "state": "running" if running else final_state,
        "shards_done": done,
        "dataset": summary,
        "last": _last_run(record, ledger) if record else None,
    }


def cancel(
    output: str, settings: Settings, s3: "S3 | None" = None, timeout_s: float = CANCEL_TIMEOUT_S
) -> Cancellation:
    """Stop a backfill, on whichever machine it runs, and cancel its shards in flight.

    Args:
        output: The dataset that it writes.
        settings: Of a client.
        s3: As for `read_status`.
        timeout_s: How long to wait for the process that runs it, and for its shards.

    Returns:
        What has ended.

    Raises:
        OutputNotAllowed, BackfillConflict, StorageUnavailable, LedgerUnavailable: as `read_status`.
    """
    dataset, ledger = open_dataset(output, settings, s3), RedisLedger(settings)
    dataset.require_plan()
    registry = RedisBackfillRegistry(ledger.server)
    record, end = registry.request_cancel(dataset.uri), time.monotonic() + timeout_s
    was_running = record is not None and record.is_running
    while record and record.is_running and time.monotonic() < end:
        time.sleep(POLL_INTERVAL_S)
        record = registry.find(dataset.uri)
    ended = record is None or not record.is_running
    canceled = cancel_shards(ledger, record.shards) if record and ended else []
    unfinished = {shard.id for shard in canceled if not shard.final}  # a worker still runs them
    while unfinished and time.monotonic() < end:
        time.sleep(POLL_INTERVAL_S)
        unfinished = _unfinished(ledger, unfinished)
    return Cancellation(dataset.uri, was_running, ended, len(canceled), len(unfinished))


def compact(output: str, settings: Settings, target_bytes: int) -> "Compaction":
    """Merge the small files of a complete dataset into larger ones.

    Args:
        output: The dataset.
        settings: Of a client.
        target_bytes: About the size of a merged file.

    Returns:
        How many files there were and are.

    Raises:
        OutputNotAllowed: The dataset may not be there.
        BackfillConflict: There is no backfill, it is not complete, or shards of it are still in flight.
        BackfillRunning: Another process runs it.
        BackfillCanceled: A cancel was requested meanwhile; the same call goes on.
        StorageUnavailable: The storage cannot be reached.
        LedgerUnavailable: The ledger cannot be reached.
    """
    from gradcam_worker.backfill.compaction import Compactor, lease_facts

    dataset, ledger = open_dataset(output, settings), RedisLedger(settings)
    plan = dataset.require_plan()
    summary = dataset.begin_compaction(dry=True)
    facts = lease_facts(plan, summary)
    lease = BackfillLease(RedisBackfillRegistry(ledger.server), dataset.uri, lambda: facts, tuple)

    def check() -> None:
        lease.check()
        if lease.status.cancel_requested:
            message = f"The files of {dataset.uri} are not all merged: that was cancelled on request."
            raise BackfillCanceled(message)

    with lease:
        if lease.previous and (unfinished := _unfinished(ledger, lease.previous.shards)):
            message = f"{len(unfinished)} shards of {dataset.uri} are still in flight: wait, or use --resume."
            raise BackfillConflict(message)
        return Compactor(dataset, target_bytes=target_bytes, check=check).run()


def _last_run(record: BackfillRecord, ledger: Ledger) -> dict[str, Any]:
    """Return the progress of the latest run; once it has stopped, with the shards still in flight."""
    if record.is_running:
        return record.facts
    return {**record.facts, "in_flight": len(_unfinished(ledger, record.shards))}


def _unfinished(ledger: Ledger, shards: Iterable[str]) -> set[str]:
    """Return the ids of those shards that are not final."""
    return {shard.id for shard in ledger.read_many(sorted(shards)).values() if not shard.final}
