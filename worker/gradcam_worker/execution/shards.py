"""Runs one shard of a backfill, from its rows to its Parquet file.

    rows --reader threads--> groups of images --one batch each--> explanations --> one file, written last

While the device computes one group, the next groups are fetched. All batches have the same size. The position
of an image in its batch follows from the index of its row, and grey images fill the free positions. So a
shard that runs again writes the same bytes, whichever of its rows are computed together. (Only if the device
has too little memory are the batches smaller, and then results differ in the last digits.)
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts import dataset
from gradcam_worker.artifacts.dataset import Outcome, Summary
from gradcam_worker.artifacts.earlier_rows import EarlierRows, find_earlier_rows
from gradcam_worker.errors import (
    NO_DEVICE_MEMORY,
    DeviceOccupied,
    GradcamError,
    ImageFetchFailed,
    InternalError,
    NetworkCrashed,
    StorageUnavailable,
    WeightsChecksumMismatch,
    WorkerLost,
)
from gradcam_worker.execution.attempt import JobContext, JobResult, Progress, admit
from gradcam_worker.execution.scoring import explain_in_passes, method_of, spec_of
from gradcam_worker.execution.services import Services
from gradcam_worker.execution.shard_rows import SHARD_ERRORS, LoadedImage, ShardRows
from gradcam_worker.gradcam.explain import Explanation, choose_method, pad_selections
from gradcam_worker.gradcam.methods import integrated, masking
from gradcam_worker.gradcam.network import Classifier, InputPixels, repeat_values, sample_values
from gradcam_worker.inference.model_cache import GREY
from gradcam_worker.observability.logs import ContextThreadPool
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.legacy_rows import metrics_of_failed, stage_of_progress
from gradcam_worker.schemas.shard import READERS, Shard, data_key, failed_key
from gradcam_worker.schemas.status import (
    ManifestRef,
    NetworkRef,
    Problem,
    ResultWarning,
    RowSearch,
    RowState,
)
from gradcam_worker.storage.store import Object, Store
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

GROUPS_AHEAD = 3  # groups that are fetched or computed while the oldest one is awaited
GROUPS_COMPUTED_AT_ONCE = 2  # one on the device, one ready to follow
RETRY_ROWS_AFTER_S = 2.0  # pause before the second try of rows with a transient error

PendingGroups = deque[tuple[list[int], "Future[list[Outcome]]"]]  # indexes of the rows, their outcomes


def run_shard(shard: Shard, services: Services, context: JobContext) -> JobResult:
    """Run one shard.

    Args:
        shard: The shard.
        services: The services that it uses.
        context: This attempt.

    Returns:
        The fields of the status document of a shard that succeeded, whether or not some of its rows failed.

    Raises:
        GradcamError: The shard failed. An error of a single row does not fail its shard: see
            `gradcam_worker.execution.shard_rows`.
    """
    store = admit(shard, services)
    key = data_key(shard.key)
    existing = _existing_file(shard, store, key, context.deadline)
    if existing is not None and not shard.keep:
        return _job_result(store.uri(key), existing, dataset.read_summary(existing))
    digests = shard.row_digests()
    earlier = find_earlier_rows(shard, digests, store, context.deadline, existing)
    if earlier and len(earlier.indexes) == len(shard.rows):
        shard = shard.model_copy(update={"method": earlier.method})
        nothing = [None] * len(shard.rows)
        computed = _Computed(shard, earlier.network, earlier.grid, nothing, features=earlier.features)
    else:
        computed = _compute(shard, digests, earlier, services, context, store)
        if earlier and earlier.differs_from(computed.network, computed.grid, computed.shard.method):
            log.warning("earlier_rows_not_used", uri=store.uri(key), reason="the network has changed")
            earlier = None
            computed = _compute(shard, digests, None, services, context, store)
    with context.enter_stage("render"):
        data, summary = dataset.to_bytes(
            computed.shard,
            computed.network,
            computed.grid,
            computed.outcomes,
            earlier.table if earlier else None,
            has_shown=computed.has_shown,
            features=computed.features,
            digests=digests,
        )
    lines = dataset.failed_lines(shard, computed.outcomes)
    with context.enter_stage("upload"):
        if not context.after_crash:  # else the checkpoint of the row search must stay the last one
            # An attempt that was fenced fails here, before it writes anything.
            context.checkpoint(Progress("upload"))
        # In this order a worker that dies between the two writes leaves no failed row without its line.
        files = [
            (failed_key(shard.key), lines, "application/x-ndjson"),
            (key, data, dataset.MEDIA_TYPE),
        ]
        for file in files if existing is None else reversed(files):
            _write_or_remove(store, file, context.deadline)
    if reused := computed.copies + (len(earlier.indexes) if earlier else 0):
        context.metrics["reused"] = float(reused)
    return _job_result(store.uri(key), data, summary)


@dataclass(frozen=True)
class _Computed:
    """What a shard's file is made of, beside earlier rows."""

    shard: Shard  # with what was left open
    network: NetworkRef
    grid: dataset.Grid
    outcomes: Sequence[Outcome | None]  # None: of earlier rows
    has_shown: bool = False
    features: int | None = None  # channels
    copies: int = 0  # rows with the outcome of an equal row


