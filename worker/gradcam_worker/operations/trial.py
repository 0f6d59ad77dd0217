"""What a backfill would do: its rows by a sample, its time and size by a trial of a few shards.

    read         as many rows of the input as MAX_READ_S lasts; of these, a random sample is kept
    warm up      two rows for each shard that the workers run at a time, which loads the network
    measure      again two rows each, then as many as about TARGET_S needs

The trial writes a small dataset of its own below the output, and removes it. What is measured and what is
extrapolated from that are apart in the result.
"""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from gradcam_worker.backfill.inputs.open import Input
from gradcam_worker.backfill.options import RunOptions
from gradcam_worker.backfill.output import DatasetDir
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.progress import Progress
from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.backfill.runner import BackfillRunner
from gradcam_worker.backfill.sharding import cut_shards
from gradcam_worker.errors import GradcamError, NoWorker
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.shard import Row
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.storage.store import Store
from gradcam_worker.text.visible import counted

MAX_READ_S = 20.0  # of the input; what is left is estimated from the share that was read
SAMPLE_ROWS = 4096  # of the readable rows; no round of the trial has more
WARM_ROWS = 2  # of each shard while the network is loaded
TARGET_S = 10.0  # which the measured shards should last
MAX_SHARDS = 64  # of one round
PATIENCE_S = 600.0  # for one round
STORE_TIMEOUT_S = 60.0
SEED = 0  # the same input gives the same sample


class OpenStore(Protocol):
    """Opens a storage."""

    def open(self, uri: str | None = None, /) -> Store:
        """See `gradcam_worker.storage.stores.Stores.open`."""
        ...


@dataclass(frozen=True)
class Listing:
    """What was read of the input."""

    rows: int  # that were read
    total: int | None  # of the whole input; None: not known
    whole: bool  # all were read, so that the total is exact
    unreadable: Mapping[str, int]  # rows that name no image, by code
    sample: Sequence[Row] = field(default=(), repr=False)  # of the others


@dataclass(frozen=True)
class Measurement:
    """What the trial measured."""

    rows: int
    failed: Mapping[str, int]  # rows, by code
    workers: int  # that took part
    shards: int  # of the measured round
    shard_rows: int
    seconds: float  # of the measured round, from its first start to its last end
    includes_loading: bool  # of the network: the input is too short for a second round
    rows_per_s: float
    bytes_per_file: float  # without its rows
    bytes_per_row: float
    overlays_per_row: float
    bytes_per_overlay: float


@dataclass(frozen=True)
class Estimate:
    """What follows for the whole input. Every number is extrapolated."""

    rows: int
    failed: int
    seconds: float
    device_hours: float  # of all live workers
    objects: int
    bytes: int
    price: float | None


def read_listing(opened: Input) -> Listing:
    """Read rows of an input.

    Args:
        opened: The input.

    Returns:
        Their number, and a random sample of those that can be read.

    Raises:
        InvalidInput: It cannot be read further, or is empty.
    """
    end, draw = time.monotonic() + MAX_READ_S, random.Random(SEED)  # noqa: S311  # a sample, no secret
    sample: list[Row] = []
    unreadable: Counter[str] = Counter()
    readable = 0
    for row in opened.rows():
        if row.problem:
            unreadable[row.problem.code] += 1
        else:
            readable += 1
            if len(sample) < SAMPLE_ROWS:
                sample.append(row)
            elif (place := draw.randrange(readable)) < SAMPLE_ROWS:
                sample[place] = row
        if time.monotonic() > end:
            whole = False
            break
    else:
        whole = True
    draw.shuffle(sample)
    rows = readable + unreadable.total()
    return Listing(rows, rows if whole else opened.total(), whole, dict(sorted(unreadable.items())), sample)


