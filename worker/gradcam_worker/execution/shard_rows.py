"""One row of a shard: its image, read and fitted to the network, and what is written down of it."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from gradcam_worker.execution import pipeline
from gradcam_worker.execution.pipeline import JobContext
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.decoding.decode import Decoded, claimed, decode
from gradcam_worker.gradcam.explain import Explanation, check_channels
from gradcam_worker.gradcam.imaging.overlay import fit
from gradcam_worker.gradcam.imaging.region import hot_box
from gradcam_worker.gradcam.network import Network
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.model import too_long
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import Problem
from gradcam_worker.storage.s3_errors import foreign
from gradcam_worker.storage.stores import Store

T = TypeVar("T")

# What ends the whole shard, whichever row meets it.
ENDS = (AttemptFenced, JobCanceled, JobTimeout, OutputNotAllowed, StorageUnavailable, UnknownLayer)


@dataclass(frozen=True)
class LoadedImage:
    """A row's image, read, and fitted to the network."""

    image: InputRecord
    fitted: NDArray[np.uint8]  # (height, width, channels) of the network


class ShardRows:
    """The rows of one shard, by their places in it. Raises only what ends the whole shard: see `ENDS`."""

    def __init__(
        self, shard: Shard, services: Services, context: JobContext, store: Store, network: Network
    ) -> None:
        """Several threads may read, and write down, at once."""
        self._shard, self._outside, self._journey = shard, services, context
        self._store, self._network = store, network

    def read(self, place: int) -> LoadedImage | Problem:
        """A row's picture, or why there is none."""
        if problem := self._shard.rows[place].problem:
            return problem
        return self._tried("fetch", lambda: self._picture(place))

    def _picture(self, place: int) -> LoadedImage:
        row = self._shard.rows[place]
        if not row.uri:
            message = "This row names no image."
            raise InvalidRow(message)
        if why := too_long(row.uri):
            message = f"{why[0].upper()}{why[1:]}."
            raise InvalidRow(message)
        size = self._network.facts.input_size
        with self._opened(ImageRef(uri=row.uri, sha256=row.sha256)) as (image, decoded):
            check_channels(self._network.facts, decoded.pixels)
            return LoadedImage(image, fit(decoded.pixels, size))

    @contextmanager
    def _opened(self, image: ImageRef) -> Iterator[tuple[InputRecord, Decoded]]:
        """An image, for as long as there is room in memory held for it."""
        deadline, services = self._journey.deadline, self._outside
        with ExitStack() as held:
            found, bytes_held = pipeline.fetched(image, services, deadline, held)
            held.enter_context(
                services.budgets.pixels.reserve(claimed(found.data, services.limits), deadline)
            )
            decoded = decode(found.data, services.limits)
            described = pipeline.described(found, decoded)
            del found
            bytes_held.shrink_to(0)
            yield described, decoded

    def outcome(self, place: int, picture: LoadedImage, seen: Explanation | GradcamError) -> Outcome:
        """What is written down of a row that was computed."""
        if not isinstance(seen, Explanation):
            return Problem.of(seen, stage="explain", attempt=self._journey.attempt)
        return self._tried("render", lambda: self._seen(place, picture, seen))

    def _seen(self, place: int, picture: LoadedImage, seen: Explanation) -> Seen:
        deadline, image = self._journey.deadline, picture.image
        if self._shard.metrics:
            seen = self._outside.model_cache.measure(
                self._network, picture.fitted, seen, self._shard.metrics, deadline, bulk=True
            )
        size = image.height, image.width
        boxes = [hot_box(one, size, dataset.BOX_THRESHOLD) for one in seen.shown]
        overlays: list[str | None] = [None] * len(boxes)
        if self._shard.artifacts:  # read again: all of a group's photos at full size might not fit
            job = self._job(place)
            with self._opened(ImageRef(uri=job.image.uri, sha256=image.sha256)) as (_, decoded):
                rendered = render(job, image, decoded, seen, deadline)
            records = artifacts.upload(self._store, f"overlays/{job.id}", rendered, deadline)
            for piece, record in zip(rendered.pieces, records, strict=True):
                if piece.index is not None:
                    overlays[piece.index] = overlays[piece.index] or record.uri
        return Seen(image, seen, boxes, overlays)

    def _job(self, place: int) -> Job:
        """What a row would be as a job: it says how overlays are drawn, and under which id they are kept."""
        shard, row = self._shard, self._shard.rows[place]
        return Job(
            id=str(uuid.uuid5(uuid.NAMESPACE_URL, f"gradcam:{shard.backfill}:{shard.first + place}")),
            image=ImageRef(uri=row.uri),
            network=shard.network,
            target=shard.target,
            method=shard.method,
            artifacts=shard.artifacts,
            metadata={},
        )

    def _tried(self, stage: str, step: Callable[[], T]) -> T | Problem:
        """What a step gives, or the problem of its row; what ends the shard is raised."""
        try:
            return step()
        except ENDS as error:
            # A proxy that refuses one address is no reason to give up the others.
            if stage != "fetch" or not foreign(error.__cause__):
                raise
            problem = ImageFetchFailed(str(error))
            return Problem.of(problem, stage=stage, attempt=self._journey.attempt)
        except GradcamError as error:
            self._journey.deadline.check(stage)
            return Problem.of(error, stage=stage, attempt=self._journey.attempt)
        except BaseException as error:  # noqa: BLE001  # one image must not end the others
            return Problem.of(InternalError.of(error), stage=stage, attempt=self._journey.attempt)
