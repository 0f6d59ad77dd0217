"""The other river: one shard of a backfill, from its rows to its Parquet file.

    rows --readers--> groups of fitted pictures --one pass each--> explanations --> one file, written last

While the device computes one group, the next ones are read. The groups are cut by the rows' places, and
nothing else joins their passes, so a shard that is run again leaves the same bytes.
"""

import hashlib
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from worker import artifacts, dataset, pipeline
from worker.contract import ImageRef, Job, ManifestRef, NetworkRef, Problem
from worker.dataset import Outcome, Seen, Summary
from worker.errors import (
    AttemptFenced,
    GradcamError,
    ImageFetchFailed,
    InternalError,
    JobCanceled,
    JobTimeout,
    OutputNotAllowed,
    StorageUnavailable,
    UnknownLayer,
    WeightsChecksumMismatch,
    WorkerLost,
)
from worker.gradcam.decode import Decoded, claimed, decode
from worker.gradcam.explain import Explanation, check_channels
from worker.gradcam.network import Method, Network
from worker.gradcam.picture import fit
from worker.gradcam.region import hot_box
from worker.manifest import InputRecord
from worker.outside import Outside
from worker.pipeline import Done, Journey
from worker.render import render
from worker.shard import Row, Shard
from worker.storage import Store

READERS = 8  # images of one shard that are fetched and decoded at once
AHEAD = 3  # groups that are read or computed at once
COMPUTING = 2  # of them that may be with the device: one is computed, one is there
AGAIN_S = 2.0  # before rows that failed for a moment are tried a second time
T = TypeVar("T")

SUSPECT = re.compile(r"row (\d+)(?: but (.*))?")  # the stage of a shard that runs row by row

# What ends the whole shard, whichever row meets it.
ENDS = (AttemptFenced, JobCanceled, JobTimeout, OutputNotAllowed, StorageUnavailable, UnknownLayer)


@dataclass(frozen=True)
class Picture:
    """A row's image, read: as the network takes it, and as it is drawn on, if it is."""

    image: InputRecord
    fitted: NDArray[np.uint8]
    decoded: Decoded | None


def explain(shard: Shard, outside: Outside, journey: Journey) -> Done:
    """Run one shard. Raises the errors of `worker.errors` that are not a single row's."""
    store = pipeline.admit(shard, outside)
    place = dataset.data_key(shard.key)
    there = store.find(place, journey.deadline)
    if there is not None and not shard.keep:
        return _done(store.uri(place), there, dataset.summary_of(there))
    kept, good, grid = dataset.good_rows(there) if there is not None else (None, frozenset(), None)
    with journey.at("load"):
        run = _Run(shard, outside, journey, store)
    with journey.at("explain"):
        outcomes = run.outcomes([row for row in range(len(shard.rows)) if shard.first + row not in good])
        reference = NetworkRef(
            name=shard.network, layer=run.layer(), weights_sha256=run.network.facts.weights_sha256
        )
        grid = run.grid or grid or run.learned()
    with journey.at("render"):
        data, summary = dataset.to_bytes(shard, reference, grid, outcomes, kept)
    with journey.at("upload"):
        failed = dataset.failed_key(shard.key)
        if summary.failed:
            lines = dataset.failed_lines(shard, outcomes)
            store.put_many([(failed, lines, "application/x-ndjson")], journey.deadline)
        elif shard.keep:
            store.remove(failed)
        store.put_many([(place, data, dataset.MEDIA_TYPE)], journey.deadline)
    journey.metrics["images_per_s"] = round(len(shard.rows) / max(journey.metrics["explain_s"], 1e-3), 3)
    return _done(store.uri(place), data, summary)


def _done(uri: str, data: bytes, summary: Summary) -> Done:
    counts = {"rows": float(summary.rows), "failed": float(summary.failed)}
    counts |= {f"failed_{code}": float(count) for code, count in summary.codes.items()}
    result = ManifestRef(manifest_uri=uri, manifest_sha256=hashlib.sha256(data).hexdigest())
    return Done(network=summary.network, predictions=(), result=result, warnings=(), metrics=counts)


