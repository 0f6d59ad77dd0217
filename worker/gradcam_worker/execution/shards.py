"""The other river: one shard of a backfill, from its rows to its Parquet file.

    rows --readers--> groups of fitted pictures --one pass each--> explanations --> one file, written last

While the device computes one group, the next ones are read. Every pass is over as many pictures, each in the
place that its row's number gives it, and grey ones where there is none to compute: so a shard that is run
again leaves the same bytes, whichever rows were computed together. (Only where the device's memory is too
short for that are passes smaller, and differ in the last digits.)
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts import dataset
from gradcam_worker.artifacts.dataset import Outcome, Summary
from gradcam_worker.errors import (
    DeviceOutOfMemory,
    GradcamError,
    ImageFetchFailed,
    InternalError,
    WeightsChecksumMismatch,
    WorkerLost,
)
from gradcam_worker.execution import pipeline
from gradcam_worker.execution.pipeline import JobContext, JobResult, Stage
from gradcam_worker.execution.services import Services
from gradcam_worker.execution.shard_rows import ENDS, LoadedImage, ShardRows
from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.network import Method, Network
from gradcam_worker.inference.model_cache import GREY
from gradcam_worker.observability.logs import Pool
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.earlier import metrics_of_failed, stage_of_progress
from gradcam_worker.schemas.shard import READERS, Shard, data_key, failed_key
from gradcam_worker.schemas.status import ManifestRef, NetworkRef, Problem, RowSearch, RowState
from gradcam_worker.storage.stores import Object, Store

log = logging.getLogger("gradcam")

AHEAD = 3  # groups that are read or computed while one is waited for
COMPUTING = 2  # of them that may be with the device: one is computed, one is there
AGAIN_S = 2.0  # before rows that failed for a moment are tried a second time

Pixels = NDArray[np.uint8]
Under = deque[tuple[list[int], "Future[list[Outcome]]"]]


def run_shard(shard: Shard, services: Services, context: JobContext) -> JobResult:
    """Run one shard. Raises the errors of `gradcam_worker.errors` that are not a single row's."""
    store = pipeline.admit(shard, services)
    place = data_key(shard.key)
    there = _made_for(shard, store, place, context.deadline)
    if there is not None and not shard.keep:
        return _done(store.uri(place), there, dataset.summary_of(there))
    kept, good = dataset.good_rows(there) if there is not None else (None, frozenset())
    places = [row for row in range(len(shard.rows)) if shard.first + row not in good]
    with context.stage("load"):
        run = _ShardRun(shard, services, context, store)
    with context.stage("explain"):
        outcomes = run.outcomes(places)
        grid, layer = run.grid_and_layer()
        sha256 = run.network.facts.weights_sha256
        reference = NetworkRef(name=shard.network, layer=layer, weights_sha256=sha256)
    with context.stage("render"):
        data, summary = dataset.to_bytes(shard, reference, grid, outcomes, kept)
    lines = dataset.failed_lines(shard, outcomes)
    with context.stage("upload"):
        if not context.after_crash:  # else it has just written what the next attempt has to know
            context.checkpoint(Stage("upload"))  # who was overtaken, and has not heard of it, writes nothing
        # Whoever dies between the two leaves no failed row that is not written down.
        files = [
            (failed_key(shard.key), lines, "application/x-ndjson"),
            (place, data, dataset.MEDIA_TYPE),
        ]
        for one in files if kept is None else reversed(files):
            _put(store, one, context.deadline)
    context.metrics["images_per_s"] = round(len(places) / max(context.metrics["explain_s"], 1e-3), 3)
    return _done(store.uri(place), data, summary)


def _made_for(shard: Shard, store: Store, place: str, deadline: Deadline) -> bytes | None:
    """The file that an earlier attempt at this shard, or an earlier run of its backfill, has left.

    A file of another backfill, of other rows, or with other weights than are asked for counts for nothing.
    Raises StorageUnavailable where it is no shard's file.
    """
    there = store.find(place, deadline)
    if there is not None and (other := dataset.made_for_another(there, shard)):
        log.warning("%s was made for %s, and will be replaced", store.uri(place), other)
        return None
    return there


