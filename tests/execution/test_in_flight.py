"""What a job holds of the rooms in memory, from its image's first byte to its last picture."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from gradcam_worker.errors import ImageTooLarge, JobTimeout
from gradcam_worker.execution.pipeline import JobContext, run_job
from gradcam_worker.images.fetch import Fetched, UriFetcher
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.budget import Budgets, ResourceBudget
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.testing import MemoryImageFetcher, MemoryStore, TinyNetwork, fake_services

URI = "s3://in/flag.png"
PIXELS = 48 * 32


def flag() -> bytes:
    return cv2.imencode(".png", np.full((32, 48, 3), 99, np.uint8))[1].tobytes()


FLAG = flag()


def budgets(
    max_bytes: int = 10_000, max_pixels: int = 10_000, most_bytes: int = 1000, threads: int = 1
) -> Budgets:
    return Budgets(
        ResourceBudget(max_bytes, "bytes"), ResourceBudget(max_pixels, "pixels"), most_bytes, threads
    )


def run(has: Budgets, images: Any = None, **others: Any) -> None:
    job = Job.parse(
        {"image": URI, "network": "efficientnet_lite0", "target": {"top_n": 1}, **others.pop("job", {})}
    )
    given = fake_services({URI: FLAG}, budgets=has, **others)
    given = replace(given, images=images) if images else given
    run_job(job, given, JobContext(Deadline(job.timeout_s), lambda _: None))


@dataclass
class Watched:
    """Images that note how many bytes were asked for, and what was held of the rooms meanwhile."""

    budgets: Budgets
    asked: list[tuple[int | None, int]] = field(default_factory=list)

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:
        self.asked.append((at_most, self.budgets.bytes.held))
        return MemoryImageFetcher({URI: FLAG}).fetch(image, deadline, at_most)


def test_an_image_of_usual_size_is_fetched_once_within_its_threads_share() -> None:
    has = budgets(max_bytes=4 * 500, threads=4)
    images = Watched(has)
    run(has, images)
    assert images.asked == [(500, 500)]


def test_a_larger_one_is_asked_for_again_when_there_is_room_for_the_largest() -> None:
    has = budgets(max_bytes=4 * 50, threads=4)
    images = Watched(has)
    run(has, images)
    assert images.asked == [(50, 50), (1000, 1000)]


def test_where_every_thread_may_have_the_largest_there_is_one_step_only() -> None:
    assert budgets(max_bytes=4000, threads=4, most_bytes=1000).steps == (1000,)
    assert budgets(max_bytes=2, threads=4, most_bytes=1000).steps == (1000,)


def test_one_that_is_larger_than_is_allowed_is_refused() -> None:
    has = budgets(most_bytes=len(FLAG) - 1, threads=200)
    with pytest.raises(ImageTooLarge):
        run(has)
    assert has.bytes.held == has.pixels.held == 0


def test_bytes_are_held_until_they_are_decoded_and_pixels_until_they_are_drawn() -> None:
    has, seen = budgets(), []

    class Looking(TinyNetwork):
        def compute(self, *args: Any) -> Any:
            seen.append(("computes", has.bytes.held, has.pixels.held))
            return super().compute(*args)

    class Store(MemoryStore):
        def put_many(self, *args: Any) -> Any:
            seen.append(("uploads", has.bytes.held, has.pixels.held))
            return super().put_many(*args)

    run(has, model_cache=ModelCache(lambda _: Looking()), stores=Store())
    assert ("computes", 0, PIXELS) in seen
    assert seen[-1] == ("uploads", 0, 0)
    assert has.bytes.held == has.pixels.held == 0


@pytest.mark.parametrize("data", [FLAG[:60], b"nothing of the kind"])
def test_a_job_that_fails_gives_back_what_it_held(data: bytes) -> None:
    has = budgets()
    with pytest.raises(Exception, match=r"damaged|cut off|not an image"):
        run(has, MemoryImageFetcher({URI: data}))
    assert has.bytes.held == has.pixels.held == 0


def test_a_job_waits_for_pixels_no_longer_than_its_time() -> None:
    has = budgets(max_pixels=PIXELS + 10)
    with (
        has.pixels.reserve(11, Deadline(1)),
        pytest.raises(JobTimeout, match="1,536 of 1,546 pixels in flight"),
    ):
        run(has, job={"timeout_s": 0.2})
    run(has)


def test_however_many_jobs_there_are_no_more_pixels_are_in_flight_than_are_allowed() -> None:
    has, most, failed = budgets(max_pixels=2 * PIXELS), [0], []

    class Looking(TinyNetwork):
        def compute(self, *args: Any) -> Any:
            most[0] = max(most[0], has.pixels.held)
            return super().compute(*args)

    model_cache = ModelCache(lambda _: Looking())

    def one() -> None:
        try:
            run(has, model_cache=model_cache)
        except Exception as error:  # noqa: BLE001  # shown by the test
            failed.append(error)

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert 0 < most[0] <= 2 * PIXELS
    assert has.pixels.held == 0


def test_the_real_images_are_read_as_far_as_they_are_wanted(tmp_path: Path) -> None:
    path = tmp_path / "flag.png"
    path.write_bytes(FLAG)
    settings = Settings(image_schemes=("file",), image_roots=(str(tmp_path),))
    images, image = UriFetcher(settings, S3(settings)), ImageRef(uri=path.as_uri())
    assert images.fetch(image, Deadline(5), len(FLAG)).data == FLAG
    with pytest.raises(ImageTooLarge):
        images.fetch(image, Deadline(5), len(FLAG) - 1)