class Trial:
    """Runs a few shards of a plan."""

    def __init__(
        self,
        plan: Plan,
        stores: OpenStore,
        settings: Settings,
        publish: Callable[[str], None],
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Nothing is run yet.

        Args:
            plan: The backfill's.
            stores: Where its output is.
            settings: Of the client.
            publish: Puts the message of a shard on the queue, by the shard's id.
            report: Called with a sentence for each step.
        """
        self._plan, self._stores, self._settings, self._publish = plan, stores, settings, publish
        self._report = report
        self._ledger = RedisLedger(settings)
        self._folder = f"trial-{new_id()[-12:]}"
        self._failed: Counter[str] = Counter()
        self._told: set[str] = set()  # warnings
        self._rows = 0

    def run(self, sample: Sequence[Row]) -> Measurement:
        """Measure a sample.

        Args:
            sample: Rows that name images.

        Returns:
            What was measured.

        Raises:
            NoWorker: No worker is alive, or none has finished in time.
            BackfillImpossible: No row can be explained so.
        """
        workers = len(self._ledger.find_workers())
        if not workers:
            message = "No worker is alive, so that nothing can be measured: start one with `gradcam worker`."
            raise NoWorker(message)
        slots = min(workers * self._settings.shards, MAX_SHARDS)
        rest = list(sample)
        try:
            shards = counted(slots, "shard")
            self._report(f"Trial: {shards} of {counted(WARM_ROWS, 'row')}, on {counted(workers, 'worker')}")
            warm = self._round(_take(rest, slots * WARM_ROWS), WARM_ROWS) or _Round()
            few = self._round(_take(rest, slots * WARM_ROWS), WARM_ROWS) or warm
            fitting = int(WARM_ROWS * TARGET_S / max(few.seconds, 0.01))
            shard_rows = max(min(fitting, self._plan.shard_rows, len(rest) // slots), 1)
            self._report(f"Trial: {shards} of {counted(shard_rows, 'row')}")
            many = self._round(_take(rest, slots * shard_rows), shard_rows) or few
        finally:
            self._remove()
        return self._measurement(few, many, includes_loading=many is warm)

    def _measurement(self, few: "_Round", many: "_Round", *, includes_loading: bool) -> Measurement:
        slope = (many.file_bytes - few.file_bytes) / max(many.shard_rows - few.shard_rows, 1)
        per_row = slope if slope > 0 else many.file_bytes / max(many.shard_rows, 1)
        return Measurement(
            rows=self._rows,
            failed=dict(sorted(self._failed.items())),
            workers=len({document.worker.id for document in many.documents if document.worker}),
            shards=len(many.documents),
            shard_rows=many.shard_rows,
            seconds=round(many.seconds, 3),
            includes_loading=includes_loading,
            rows_per_s=round(many.rows / max(many.seconds, 1e-3), 2),
            bytes_per_file=round(max(many.file_bytes - per_row * many.shard_rows, 0)),
            bytes_per_row=round(per_row, 1),
            overlays_per_row=round(many.overlays / max(many.rows, 1), 3),
            bytes_per_overlay=round(many.overlay_bytes / max(many.overlays, 1), 1),
        )

    def _round(self, rows: Sequence[Row], shard_rows: int) -> "_Round | None":
        """Run some rows as a backfill of their own; None if there are none left."""
        if not rows:
            return None
        output = f"{self._plan.output}/{self._folder}/{self._rows}"
        changes = {"id": new_id(), "output": output, "shard_rows": shard_rows, "given": {}}
        plan = self._plan.model_copy(update=changes)
        shards = list(cut_shards(rows, plan, max_bytes=self._settings.max_message_bytes // 2))
        end = time.monotonic() + PATIENCE_S

        def watch(_: Progress) -> None:
            if time.monotonic() > end:
                message = f"The trial has not ended within {PATIENCE_S:g} s: are the workers busy?"
                raise NoWorker(message)

        store = self._stores.open(output)
        runner = BackfillRunner(
            plan,
            DatasetDir(store),
            self._ledger,
            self._publish,
            RedisBackfillRegistry(self._ledger.server),
            options=RunOptions(window=len(shards), max_failed=1.0),
            on_progress=watch,
            warn=self._warn,
        )
        with runner.lease() as lease:
            try:
                summary = runner.run(lease, shards)
            except BaseException:
                with suppress(GradcamError):
                    runner.in_flight.cancel()
                raise
        self._rows += len(rows)
        self._failed.update((summary or runner.progress.facts())["codes"])
        found = self._ledger.read_many([shard.id for shard in shards]).values()
        documents = [document for document in found if document.started_at and document.completed_at]
        sizes = _sizes(store, "data")
        overlays = _sizes(store, "overlays") if plan.artifacts else []
        return _Round(
            len(rows), shard_rows, documents, sum(sizes) / max(len(sizes), 1), len(overlays), sum(overlays)
        )

    def _warn(self, message: str) -> None:
        """Report what a round says of the rows, once."""
        if message not in self._told:
            self._told.add(message)
            self._report(message)

    def _remove(self) -> None:
        """Remove what the trial has written."""
        store = self._stores.open(self._plan.output)
        for name in list(store.names(self._folder)):
            store.remove(name)
        if self._plan.output.startswith("file://"):
            folder = Path(unquote(self._plan.output.removeprefix("file://")))
            shutil.rmtree(folder / self._folder, ignore_errors=True)
            with suppress(OSError):
                folder.rmdir()  # only if it is empty: the trial has made it


@dataclass(frozen=True)
class _Round:
    """One round of the trial."""

    rows: int = 0
    shard_rows: int = 0
    documents: Sequence[StatusDocument] = ()
    file_bytes: float = 0.0
    overlays: int = 0
    overlay_bytes: int = 0

    @property
    def seconds(self) -> float:
        """From the start of the first shard to the end of the last one."""
        starts = [document.started_at.timestamp() for document in self.documents if document.started_at]
        ends = [document.completed_at.timestamp() for document in self.documents if document.completed_at]
        return max(ends) - min(starts) if ends else 0.0


def extrapolate(
    listing: Listing, measured: Measurement, plan: Plan, workers: int, price_per_hour: float | None
) -> Estimate | None:
    """Extrapolate a trial to the whole input.

    Args:
        listing: What was read of it.
        measured: What was measured.
        plan: The backfill's.
        workers: That are alive; each is taken for one device.
        price_per_hour: Of one device; None: not known.

    Returns:
        The estimate; None if the number of rows is not known.
    """
    if listing.total is None:
        return None
    rows = max(listing.total, listing.rows)
    unreadable = rows * sum(listing.unreadable.values()) / max(listing.rows, 1)
    explained = rows - unreadable
    failed = unreadable + explained * sum(measured.failed.values()) / max(measured.rows, 1)
    seconds = explained / measured.rows_per_s if measured.rows_per_s else 0.0
    device_hours = seconds * workers / 3600
    shards = ceil(rows / plan.shard_rows)
    overlays = explained * measured.overlays_per_row
    size = (
        shards * measured.bytes_per_file
        + explained * measured.bytes_per_row
        + overlays * measured.bytes_per_overlay
    )
    return Estimate(
        rows=rows,
        failed=round(failed),
        seconds=round(seconds, 1),
        device_hours=round(device_hours, 4),
        objects=shards + round(overlays) + 3 + (shards if failed else 0),
        bytes=round(size),
        price=None if price_per_hour is None else round(device_hours * price_per_hour, 2),
    )


def facts(listing: Listing, measured: Measurement | None, estimate: Estimate | None) -> dict[str, Any]:
    """What a dry run found, as JSON: `input`, `measured` and `extrapolated`."""
    read = {name: value for name, value in vars(listing).items() if name != "sample"}
    return {
        "input": read,
        "measured": asdict(measured) if measured else None,
        "extrapolated": asdict(estimate) if estimate else None,
    }


def _take(rows: list[Row], count: int) -> list[Row]:
    """Remove rows from the end of a list; return them."""
    taken = rows[-count:] if count else []
    del rows[len(rows) - len(taken) :]
    return taken


def _sizes(store: Store, folder: str) -> list[int]:
    deadline = Deadline(STORE_TIMEOUT_S)
    found = (store.find(name, deadline) for name in store.names(folder))
    return [len(data) for data in found if data is not None]