def _compute(
    shard: Shard,
    digests: Sequence[str | None],
    earlier: EarlierRows | None,
    services: Services,
    context: JobContext,
    store: Store,
) -> _Computed:
    """Compute the rows that are not among the earlier ones, equal ones once."""
    with context.enter_stage("load"):
        run = _ShardRun(shard, services, context, store)
    done = earlier.indexes if earlier else frozenset()
    firsts: dict[str, int] = {}
    first_of = {
        index: index if digest is None else firsts.setdefault(digest, index)
        for index, digest in enumerate(digests)
        if index not in done
    }
    indexes = [index for index, first in first_of.items() if index == first]
    with context.enter_stage("explain"):
        outcomes = run.outcomes(indexes)
        grid, layer = run.grid_and_layer()
    for index, first in first_of.items():
        outcomes[index] = outcomes[first]
    context.metrics["images_per_s"] = round(len(indexes) / max(context.metrics["explain_s"], 1e-3), 3)
    facts = run.network.facts
    reference = NetworkRef(name=shard.network, layer=layer, weights_sha256=facts.weights_sha256)
    has_shown, copies = facts.sizing.fit != "squash", len(first_of) - len(indexes)
    features = run.channels or (earlier.features if earlier else None)
    return _Computed(run.shard, reference, grid, outcomes, has_shown, features, copies)


def _existing_file(shard: Shard, store: Store, key: str, deadline: Deadline) -> bytes | None:
    """Read the file that an earlier attempt at this shard, or an earlier run of its backfill, wrote.

    None: there is no file, or it is of a different backfill, of different rows or of different weights.
    A file that is not a shard's file raises StorageUnavailable.
    """
    existing = store.find(key, deadline)
    if existing is not None and (mismatch := dataset.find_mismatch(existing, shard)):
        log.warning("shard_file_replaced", uri=store.uri(key), reason=mismatch)
        return None
    return existing


def _write_or_remove(store: Store, file: Object, deadline: Deadline) -> None:
    """Write a file; if it is empty, remove the one that an earlier attempt wrote."""
    key, data, _ = file
    if data:
        store.put_many([file], deadline)
    elif store.find(key, deadline) is not None:
        store.remove(key)


def _job_result(uri: str, data: bytes, summary: Summary) -> JobResult:
    failed, warnings = dict(summary.codes), {code: rows for code, (rows, _) in summary.warnings.items()}
    metrics = {
        "rows": float(summary.rows),
        "failed": float(summary.failed),
        **metrics_of_failed(failed),
    }
    result = ManifestRef(manifest_uri=uri, manifest_sha256=hashlib.sha256(data).hexdigest())
    return JobResult(
        network=summary.network,
        predictions=(),
        result=result,
        warnings=tuple(
            ResultWarning(code=code, detail=f"{rows} of {summary.rows} rows. {first}")
            for code, (rows, first) in summary.warnings.items()
        ),
        metrics=metrics,
        rows=RowState(failed=failed, warnings=warnings) if failed or warnings else None,
    )


