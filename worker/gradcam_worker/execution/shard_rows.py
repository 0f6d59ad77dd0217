"""Loads the image of one row of a shard, and turns its explanation into a row of the dataset."""

import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts import artifacts, dataset
from gradcam_worker.artifacts.dataset import ExplainedRow, Outcome
from gradcam_worker.artifacts.render import Source, render
from gradcam_worker.errors import (
    AttemptFenced,
    EngineUnavailable,
    GradcamError,
    ImageFetchFailed,
    InternalError,
    InvalidRow,
    JobCanceled,
    JobTimeout,
    OutputNotAllowed,
    StorageUnavailable,
    UnknownLayer,
)
from gradcam_worker.execution.annotations import CLASS_UNKNOWN, FoundMask, Labels, find_mask, locate
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.explain import Explanation, values_of
from gradcam_worker.gradcam.imaging.region import hot_box
from gradcam_worker.gradcam.network import Classifier, InputPixels
from gradcam_worker.gradcam.sizing import Placement
from gradcam_worker.images.masks import Mask, read_mask
from gradcam_worker.images.prepare import FetchedImage, fetch_image
from gradcam_worker.schemas.annotations import AnnotatedMask
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.model import describe_excess_length
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import Problem
from gradcam_worker.storage.store import Store

T = TypeVar("T")

# Errors that end the whole shard, whichever row raises them.
SHARD_ERRORS = (
    AttemptFenced,
    EngineUnavailable,
    JobCanceled,
    JobTimeout,
    OutputNotAllowed,
    StorageUnavailable,
    UnknownLayer,
)


NO_MASK = FoundMask()


@dataclass(frozen=True)
class LoadedImage:
    """The image of a row, at the input size of the network."""

    image: InputRecord
    pixels: InputPixels  # (height, width, channels)
    placement: Placement | None = None  # of the pixels in the image
    values: NDArray[np.float32] | None = None  # of further inputs of the network
    mask: FoundMask = NO_MASK  # of the object in the image


