"""The memory that a job reserves for its image, from the first byte to the last artifact."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from gradcam_worker.errors import ImageTooLarge, JobTimeout
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.images.fetch import FetchedBytes, UriFetcher
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


def make_budgets(
    max_bytes: int = 10_000, max_pixels: int = 10_000, max_image_bytes: int = 1000, threads: int = 1
) -> Budgets:
    return Budgets(
        ResourceBudget(max_bytes, "bytes"), ResourceBudget(max_pixels, "pixels"), max_image_bytes, threads
    )


def run(budgets: Budgets, images: Any = None, **others: Any) -> None:
    job = Job.parse(
        {"image": URI, "network": "efficientnet_lite0", "target": {"top_n": 1}, **others.pop("job", {})}
    )
    services = fake_services({URI: FLAG}, budgets=budgets, **others)
    services = replace(services, images=images) if images else services
    run_job(job, services, JobContext(Deadline(job.timeout_s), lambda _: None))


@dataclass
class RecordingFetcher:
    """Records `max_bytes` and the reserved bytes of each fetch."""

    budgets: Budgets
    fetches: list[tuple[int | None, int]] = field(default_factory=list)

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:
        self.fetches.append((max_bytes, self.budgets.bytes.held))
        return MemoryImageFetcher({URI: FLAG}).fetch(image, deadline, max_bytes)


def test_an_image_of_usual_size_is_fetched_once_within_the_share_of_its_thread() -> None:
    budgets = make_budgets(max_bytes=4 * 500, threads=4)
    images = RecordingFetcher(budgets)
    run(budgets, images)
    assert images.fetches == [(500, 500)]


def test_a_larger_image_is_fetched_again_when_there_is_room_for_the_largest() -> None:
    budgets = make_budgets(max_bytes=4 * 50, threads=4)
    images = RecordingFetcher(budgets)
    run(budgets, images)
    assert images.fetches == [(50, 50), (1000, 1000)]


def test_if_every_thread_has_room_for_the_largest_image_there_is_one_step_only() -> None:
    assert make_budgets(max_bytes=4000, threads=4, max_image_bytes=1000).reservation_steps == (1000,)
    assert make_budgets(max_bytes=2, threads=4, max_image_bytes=1000).reservation_steps == (1000,)


def test_an_image_that_is_larger_than_allowed_is_refused() -> None:
    budgets = make_budgets(max_image_bytes=len(FLAG) - 1, threads=200)
    with pytest.raises(ImageTooLarge):
        run(budgets)
    assert budgets.bytes.held == budgets.pixels.held == 0


def test_bytes_are_reserved_until_they_are_decoded_and_pixels_until_artifacts_are_drawn() -> None:
    budgets, held = make_budgets(), []

    class RecordingNetwork(TinyNetwork):
        def compute(self, *args: Any) -> Any:
            held.append(("computes", budgets.bytes.held, budgets.pixels.held))
            return super().compute(*args)

    class Store(MemoryStore):
        def put_many(self, *args: Any) -> Any:
            held.append(("uploads", budgets.bytes.held, budgets.pixels.held))
            return super().put_many(*args)

    run(budgets, inference=ModelCache(lambda _: RecordingNetwork()), stores=Store())
    assert ("computes", 0, PIXELS) in held
    assert held[-1] == ("uploads", 0, 0)
    assert budgets.bytes.held == budgets.pixels.held == 0


@pytest.mark.parametrize("data", [FLAG[:60], b"nothing of the kind"])
def test_a_job_that_fails_releases_its_reservations(data: bytes) -> None:
    budgets = make_budgets()
    with pytest.raises(Exception, match=r"damaged|cut off|not an image"):
        run(budgets, MemoryImageFetcher({URI: data}))
    assert budgets.bytes.held == budgets.pixels.held == 0


def test_a_job_waits_for_pixels_until_its_deadline_only() -> None:
    budgets = make_budgets(max_pixels=PIXELS + 10)
    with (
        budgets.pixels.reserve(11, Deadline(1)),
        pytest.raises(JobTimeout, match="1,536 of 1,546 pixels in flight"),
    ):
        run(budgets, job={"timeout_s": 0.2})
    run(budgets)


def test_however_many_jobs_run_no_more_pixels_are_in_memory_than_allowed() -> None:
    budgets, max_held, errors = make_budgets(max_pixels=2 * PIXELS), [0], []

    class RecordingNetwork(TinyNetwork):
        def compute(self, *args: Any) -> Any:
            max_held[0] = max(max_held[0], budgets.pixels.held)
            return super().compute(*args)

    model_cache = ModelCache(lambda _: RecordingNetwork())

    def run_job_thread() -> None:
        try:
            run(budgets, inference=model_cache)
        except Exception as error:  # noqa: BLE001  # shown by the test
            errors.append(error)

    threads = [threading.Thread(target=run_job_thread) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert 0 < max_held[0] <= 2 * PIXELS
    assert budgets.pixels.held == 0


def test_a_file_larger_than_max_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flag.png"
    path.write_bytes(FLAG)
    settings = Settings(image_schemes=("file",), image_roots=(str(tmp_path),))
    images, image = UriFetcher(settings, S3(settings)), ImageRef(uri=path.as_uri())
    assert images.fetch(image, Deadline(5), len(FLAG)).data == FLAG
    with pytest.raises(ImageTooLarge):
        images.fetch(image, Deadline(5), len(FLAG) - 1)
