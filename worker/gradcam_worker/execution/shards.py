"""One shard of a backfill, from its rows to its Parquet file.

    rows --readers--> groups of fitted images --one pass each--> explanations --> one file, written last

While the device computes one group, the next ones are fetched. Every pass has the same number of images. Each
image has a fixed place in its pass, by its row, and grey ones fill the places that are free. So a shard that
is run again leaves the same bytes, whichever rows were computed together. (Only where the device has too
little memory for that, passes are smaller, and results differ in the last digits.)
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
from gradcam_worker.execution.shard_rows import SHARD_ERRORS, LoadedImage, ShardRows
from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.network import Method, Network
from gradcam_worker.inference.model_cache import GREY
from gradcam_worker.observability.logs import ContextThreadPool
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.earlier import metrics_of_failed, stage_of_progress
from gradcam_worker.schemas.shard import READERS, Shard, data_key, failed_key
from gradcam_worker.schemas.status import ManifestRef, NetworkRef, Problem, RowSearch, RowState
from gradcam_worker.storage.stores import Object, Store

log = logging.getLogger("gradcam")

GROUPS_AHEAD = 3  # that are fetched or computed while the first one is waited for
GROUPS_COMPUTED_AT_ONCE = 2  # one in its pass, one ready for the next
RETRY_ROWS_AFTER_S = 2.0  # the second try of rows with a transient error

Pixels = NDArray[np.uint8]
Pending = deque[tuple[list[int], "Future[list[Outcome]]"]]


def run_shard(shard: Shard, services: Services, context: JobContext) -> JobResult:
    """Run one shard.

    Args:
        shard: Its rows, and what is asked of them.
        services: Everything that it touches.
        context: Of this attempt.

    Returns:
        What its status document says when it has succeeded, some rows failed or not.

    Raises:
        GradcamError: Any error that is not a single row's: see `gradcam_worker.execution.shard_rows`.
    """
    store = pipeline.admit(shard, services)
    key = data_key(shard.key)
    existing = _existing_file(shard, store, key, context.deadline)
    if existing is not None and not shard.keep:
        return _job_result(store.uri(key), existing, dataset.summary_of(existing))
    kept, good = dataset.good_rows(existing) if existing is not None else (None, frozenset())
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
        if not context.after_crash:  # else its checkpoint must stay the last one
            context.checkpoint(
                Stage("upload")
            )  # an attempt that was overtaken fails here, and writes nothing
        # In this order, a worker that dies between the two leaves no failed row without its line.
        files = [
            (failed_key(shard.key), lines, "application/x-ndjson"),
            (key, data, dataset.MEDIA_TYPE),
        ]
        for one in files if kept is None else reversed(files):
            _put(store, one, context.deadline)
    context.metrics["images_per_s"] = round(len(places) / max(context.metrics["explain_s"], 1e-3), 3)
    return _job_result(store.uri(key), data, summary)


def _existing_file(shard: Shard, store: Store, key: str, deadline: Deadline) -> bytes | None:
    """The file that an earlier attempt at this shard, or an earlier run of its backfill, has left.

    None where it is of another backfill, of other rows, or of other weights. Raises StorageUnavailable where
    it is no shard's file.
    """
    existing = store.find(key, deadline)
    if existing is not None and (other := dataset.made_for_another(existing, shard)):
        log.warning("%s was made for %s, and will be replaced", store.uri(key), other)
        return None
    return existing


def _put(store: Store, one: Object, deadline: Deadline) -> None:
    """Write a file; remove it where it would be empty."""
    if one[1]:
        store.put_many([one], deadline)
    elif store.find(one[0], deadline) is not None:  # of an earlier attempt or run
        store.remove(one[0])


def _job_result(uri: str, data: bytes, summary: Summary) -> JobResult:
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
    """One attempt at computing the rows of a shard."""

    def __init__(self, shard: Shard, services: Services, context: JobContext, store: Store) -> None:
        self.shard, self.model_cache, self.context = shard, services.model_cache, context
        self._grid: dataset.Grid | None = None
        self._layer = ""
        begun_s = time.monotonic()
        self.network: Network = services.model_cache.load(services.networks.find(shard.network))
        context.deadline.extend(time.monotonic() - begun_s)  # a download of weights is nobody's fault
        has = self.network.facts.weights_sha256
        if shard.weights_sha256 not in {None, has}:
            message = (
                f"The backfill was planned for weights of {shard.network} with sha256 "
                f"{shard.weights_sha256}; this worker has {has or 'some of which it knows no sha256'}."
            )
            raise WeightsChecksumMismatch(message)
        self.rows = ShardRows(shard, services, context, store, self.network)
        self.size = services.model_cache.shard_batch_size(self.network)
        self.classes = self.network.labels.wanted(top_n=shard.target.top_n, classes=shard.target.classes)
        self.method = Method(**shard.method.model_dump())

    def grid_and_layer(self) -> tuple[dataset.Grid, str]:
        """Of the heatmaps. If no row was explained, a grey image tells."""
        facts = self.network.facts
        if not self._grid:
            self._infer({0: np.full((*facts.input_size, facts.channels), GREY, np.uint8)}, self.size)
        layer = self._layer or self.shard.method.layer or facts.default_layer
        return self._grid or facts.map_size, layer

    def outcomes(self, places: Sequence[int]) -> list[Outcome | None]:
        """Compute the rows at these places; the outcome of every other row is None.

        Rows with a transient error are tried a second time. If these are most of the rows, a store must be
        down: the whole shard is tried again, unless this attempt is the last.
        """
        outcomes: list[Outcome | None] = [None] * len(self.shard.rows)
        compute = self._compute_alone if self.context.after_crash else self._compute_pipelined
        compute(places, outcomes)
        transient = {
            place: one for place in places if (one := outcomes[place]) and self._is_transient(place, one)
        }
        if 2 * len(transient) > len(places) and not self.context.is_last_attempt:
            first: Any = next(iter(transient.values()))
            message = f"{len(transient)} of {len(places)} images cannot be had just now, as: {first.detail}"
            raise (ImageFetchFailed if first.code == ImageFetchFailed.code else InternalError)(message)
        if transient:
            time.sleep(min(RETRY_ROWS_AFTER_S, self.context.deadline.left_s()))
            compute([*transient], outcomes)
        return outcomes

    def _is_transient(self, place: int, outcome: Outcome) -> bool:
        if not isinstance(outcome, Problem) or self.shard.rows[place].problem:
            return False
        return outcome.retryable and outcome.code != WorkerLost.code

    def _compute_pipelined(self, places: Sequence[int], outcomes: list[Outcome | None]) -> None:
        def report(_: list[int], done: int) -> None:
            stage = stage_of_progress(done, len(places))
            self.context.report_stage(Stage(stage, RowState(done=done) if done else None))

        self._compute_groups(places, outcomes, self.size, GROUPS_AHEAD, report)

    def _compute_alone(self, places: Sequence[int], outcomes: list[Outcome | None]) -> None:
        """One group, or row, at a time, after a worker died under this shard. See `RowSearch`.

        A checkpoint before each lets the next attempt know under which one this worker died.
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
                outcomes[place] = Problem.of(lost, stage="explain", attempt=self.context.attempt)
        left = [place for place in places if place not in left_out]
        self._compute_groups(left, outcomes, 1 if before else self.size, 0, checkpoint)

    def _compute_groups(
        self,
        places: Sequence[int],
        outcomes: list[Outcome | None],
        size: int,
        ahead: int,
        before_group: Callable[[list[int], int], None],
    ) -> None:
        """Compute rows in groups.

        Args:
            places: Of the rows.
            outcomes: Of all rows of the shard; filled in.
            size: Rows in a group, at most.
            ahead: Groups that are begun while one is waited for.
            before_group: Called as each begins, with its places and how many rows are done.
        """
        done = 0
        pending: Pending = deque()
        with (
            ContextThreadPool(READERS, thread_name_prefix="shard-read") as readers,
            ContextThreadPool(GROUPS_COMPUTED_AT_ONCE, thread_name_prefix="shard-compute") as computing,
        ):
            try:
                for group in _groups(places, size):
                    self.context.deadline.check("explain")
                    before_group(group, done)
                    loading = [readers.submit(self.rows.load, place) for place in group]
                    pending.append(
                        (group, computing.submit(self._outcomes_of_group, group, loading, readers))
                    )
                    while len(pending) > ahead:
                        done += _collect(pending, outcomes)
                while pending:
                    done += _collect(pending, outcomes)
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                computing.shutdown(wait=False, cancel_futures=True)
                raise

    def _outcomes_of_group(
        self,
        group: Sequence[int],
        loading: Sequence["Future[LoadedImage | Problem]"],
        pool: ContextThreadPool,
    ) -> list[Outcome]:
        """The outcomes of a group, in its order."""
        loaded = {place: one.result() for place, one in zip(group, loading, strict=True)}
        seen = self._infer(
            {place: one.fitted for place, one in loaded.items() if isinstance(one, LoadedImage)}, self.size
        )

        def outcome(place: int) -> Outcome:
            image = loaded[place]
            return image if isinstance(image, Problem) else self.rows.outcome(place, image, seen[place])

        return [
            *(pool.map if self.shard.artifacts else map)(outcome, group)
        ]  # drawing fetches the image again

    def _infer(self, images: Mapping[int, Pixels], size: int) -> dict[int, Explanation | GradcamError]:
        """Explain fitted images, by place, in a pass of `size` images that is filled up with grey ones.

        Where a pass fails, each half of the images is tried by itself, and so on: so an image that a network
        cannot take fails alone.
        """
        if not images:
            return {}
        pixels = np.full((size, *next(iter(images.values())).shape), GREY, np.uint8)
        for place, one in images.items():
            pixels[place % size] = one
        try:
            explanations = self.model_cache.infer_many(
                self.network, pixels, self.classes, self.method, self.context.deadline
            )
        except SHARD_ERRORS:
            raise
        except BaseException as error:  # noqa: BLE001  # whatever a network may raise
            out_of_memory = isinstance(error, DeviceOutOfMemory) and size > 1
            if out_of_memory:
                size //= 2
                parts = _groups(images, size)
            elif len(images) > 1:
                places, half = [*images], len(images) // 2
                parts = [places[:half], places[half:]]
            else:
                return dict.fromkeys(
                    images, error if isinstance(error, GradcamError) else InternalError.of(error)
                )
            halves = [self._infer({place: images[place] for place in part}, size) for part in parts]
            return {place: one for half in halves for place, one in half.items()}
        seen = {place: explanations[place % size] for place in images}
        for each in seen.values():
            if isinstance(each, Explanation):
                self._grid, self._layer = each.heatmaps.shape[1:], each.layer
        return seen


def _groups(places: Iterable[int], size: int) -> list[list[int]]:
    """Cut places into groups. A place that is missing makes its group smaller; no other moves up."""
    return [[*some] for _, some in groupby(places, lambda place: place // size)]


def _collect(pending: Pending, outcomes: list[Outcome | None]) -> int:
    """Wait for the oldest pending group; return how many rows it has."""
    group, computed = pending.popleft()
    for place, outcome in zip(group, computed.result(), strict=True):
        outcomes[place] = outcome
    return len(group)