def _put(store: Store, one: Object, deadline: Deadline) -> None:
    """Write a file, and have none where it would be empty."""
    if one[1]:
        store.put_many([one], deadline)
    elif store.find(one[0], deadline) is not None:  # of an attempt, or a run, before
        store.remove(one[0])


def _done(uri: str, data: bytes, summary: Summary) -> JobResult:
    counts = {"rows": float(summary.rows), "failed": float(summary.failed)}
    failed = dict(summary.codes)
    counts |= metrics_of_failed(failed)
    result = ManifestRef(manifest_uri=uri, manifest_sha256=hashlib.sha256(data).hexdigest())
    return JobResult(
        network=summary.network,
        predictions=(),
        result=result,
        warnings=(),
        metrics=counts,
        rows=RowState(failed=failed) if failed else None,
    )


class _ShardRun:
    """A shard while it is computed."""

    def __init__(self, shard: Shard, services: Services, context: JobContext, store: Store) -> None:
        self.shard, self.model_cache, self.context = shard, services.model_cache, context
        self._grid: dataset.Grid | None = None
        self._layer = ""
        begun = time.monotonic()
        self.network: Network = services.model_cache.load(services.networks.find(shard.network))
        context.deadline.forgive(time.monotonic() - begun)  # a download of weights is nobody's fault
        has = self.network.facts.weights_sha256
        if shard.weights_sha256 not in {None, has}:
            message = (
                f"The backfill was planned for weights of {shard.network} with sha256 "
                f"{shard.weights_sha256}; this worker has {has or 'some of which it knows no sha256'}."
            )
            raise WeightsChecksumMismatch(message)
        self.rows = ShardRows(shard, services, context, store, self.network)
        self.size = services.model_cache.shard_batch_size(self.network)
        self.wish = self.network.labels.wanted(top_n=shard.target.top_n, classes=shard.target.classes)
        self.method = Method(**shard.method.model_dump())

    def grid_and_layer(self) -> tuple[dataset.Grid, str]:
        """Of the heatmaps; where no row was explained, of a grey picture's."""
        facts = self.network.facts
        if not self._grid:
            self._explained({0: np.full((*facts.input_size, facts.channels), GREY, np.uint8)}, self.size)
        layer = self._layer or self.shard.method.layer or facts.default_layer
        return self._grid or facts.map_size, layer

    def outcomes(self, places: Sequence[int]) -> list[Outcome | None]:
        """What became of the rows at these places; None of the others.

        What failed for a moment is tried a second time. Where that is most of the rows, a store is down,
        which is no fault of its images: the whole shard is tried again, unless this attempt is the last.
        """
        found: list[Outcome | None] = [None] * len(self.shard.rows)
        compute = self._alone if self.context.after_crash else self._in_turn
        compute(places, found)
        brief = {place: one for place in places if (one := found[place]) and self._is_brief(place, one)}
        if 2 * len(brief) > len(places) and not self.context.is_last_attempt:
            first: Any = next(iter(brief.values()))
            message = f"{len(brief)} of {len(places)} images cannot be had just now, as: {first.detail}"
            raise (ImageFetchFailed if first.code == ImageFetchFailed.code else InternalError)(message)
        if brief:
            time.sleep(min(AGAIN_S, self.context.deadline.left_s()))
            compute([*brief], found)
        return found

    def _is_brief(self, place: int, outcome: Outcome) -> bool:
        if not isinstance(outcome, Problem) or self.shard.rows[place].problem:
            return False
        return outcome.retryable and outcome.code != WorkerLost.code

    def _in_turn(self, places: Sequence[int], found: list[Outcome | None]) -> None:
        def report(_: list[int], done: int) -> None:
            stage = stage_of_progress(done, len(places))
            self.context.report_stage(Stage(stage, RowState(done=done) if done else None))

        self._in_groups(places, found, self.size, AHEAD, report)

    def _alone(self, places: Sequence[int], found: list[Outcome | None]) -> None:
        """A worker died under this shard: one group at a time, and say before each that it is its turn.

        Where it dies under such a group, the next attempt does so with each row; and the one after leaves
        out the row whose turn it was.
        """
        before = self.context.row_search
        left_out = () if before is None or before.row is None else (before.row, *before.left_out)

        def checkpoint(group: list[int], _: int) -> None:
            search = (
                RowSearch(row=group[0], left_out=left_out)
                if before
                else RowSearch(group=(group[0], group[-1]))
            )
            self.context.checkpoint(Stage(search.stage, RowState(search=search)))

        for place in places:
            if place in left_out:
                lost = WorkerLost("The worker ended without a word when this image's turn came.")
                found[place] = Problem.of(lost, stage="explain", attempt=self.context.attempt)
        left = [place for place in places if place not in left_out]
        self._in_groups(left, found, 1 if before else self.size, 0, checkpoint)

    def _in_groups(
        self,
        places: Sequence[int],
        found: list[Outcome | None],
        step: int,
        ahead: int,
        say: Callable[[list[int], int], None],
    ) -> None:
        """Groups of `step` places, `ahead` of them begun while one is waited for; `say` is told before each
        which it is and how many rows are done.
        """
        done = 0
        under_way: Under = deque()
        with (
            Pool(READERS, thread_name_prefix="shard-read") as readers,
            Pool(COMPUTING, thread_name_prefix="shard-compute") as computing,
        ):
            try:
                for group in _cut(places, step):
                    self.context.deadline.check("explain")
                    say(group, done)
                    read = [readers.submit(self.rows.read, place) for place in group]
                    under_way.append((group, computing.submit(self._computed, group, read, readers)))
                    while len(under_way) > ahead:
                        done += _collect(under_way, found)
                while under_way:
                    done += _collect(under_way, found)
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                computing.shutdown(wait=False, cancel_futures=True)
                raise

    def _computed(
        self, group: Sequence[int], read: Sequence["Future[LoadedImage | Problem]"], pool: Pool
    ) -> list[Outcome]:
        """The outcomes of a group, in its order."""
        pictures = {place: one.result() for place, one in zip(group, read, strict=True)}
        seen = self._explained(
            {place: one.fitted for place, one in pictures.items() if isinstance(one, LoadedImage)}, self.size
        )

        def outcome(place: int) -> Outcome:
            picture = pictures[place]
            return picture if isinstance(picture, Problem) else self.rows.outcome(place, picture, seen[place])

        return [*(pool.map if self.shard.artifacts else map)(outcome, group)]  # what is drawn is read again

    def _explained(self, pictures: Mapping[int, Pixels], size: int) -> dict[int, Explanation | GradcamError]:
        """One pass over `size` pictures, those of these places and grey ones. Where it fails they are parted
        between two, and so on: what one image does fails that image alone.
        """
        if not pictures:
            return {}
        pixels = np.full((size, *next(iter(pictures.values())).shape), GREY, np.uint8)
        for place, one in pictures.items():
            pixels[place % size] = one
        try:
            found = self.model_cache.infer_many(
                self.network, pixels, self.wish, self.method, self.context.deadline
            )
        except ENDS:
            raise
        except BaseException as error:  # noqa: BLE001  # whatever a network may raise
            short = isinstance(error, DeviceOutOfMemory) and size > 1
            if short:
                size //= 2
                parts = _cut(pictures, size)
            elif len(pictures) > 1:
                places, half = [*pictures], len(pictures) // 2
                parts = [places[:half], places[half:]]
            else:
                return dict.fromkeys(
                    pictures, error if isinstance(error, GradcamError) else InternalError.of(error)
                )
            halves = [self._explained({place: pictures[place] for place in part}, size) for part in parts]
            return {place: one for half in halves for place, one in half.items()}
        seen = {place: found[place % size] for place in pictures}
        for each in seen.values():
            if isinstance(each, Explanation):
                self._grid, self._layer = each.heatmaps.shape[1:], each.layer
        return seen


def _cut(places: Iterable[int], step: int) -> list[list[int]]:
    """Groups by place: where one is missing its group is smaller, and no other moves up."""
    return [[*some] for _, some in groupby(places, lambda place: place // step)]


def _collect(under_way: Under, found: list[Outcome | None]) -> int:
    """Wait for the group that was begun first; return how many rows it has."""
    group, computed = under_way.popleft()
    for place, outcome in zip(group, computed.result(), strict=True):
        found[place] = outcome
    return len(group)