class _Run:
    """A shard while it is computed."""

    def __init__(self, shard: Shard, outside: Outside, journey: Journey, store: Store) -> None:
        self.shard, self.outside, self.journey, self.store = shard, outside, journey, store
        self.grid: dataset.Grid | None = None
        self._layer = ""
        begun = time.monotonic()
        self.network: Network = outside.residents.get(outside.networks.find(shard.network))
        journey.deadline.forgive(time.monotonic() - begun)  # a download of weights is nobody's fault
        has = self.network.facts.weights_sha256
        if shard.weights_sha256 not in {None, has}:
            message = (
                f"The backfill was planned for weights of {shard.network} with sha256 "
                f"{shard.weights_sha256}; this worker has {has or 'some of which it knows no sha256'}."
            )
            raise WeightsChecksumMismatch(message)
        self.wish = self.network.labels.wanted(top_n=shard.target.top_n, classes=shard.target.classes)
        self.method = Method(**shard.method.model_dump())

    def layer(self) -> str:
        """The layer that was explained."""
        return self._layer or self.shard.method.layer or self.network.facts.default_layer

    def learned(self) -> dataset.Grid:
        """The grid, where no row was explained: of a grey picture."""
        grey = np.full((1, *self.network.facts.input_size, self.network.facts.channels), 128, np.uint8)
        self._explained(grey)
        return self.grid or self.network.facts.map_size

    def outcomes(self, places: Sequence[int]) -> list[Outcome | None]:
        """What became of the rows at these places; None of the others."""
        found: list[Outcome | None] = [None] * len(self.shard.rows)
        if self.journey.suspect is not None:
            self._one_by_one(places, self.journey.suspect, found)
            return found
        self._in_groups(places, found)
        brief = [place for place in places if _brief(found[place])]
        if brief:
            time.sleep(min(AGAIN_S, self.journey.deadline.left_s()))
            self._in_groups(brief, found)
            self._give_up_where_most_failed(len(places), [found[place] for place in brief])
        return found

    def _give_up_where_most_failed(self, asked: int, brief: Sequence[Outcome | None]) -> None:
        """A store that is down is no fault of its images: the whole shard is tried again, later."""
        still = [one for one in brief if isinstance(one, Problem) and _brief(one)]
        if 2 * len(still) > asked and self.journey.attempt < self.shard.max_attempts:
            message = f"{len(still)} of {asked} images cannot be had just now, as: {still[0].detail}"
            raise (
                ImageFetchFailed(message)
                if still[0].code == ImageFetchFailed.code
                else InternalError(message)
            )

    def _in_groups(self, places: Sequence[int], found: list[Outcome | None]) -> None:
        size = self.outside.residents.group(self.network)
        groups: dict[int, list[int]] = {}
        for place in places:
            groups.setdefault(place // size, []).append(place)
        with (
            ThreadPoolExecutor(READERS, thread_name_prefix="shard-read") as readers,
            ThreadPoolExecutor(COMPUTING, thread_name_prefix="shard-compute") as computing,
        ):
            under_way: deque[tuple[list[int], Future[list[Outcome]]]] = deque()
            try:
                for done, group in enumerate([*groups.values(), *[[]] * AHEAD]):
                    if group:
                        self.journey.deadline.check("explain")
                        read = [readers.submit(self._read, self.shard.rows[place]) for place in group]
                        under_way.append((group, computing.submit(self._computed, group, read)))
                    if len(under_way) > AHEAD or not group:
                        self._collect(under_way, found)
                    self.journey.report(f"explain {min(done * size, len(places))} of {len(places)}")
            except BaseException:
                readers.shutdown(wait=False, cancel_futures=True)
                computing.shutdown(wait=False, cancel_futures=True)
                raise

    def _collect(
        self, under_way: "deque[tuple[list[int], Future[list[Outcome]]]]", found: list[Outcome | None]
    ) -> None:
        if under_way:
            group, computed = under_way.popleft()
            for place, outcome in zip(group, computed.result(), strict=True):
                found[place] = outcome

    def _one_by_one(self, places: Sequence[int], suspect: str, found: list[Outcome | None]) -> None:
        """A worker died under this shard: say before each row that it is its turn, and leave out those
        whose turn it was when it happened.
        """
        said = SUSPECT.fullmatch(suspect)
        deadly = [said[1], *filter(None, (said[2] or "").split(","))] if said else []
        but = f" but {','.join(deadly)}" if deadly else ""
        for place in places:
            if str(place) in deadly:
                lost = WorkerLost("A worker ended without a word each time that this image's turn came.")
                found[place] = Problem.of(lost, stage="explain", attempt=self.journey.attempt)
                continue
            self.journey.insist(f"row {place}{but}")
            self.journey.deadline.check("explain")
            read: Future[Picture | Problem] = Future()
            read.set_result(self._read(self.shard.rows[place]))
            (found[place],) = self._computed([place], [read])

    def _read(self, row: Row) -> Picture | Problem:
        """A row's picture, or why there is none."""
        if row.problem:
            return row.problem
        return self._tried("fetch", lambda: self._picture(row))

    def _picture(self, row: Row) -> Picture:
        deadline, outside = self.journey.deadline, self.outside
        size = self.network.facts.input_size
        drawn = bool(self.shard.artifacts)
        how: dict[str, Any] = {"limits": outside.limits, "at_least": None if drawn else 2 * max(size)}
        with ExitStack() as held:
            found, bytes_held = pipeline.fetched(
                ImageRef(uri=row.uri, sha256=row.sha256), outside, deadline, held
            )
            held.enter_context(outside.rooms.pixels.taken(claimed(found.data, **how), deadline))
            decoded = decode(found.data, **how)
            image = pipeline.described(found, decoded)
            del found
            bytes_held.keep(0)
            check_channels(self.network.facts, decoded.pixels)
            return Picture(image, fit(decoded.pixels, size), decoded if drawn else None)

    def _computed(self, group: Sequence[int], read: Sequence["Future[Picture | Problem]"]) -> list[Outcome]:
        """The outcomes of a group, in its order."""
        pictures = [one.result() for one in read]
        good = [one for one in pictures if isinstance(one, Picture)]
        seen = iter(self._explained(np.stack([one.fitted for one in good])) if good else ())
        return [
            picture if isinstance(picture, Problem) else self._outcome(place, picture, next(seen))
            for place, picture in zip(group, pictures, strict=True)
        ]

    def _explained(self, pixels: NDArray[np.uint8]) -> Sequence[Explanation | GradcamError]:
        """One pass; where it fails, two halves, and so on: what one image does fails that image alone."""
        residents, half = self.outside.residents, len(pixels) // 2
        try:
            found = residents.explain_many(
                self.network, pixels, self.wish, self.method, self.journey.deadline
            )
        except ENDS:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a network may raise
            if not half:
                return [error if isinstance(error, GradcamError) else InternalError.of(error)]
            return [*self._explained(pixels[:half]), *self._explained(pixels[half:])]
        for one in found:
            if isinstance(one, Explanation):
                self.grid, self._layer = (one.heatmaps.shape[1], one.heatmaps.shape[2]), one.layer
        return found

    def _outcome(self, place: int, picture: Picture, seen: Explanation | GradcamError) -> Outcome:
        if not isinstance(seen, Explanation):
            return Problem.of(seen, stage="explain", attempt=self.journey.attempt)
        return self._tried("render", lambda: self._seen(place, picture, seen))

    def _seen(self, place: int, picture: Picture, seen: Explanation) -> Seen:
        deadline, image = self.journey.deadline, picture.image
        if self.shard.metrics:
            seen = self.outside.residents.measure(
                self.network, picture.fitted, seen, self.shard.metrics, deadline
            )
        size = image.height, image.width
        boxes = [hot_box(one, size, dataset.BOX_THRESHOLD) for one in seen.shown]
        overlays: list[str | None] = [None] * len(boxes)
        if picture.decoded:
            job = self._job(place)
            rendered = render(job, image, picture.decoded, seen, deadline)
            records = artifacts.upload(self.store, f"overlays/{job.id}", rendered, deadline)
            for piece, record in zip(rendered.pieces, records, strict=True):
                if piece.index is not None:
                    overlays[piece.index] = overlays[piece.index] or record.uri
        return Seen(image, seen, boxes, overlays)

    def _job(self, place: int) -> Job:
        """What a row would be as a job: it says how overlays are drawn, and under which id they are kept."""
        shard, row = self.shard, self.shard.rows[place]
        return Job(
            id=str(uuid.uuid5(uuid.UUID(shard.backfill), str(shard.first + place))),
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
        except ENDS:
            raise
        except GradcamError as error:
            self.journey.deadline.check(stage)
            return Problem.of(error, stage=stage, attempt=self.journey.attempt)
        except Exception as error:  # noqa: BLE001  # one image must not end the others
            return Problem.of(InternalError.of(error), stage=stage, attempt=self.journey.attempt)


def _brief(outcome: Outcome | None) -> bool:
    return isinstance(outcome, Problem) and outcome.retryable