class ShardRows:
    """The rows of one shard, by their index in it.

    All methods are thread-safe. They raise `SHARD_ERRORS` only; any other error becomes the Problem of its
    row.
    """

    def __init__(
        self, shard: Shard, services: Services, context: JobContext, store: Store, network: Classifier
    ) -> None:
        self._shard, self._services, self._context = shard, services, context
        self._store, self._network = store, network
        self._digests = shard.row_digests()
        self.labels = Labels(network.labels)

    def own_classes(self, index: int) -> tuple[int, ...]:
        """The ids of classes that a row asks for itself, those that the network has.

        One that others are explained against is left out, as it is where all classes are ranked.
        """
        ids, _ = self.labels.find(self._shard.rows[index].classes or ())
        against, _ = self.labels.find(self._shard.target.against or ())
        return tuple(class_id for class_id in ids if class_id not in against)

    def load(self, index: int) -> LoadedImage | Problem:
        """Fetch, decode and fit the image of a row; on an error return the Problem."""
        if problem := self._shard.rows[index].problem:
            return problem
        return self._problem_or("fetch", lambda: self._load(index))

    def _load(self, index: int) -> LoadedImage:
        row = self._shard.rows[index]
        if not row.uri:
            message = "This row names no image."
            raise InvalidRow(message)
        if why := describe_excess_length(row.uri):
            message = f"{why[0].upper()}{why[1:]}."
            raise InvalidRow(message)
        values = values_of(self._network.facts, {**self._shard.inputs, **(row.inputs or {})})
        # Before the image, whose memory is reserved while it is decoded: nobody waits for two reservations.
        mask = find_mask(row.annotations, self._read_mask)
        reference = ImageRef(uri=row.uri, sha256=row.sha256)
        facts = self._network.facts
        with self._open(reference) as fetched, fetched.decode(fast_jpeg=facts.sizing.fast_jpeg) as image:
            return LoadedImage(image.record, image.fit(facts), image.placement(facts), values, mask)

    def _read_mask(self, mask: AnnotatedMask) -> Mask:
        return read_mask(mask, self._services, self._context.deadline)

    def _open(self, image: ImageRef) -> AbstractContextManager[FetchedImage]:
        return fetch_image(image, self._services, self._context.deadline)

    def outcome(self, index: int, loaded: LoadedImage, result: Explanation | GradcamError) -> Outcome:
        """Build the row of the dataset, and draw and upload the overlays of the row.

        Args:
            index: Index of the row in the shard.
            loaded: Its image.
            result: Its explanation, or why there is none.

        Returns:
            The explained row, or the Problem.
        """
        if not isinstance(result, Explanation):
            return Problem.of(result, stage="explain", attempt=self._context.attempt)
        return self._problem_or("render", lambda: self._explained_row(index, loaded, result))

    def _explained_row(self, index: int, loaded: LoadedImage, explanation: Explanation) -> ExplainedRow:
        deadline, image = self._context.deadline, loaded.image
        if loaded.placement:
            explanation = replace(explanation, placement=loaded.placement)
        if self._shard.metrics:
            explanation = self._services.inference.measure(
                self._network,
                loaded.pixels,
                explanation,
                self._shard.metrics,
                deadline,
                bulk=True,
                values=loaded.values,
            )
        size = image.height, image.width
        row = self._shard.rows[index]
        located = locate(explanation, size, row.annotations, loaded.mask, self.labels)
        _, unknown = self.labels.find(row.classes or ())
        warnings = *located.warnings, *(one.model_copy(update={"code": CLASS_UNKNOWN}) for one in unknown)
        boxes = [
            hot_box(heatmap, size, dataset.BOX_THRESHOLD, explanation.placement)
            for heatmap in explanation.shown
        ]
        overlays: list[str | None] = [None] * len(boxes)
        if self._shard.artifacts:  # fetched again: the full-size images of a group may not fit into memory
            reference = ImageRef(uri=self._shard.rows[index].uri, sha256=image.sha256)
            with self._open(reference) as fetched, fetched.decode() as decoded:
                rendered = render(
                    self._shard.artifacts,
                    decoded,
                    explanation,
                    deadline,
                    source=Source(self.row_id(index), self._shard.method, self._context.created_at),
                )
            folder = f"overlays/{self.row_id(index)}"
            self._store.put_many([artifacts.object_of(folder, one) for one in rendered.artifacts], deadline)
            records = artifacts.describe(self._store, folder, rendered)
            for artifact, record in zip(rendered.artifacts, records, strict=True):
                if artifact.class_index is not None:
                    overlays[artifact.class_index] = overlays[artifact.class_index] or record.uri
        return ExplainedRow(
            image,
            replace(explanation, ranks=None, features=None),  # ranks are as many as the network has classes
            boxes,
            overlays,
            located.localizations,
            located.truth,
            explanation.features,
            warnings,
        )

    def row_id(self, index: int) -> str:
        """The id of a row. It names the folder of the row's overlays, also after the row has moved."""
        name = f"gradcam:{self._shard.backfill}:{self._digests[index] or self._shard.first + index}"
        return str(uuid.uuid5(uuid.NAMESPACE_URL, name))

    def _problem_or(self, stage: str, step: Callable[[], T]) -> T | Problem:
        """Return what `step` returns, or its error as the row's Problem. Raises `SHARD_ERRORS`."""
        try:
            return step()
        except SHARD_ERRORS as error:
            from gradcam_worker.storage.s3_errors import is_foreign_answer  # not where jobs are eager

            # A proxy may refuse a single URI: that is an error of its row.
            if stage != "fetch" or not is_foreign_answer(error.__cause__):
                raise
            problem = ImageFetchFailed(str(error))
            return Problem.of(problem, stage=stage, attempt=self._context.attempt)
        except GradcamError as error:
            self._context.deadline.check(stage)
            return Problem.of(error, stage=stage, attempt=self._context.attempt)
        except BaseException as error:  # noqa: BLE001  # an error of one image must not fail the others
            return Problem.of(InternalError.of(error), stage=stage, attempt=self._context.attempt)
