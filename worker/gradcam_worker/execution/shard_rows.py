"""One row of a shard: its image, fitted to the network, and its outcome."""

import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts import artifacts, dataset
from gradcam_worker.artifacts.dataset import Outcome, Seen
from gradcam_worker.artifacts.render import render
from gradcam_worker.errors import (
    AttemptFenced,
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
from gradcam_worker.execution.pipeline import JobContext
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.imaging.region import hot_box
from gradcam_worker.gradcam.network import Network
from gradcam_worker.images.prepare import FetchedImage, fetch_image
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.model import too_long
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import Problem
from gradcam_worker.storage.s3_errors import is_foreign_answer
from gradcam_worker.storage.stores import Store

T = TypeVar("T")

# Errors that end the whole shard, whichever row meets them.
SHARD_ERRORS = (AttemptFenced, JobCanceled, JobTimeout, OutputNotAllowed, StorageUnavailable, UnknownLayer)


@dataclass(frozen=True)
class LoadedImage:
    """A row's image, as the network takes it."""

    image: InputRecord
    fitted: NDArray[np.uint8]  # (height, width, channels) of the network


class ShardRows:
    """The rows of one shard, by their places in it. Raises `SHARD_ERRORS` only."""

    def __init__(
        self, shard: Shard, services: Services, context: JobContext, store: Store, network: Network
    ) -> None:
        """Its methods may be called by several threads at once."""
        self._shard, self._services, self._context = shard, services, context
        self._store, self._network = store, network

    def load(self, place: int) -> LoadedImage | Problem:
        """Fetch, decode and fit a row's image; or say why that failed."""
        if problem := self._shard.rows[place].problem:
            return problem
        return self._problem_or("fetch", lambda: self._load(place))

    def _load(self, place: int) -> LoadedImage:
        row = self._shard.rows[place]
        if not row.uri:
            message = "This row names no image."
            raise InvalidRow(message)
        if why := too_long(row.uri):
            message = f"{why[0].upper()}{why[1:]}."
            raise InvalidRow(message)
        reference = ImageRef(uri=row.uri, sha256=row.sha256)
        with self._open(reference) as fetched, fetched.decode() as image:
            return LoadedImage(image.record, image.fit(self._network.facts))

    def _open(self, image: ImageRef) -> AbstractContextManager[FetchedImage]:
        return fetch_image(image, self._services, self._context.deadline)

    def outcome(self, place: int, loaded: LoadedImage, seen: Explanation | GradcamError) -> Outcome:
        """What the dataset says of a row that was computed; its overlays are drawn and uploaded here."""
        if not isinstance(seen, Explanation):
            return Problem.of(seen, stage="explain", attempt=self._context.attempt)
        return self._problem_or("render", lambda: self._explained_row(place, loaded, seen))

    def _explained_row(self, place: int, loaded: LoadedImage, seen: Explanation) -> Seen:
        deadline, image = self._context.deadline, loaded.image
        if self._shard.metrics:
            seen = self._services.model_cache.measure(
                self._network, loaded.fitted, seen, self._shard.metrics, deadline, bulk=True
            )
        size = image.height, image.width
        boxes = [hot_box(one, size, dataset.BOX_THRESHOLD) for one in seen.shown]
        overlays: list[str | None] = [None] * len(boxes)
        if self._shard.artifacts:  # fetched again: all photos of a group might not fit
            reference = ImageRef(uri=self._shard.rows[place].uri, sha256=image.sha256)
            with self._open(reference) as fetched, fetched.decode() as again:
                rendered = render(
                    self._shard.artifacts,
                    again,
                    seen,
                    deadline,
                    job_id=self.row_id(place),
                    method=self._shard.method,
                )
            records = artifacts.upload(self._store, f"overlays/{self.row_id(place)}", rendered, deadline)
            for piece, record in zip(rendered.pieces, records, strict=True):
                if piece.index is not None:
                    overlays[piece.index] = overlays[piece.index] or record.uri
        return Seen(image, seen, boxes, overlays)

    def row_id(self, place: int) -> str:
        """The id of a row: its overlays are stored under it, as a job's are under the job's."""
        name = f"gradcam:{self._shard.backfill}:{self._shard.first + place}"
        return str(uuid.uuid5(uuid.NAMESPACE_URL, name))

    def _problem_or(self, stage: str, step: Callable[[], T]) -> T | Problem:
        """What `step` returns, or its error as the problem of the row. `SHARD_ERRORS` are raised."""
        try:
            return step()
        except SHARD_ERRORS as error:
            # A proxy may refuse one address and not the others.
            if stage != "fetch" or not is_foreign_answer(error.__cause__):
                raise
            problem = ImageFetchFailed(str(error))
            return Problem.of(problem, stage=stage, attempt=self._context.attempt)
        except GradcamError as error:
            self._context.deadline.check(stage)
            return Problem.of(error, stage=stage, attempt=self._context.attempt)
        except BaseException as error:  # noqa: BLE001  # an error of one image must not end the others
            return Problem.of(InternalError.of(error), stage=stage, attempt=self._context.attempt)