class _ShardRun:
    """One attempt at computing the rows of a shard."""

    def __init__(self, shard: Shard, services: Services, context: JobContext, store: Store) -> None:
        self.shard, self.inference, self.context = shard, services.inference, context
        self._grid: dataset.Grid | None = None
        self._layer = ""
        self.channels: int | None = None  # of the target layer, where features are asked for
        row = services.networks.find(shard.network)
        self.network: Classifier = services.inference.load(row, context.deadline)
        weights_sha256 = self.network.facts.weights_sha256
        if shard.weights_sha256 not in {None, weights_sha256}:
            message = (
                f"The backfill was planned for weights of {shard.network} with sha256 "
                f"{shard.weights_sha256}; "
                f"this worker has {weights_sha256 or 'weights with an unknown sha256'}."
            )
            raise WeightsChecksumMismatch(message)
        self.classes = self.network.labels.select(top_n=shard.target.top_n, classes=shard.target.classes)
        against = self.network.labels.select_against(shard.target.against, self.classes)
        method = replace(method_of(shard.method, self.network.facts), against=against)
        self.method = choose_method(replace(method, features=shard.features), self.network.facts)
        # By a method that needs many passes for each image, images are explained one by one.
        self.in_passes = masking.is_masking(self.method)
        if (
            self.in_passes or self.method.name == integrated.NAME
        ):  # what the shard leaves open is written into its file
            self.shard = shard = shard.model_copy(update={"method": spec_of(self.method)})
        self.rows = ShardRows(shard, services, context, store, self.network)
        self._selections, self._filler = self._select(shard)
        self.batch_size = 1 if self.in_passes else services.inference.shard_batch_size(self.network)
        if self.method.name == integrated.NAME:
            at_once = integrated.images_at_once(len(self._filler), self.network.facts.input_size)
            self.batch_size = min(self.batch_size, at_once)

    def _select(self, shard: Shard) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...]]:
        """The classes of rows that ask for some of their own, and those of all other images.

        All have the same number, so that all passes of the shard have the same shape: the last one is
        repeated. What is explained twice is told once.
        """
        own = {
            index: tuple(dict.fromkeys((*self.classes, *self.rows.own_classes(index))))
            for index, row in enumerate(shard.rows)
            if row.classes
        }
        width = max(map(len, (self.classes, *own.values())))
        filled = pad_selections([(0,) * width, self.classes, *own.values()])[1:].tolist()
        return dict(zip(own, map(tuple, filled[1:]), strict=True)), tuple(filled[0])

    def grid_and_layer(self) -> tuple[dataset.Grid, str]:
        """Return the grid and the layer of the heatmaps. If no row was explained, explain a grey image."""
        facts = self.network.facts
        if self.in_passes:
            return masking.grid_size(self.method, facts.input_size), masking.LAYER
        if not self._grid:
            grey = np.full((*facts.input_size, facts.channels), GREY, facts.pixel_type)
            self._infer({0: grey}, self.batch_size)
        layer = self._layer or self.shard.method.layer or facts.default_layer
        return self._grid or facts.map_size, layer

    def outcomes(self, indexes: Sequence[int]) -> list[Outcome | None]:
        """Compute the rows with these indexes. The outcome of every other row is None.

        Rows with a transient error are tried a second time. But if more than half of the rows have one, a
        store is probably down: then this attempt fails, so that the whole shard is retried, unless it is the
        last one.

        Raises:
            DeviceOccupied: Other processes have the device's memory, also at the second try.
            ImageFetchFailed: More than half of the images cannot be fetched at present.
            InternalError: More than half of the rows failed with another transient error.
            StorageUnavailable: The storage is why rows failed.
        """
        outcomes: list[Outcome | None] = [None] * len(self.shard.rows)
        compute = self._compute_alone if self.context.after_crash else self._compute_pipelined
        compute(indexes, outcomes)
        transient = self._transient(indexes, outcomes)
        if 2 * len(transient) > len(indexes):
            self._check_device(transient, len(indexes))
            if not self.context.is_last_attempt:
                first: Any = next(iter(transient.values()))
                kind = ImageFetchFailed if first.code == ImageFetchFailed.code else InternalError
                raise kind(_describe(transient, len(indexes)))
        if transient:
            self._check_storage(transient, len(indexes))
            time.sleep(min(RETRY_ROWS_AFTER_S, self.context.deadline.left_s()))
            compute([*transient], outcomes)
            transient = self._transient(transient, outcomes)
            self._check_device(transient, len(indexes))
            self._check_storage(transient, len(indexes))
        return outcomes

    def _check_device(self, transient: Mapping[int, Outcome], rows: int) -> None:
        """Raise DeviceOccupied where that is why rows have failed: they must not be written as failed."""
        occupied = {
            index: outcome
            for index, outcome in transient.items()
            if isinstance(outcome, Problem) and outcome.code == DeviceOccupied.code
        }
        if occupied:
            raise DeviceOccupied(_describe(occupied, rows))

    def _check_storage(self, transient: Mapping[int, Outcome], rows: int) -> None:
        """Raise StorageUnavailable where that is why rows have failed: they must not be written as failed."""
        if transient and self.context.storage_fails():
            raise StorageUnavailable(_describe(transient, rows))

    def _transient(self, indexes: Iterable[int], outcomes: Sequence[Outcome | None]) -> dict[int, Outcome]:
        """Those of some rows that have a transient error."""
        return {
            index: outcome
            for index in indexes
            if (outcome := outcomes[index]) and self._is_transient(index, outcome)
        }

    def _is_transient(self, index: int, outcome: Outcome) -> bool:
        if not isinstance(outcome, Problem) or self.shard.rows[index].problem:
            return False
        return outcome.retryable and outcome.code != WorkerLost.code

    def _compute_pipelined(self, indexes: Sequence[int], outcomes: list[Outcome | None]) -> None:
        """Compute groups while the next ones are fetched."""

        def report(_: list[int], done: int) -> None:
            stage = stage_of_progress(done, len(indexes))
            self.context.report_progress(Progress(stage, RowState(done=done) if done else None))

        self._compute_groups(indexes, outcomes, self.batch_size, GROUPS_AHEAD, report)

    def _compute_alone(self, indexes: Sequence[int], outcomes: list[Outcome | None]) -> None:
        """Compute one group at a time, or one row, after a worker died while it ran this shard.

        The checkpoint before each tells the next attempt which group or row killed this worker: see
        `RowSearch`.
        """
        previous = self.context.row_search
        left_out = () if previous is None or previous.row is None else (previous.row, *previous.left_out)

        def checkpoint(group: list[int], _: int) -> None:
            search = (
                RowSearch(row=group[0], left_out=left_out)
                if previous
                else RowSearch(group=(group[0], group[-1]))
            )
            self.context.checkpoint(Progress(search.stage, RowState(search=search)))

        for index in indexes:
            if index in left_out:
                error = WorkerLost("The worker process died while it processed this image.")
                outcomes[index] = Problem.of(error, stage="explain", attempt=self.context.attempt)
        remaining = [index for index in indexes if index not in left_out]
        self._compute_groups(remaining, outcomes, 1 if previous else self.batch_size, 0, checkpoint)

    def _compute_groups(
        self,
        indexes: Sequence[int],
        outcomes: list[Outcome | None],
        group_size: int,
        groups_ahead: int,
        before_group: Callable[[list[int], int], None],
    ) -> None:
        """Compute rows in groups.

        Args:
            indexes: Indexes of the rows to compute.
            outcomes: Outcomes of all rows of the shard, which this method fills in.
            group_size: Maximum number of rows in a group.
            groups_ahead: Number of groups that are started while the oldest one is awaited.
            before_group: Called when a group starts, with its indexes and the number of rows that are done.
        """
        done = 0
        pending: PendingGroups = deque()
        with (
            ContextThreadPool(READERS, thread_name_prefix="shard-read") as readers,
            ContextThreadPool(GROUPS_COMPUTED_AT_ONCE, thread_name_prefix="shard-compute") as computing,
        ):
            try:
                for group in _groups(indexes, group_size):
                    self.context.deadline.check("explain")
                    before_group(group, done)
                    loading = [readers.submit(self.rows.load, index) for index in group]
                    pending.append(
                        (group, computing.submit(self._outcomes_of_group, group, loading, readers))
                    )
                    while len(pending) > groups_ahead:
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
        """Wait for the images of a group, explain them, and return the outcomes in the order of the group."""
        loaded = {index: future.result() for index, future in zip(group, loading, strict=True)}
        pixels = {index: image.pixels for index, image in loaded.items() if isinstance(image, LoadedImage)}
        values = {
            index: image.values
            for index, image in loaded.items()
            if isinstance(image, LoadedImage) and image.values is not None
        }
        results = self._infer(pixels, self.batch_size, values)

        def outcome(index: int) -> Outcome:
            image = loaded[index]
            return image if isinstance(image, Problem) else self.rows.outcome(index, image, results[index])

        # To draw overlays the images are fetched again: that is done in parallel.
        return [*(pool.map if self.shard.artifacts else map)(outcome, group)]

    def _further_values(
        self, values: Mapping[int, NDArray[np.float32]], images: Iterable[int], size: int
    ) -> NDArray[np.float32] | None:
        """What the network takes beside the images of a batch (size, width); None: nothing."""
        further = repeat_values(sample_values(self.network.facts), size)
        if further is not None:
            for index in values.keys() & {*images}:
                further[index % size] = values[index]
        return further

    def _selections_of(self, images: Iterable[int], size: int) -> list[tuple[int, ...]]:
        """The classes of each image of a batch."""
        selections = [self._filler] * size
        for index in images:
            selections[index % size] = self._selections.get(index, self._filler)
        return selections

    def _infer(
        self,
        images: Mapping[int, InputPixels],
        size: int,
        values: Mapping[int, NDArray[np.float32]] = MappingProxyType({}),
        *,
        alone: bool = False,
    ) -> dict[int, Explanation | GradcamError]:
        """Explain images, given by row index, in a batch of `size` that is filled up with grey images.

        `values` are those of further inputs, by row index, if the network has any.

        If a batch fails, each half of its images is tried by itself, and so on. So an image that the network
        cannot process fails alone. If it has ended an engine process, each half is `alone` at the device.
        """
        if not images:
            return {}
        first = next(iter(images.values()))
        batch = np.full((size, *first.shape), GREY, first.dtype)
        for index, pixels in images.items():
            batch[index % size] = pixels
        further = self._further_values(values, images, size)
        selections = self._selections_of(images, size)
        try:
            explanations = self._explain_batch(batch, selections, further, alone=alone)
        except SHARD_ERRORS:
            raise
        except BaseException as error:  # noqa: BLE001  # a custom layer may raise anything
            out_of_memory = isinstance(error, NO_DEVICE_MEMORY) and size > 1
            if out_of_memory:
                size //= 2
                parts = _groups(images, size)
            elif len(images) > 1:
                indexes, half = [*images], len(images) // 2
                parts = [indexes[:half], indexes[half:]]
            else:
                return dict.fromkeys(
                    images, error if isinstance(error, GradcamError) else InternalError.of(error)
                )
            alone = alone or isinstance(error, NetworkCrashed)
            return self._infer_parts(images, parts, size, values, alone=alone)
        results = {index: explanations[index % size] for index in images}
        for result in results.values():
            if isinstance(result, Explanation):
                self._grid, self._layer = result.heatmaps.shape[1:], result.layer
                if result.features is not None:
                    self.channels = result.features.shape[1]
        return results

    def _infer_parts(
        self,
        images: Mapping[int, InputPixels],
        parts: Iterable[Sequence[int]],
        size: int,
        values: Mapping[int, NDArray[np.float32]],
        *,
        alone: bool,
    ) -> dict[int, Explanation | GradcamError]:
        """Explain the parts of a batch that failed.

        Where others have the device's memory, so that one image does not fit, the rest is not tried.
        """
        found: dict[int, Explanation | GradcamError] = {}
        for part in parts:
            found |= self._infer({index: images[index] for index in part}, size, values, alone=alone)
            occupied = next((one for one in found.values() if isinstance(one, DeviceOccupied)), None)
            if occupied:
                return {**dict.fromkeys(images, occupied), **found}
        return found

    def _explain_batch(
        self,
        batch: InputPixels,
        selections: Sequence[tuple[int, ...]],
        further: NDArray[np.float32] | None,
        *,
        alone: bool,
    ) -> list[Explanation | GradcamError]:
        network, method, context = self.network, self.method, self.context
        if not self.in_passes:
            return self.inference.infer_many(
                network,
                batch,
                selections if self._selections else self.classes,
                method,
                context.deadline,
                alone=alone,
                values=further,
            )
        return [
            explain_in_passes(
                self.inference,
                network,
                pixels,
                selection,
                method,
                context,
                values=None if further is None else further[index],
            )
            for index, (pixels, selection) in enumerate(zip(batch, selections, strict=True))
        ]


def _describe(transient: Mapping[int, Outcome], rows: int) -> str:
    """A sentence about rows that have failed with a transient error."""
    first: Any = next(iter(transient.values()))
    return f"{len(transient)} of {rows} images failed with a transient error, the first with: {first.detail}"


def _groups(indexes: Iterable[int], size: int) -> list[list[int]]:
    """Group row indexes by `index // size`. A missing index makes its group smaller."""
    return [[*group] for _, group in groupby(indexes, lambda index: index // size)]


def _collect(pending: PendingGroups, outcomes: list[Outcome | None]) -> int:
    """Wait for the oldest pending group; return its number of rows."""
    group, computed = pending.popleft()
    for index, outcome in zip(group, computed.result(), strict=True):
        outcomes[index] = outcome
    return len(group)
