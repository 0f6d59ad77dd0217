import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.errors import DeviceOutOfMemory, InternalError, JobExpired, JobTimeout, UnknownLayer
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method
from gradcam_worker.inference.batcher import Batcher
from gradcam_worker.inference.request import InferenceResponse
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.testing import TinyNetwork

WAIT_S = 60.0
RED, GREEN, BLUE = (np.full((16, 16, 3), color, np.uint8) for color in np.eye(3, dtype=np.uint8) * 255)
BLACK = np.zeros((16, 16, 3), np.uint8)


@dataclass(eq=False)
class Device(TinyNetwork):
    """A tiny network on a device that can be paused, may have little memory, and fails on black images."""

    max_images: int = 1000  # images that fit into its memory
    batches: list[int] = field(default_factory=list)  # sizes, in the order of their start
    colors: list[str] = field(default_factory=list)  # of the images, in the order of their computation
    begun: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may_begin: threading.Event = field(default_factory=threading.Event)
    may_finish: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None
    before_failing: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.may_begin.set()
        self.may_finish.set()

    def begin(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        self.batches.append(len(pixels))
        self.colors += ["rgb"[image[0, 0].argmax()] for image in pixels]
        self.begun.release()
        assert self.may_begin.wait(WAIT_S)
        if self.failure:
            raise self.failure
        if len(pixels) > self.max_images:
            self.before_failing()
            message = f"No device memory for {len(pixels)} images."
            raise DeviceOutOfMemory(message)
        if not pixels.any(axis=(1, 2, 3)).all():
            message = "black"
            raise ValueError(message)
        computed = self.compute(pixels, wanted, method)

        def finish() -> Computed:
            assert self.may_finish.wait(WAIT_S)
            return computed

        return finish


@dataclass
class Jobs:
    """Job threads that submit images in a fixed order."""

    pool: ThreadPoolExecutor
    batcher: Batcher

    def submit(
        self,
        network: TinyNetwork,
        pixels: NDArray[np.uint8] = RED,
        classes: tuple[int, ...] = (-1,),
        method: Method = GRADCAM,
        *,
        bulk: bool = False,
        deadline: Deadline | None = None,
    ) -> Future[InferenceResponse]:
        """Start a job thread; return when its request is in its queue, or was taken from it."""
        submitted = threading.Event()
        limit = deadline or Deadline(WAIT_S)
        future = self.pool.submit(
            self.batcher.compute,
            network,
            pixels,
            classes,
            method,
            limit,
            bulk=bulk,
            submitted=submitted.set,
        )
        future.add_done_callback(lambda _: submitted.set())
        assert submitted.wait(WAIT_S)
        with self.batcher._changed:  # the job holds it from before `submitted` until its request waits
            return future

    def submit_many(
        self, network: TinyNetwork, pixels: NDArray[np.uint8], method: Method = GRADCAM
    ) -> Future[InferenceResponse]:
        """Start the batch of a shard while the device is busy; return when it waits."""
        before = self.waiting()
        future = self.pool.submit(self.batcher.compute_many, network, pixels, (-1,), method, Deadline(WAIT_S))
        while self.waiting() == before:
            time.sleep(0.001)
        return future

    def waiting(self) -> int:
        with self.batcher._changed:
            return sum(len(queue.waiting) for queue in self.batcher._queues.values())


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with ThreadPoolExecutor(32) as pool:
        yield Jobs(pool, Batcher(wait_s=WAIT_S))


@contextmanager
def busy(jobs: Jobs, device: Device) -> Iterator[None]:
    """Keep the device busy with another image within the block."""
    device.may_begin.clear()
    while device.begun.acquire(blocking=False):
        pass  # batches that were started before
    first = jobs.submit(device, BLUE)
    assert device.begun.acquire(timeout=WAIT_S)
    device.batches.clear()
    device.colors.clear()
    try:
        yield
    finally:
        device.may_begin.set()
    assert color_of(first) == "b"


def color_of(job: Future[InferenceResponse]) -> str:
    """The color that the network computed for the job's image."""
    response = job.result(WAIT_S)
    return "rgb"[response.computed.class_ids[response.index, 0]]


class TestWhenABatchStarts:
    def test_a_single_job_starts_at_once(self, jobs: Jobs, device: Device) -> None:
        assert color_of(jobs.submit(device)) == "r"
        assert device.batches == [1]

    def test_a_batch_waits_for_an_expected_job(self, jobs: Jobs, device: Device) -> None:
        with jobs.batcher.expecting() as submitted:
            first = jobs.submit(device, RED)
            response = jobs.batcher.compute(
                device, GREEN, (-1,), GRADCAM, Deadline(WAIT_S), submitted=submitted
            )
        assert (color_of(first), response.batch_size, device.batches) == ("r", 2, [2])

    def test_a_batch_does_not_wait_for_an_expected_job_that_ended_without_an_image(
        self, jobs: Jobs, device: Device
    ) -> None:
        with jobs.batcher.expecting():
            first = jobs.submit(device)
            assert not device.batches
        assert color_of(first) == "r"

    def test_a_batch_waits_at_most_wait_s(self, device: Device) -> None:
        batcher = Batcher(wait_s=0.001)
        with batcher.expecting():
            response = batcher.compute(device, RED, (-1,), GRADCAM, Deadline(WAIT_S))
        assert response.batch_size == 1
        assert response.waited_s >= 0.001

    def test_a_batch_waits_at_most_the_duration_of_a_batch(self, jobs: Jobs, device: Device) -> None:
        color_of(jobs.submit(device))
        with jobs.batcher.expecting():  # it would wait for `wait_s` if the duration of a batch were unknown
            assert color_of(jobs.submit(device)) == "r"

    def test_a_full_batch_starts_at_once(self, jobs: Jobs, device: Device) -> None:
        jobs.batcher.limit(device, 3)
        with jobs.batcher.expecting():
            assert [color_of(job) for job in [jobs.submit(device) for _ in range(3)]] == ["r"] * 3
        assert device.batches == [3]

    def test_images_that_arrive_while_the_device_computes_share_the_next_batch(
        self, jobs: Jobs, device: Device
    ) -> None:
        with busy(jobs, device):
            others = [jobs.submit(device, image) for image in (RED, GREEN, BLUE, GREEN)]
        assert [color_of(job) for job in others] == ["r", "g", "b", "g"], (
            "each job gets the result of its own image"
        )
        assert device.batches == [4]

    def test_no_batch_is_larger_than_its_limit(self, jobs: Jobs, device: Device) -> None:
        jobs.batcher.limit(device, 2)
        with busy(jobs, device):
            others = [jobs.submit(device) for _ in range(5)]
        assert {color_of(job) for job in others} == {"r"}
        assert device.batches == [2, 2, 1]


class CountingCondition(threading.Condition):
    """Counts how often threads are woken."""

    wakes = 0

    def notify_all(self) -> None:
        self.wakes += 1
        super().notify_all()


class TestWhenTheStartingThreadIsWoken:
    @pytest.fixture
    def changed(self, jobs: Jobs) -> CountingCondition:
        jobs.batcher._changed = condition = CountingCondition()
        return condition

    def test_by_a_request_and_not_by_a_batch_that_leaves_the_device_while_nothing_waits(
        self, jobs: Jobs, device: Device, changed: CountingCondition
    ) -> None:
        for _ in range(3):
            assert color_of(jobs.submit(device)) == "r"
        assert changed.wakes == 3

    def test_on_a_busy_device_by_a_full_batch_alone(
        self, jobs: Jobs, device: Device, changed: CountingCondition
    ) -> None:
        jobs.batcher.limit(device, 3)
        device.may_finish.clear()
        futures = [jobs.submit(device)]
        assert device.begun.acquire(timeout=WAIT_S)
        futures += [jobs.submit(device), jobs.submit(device)]
        assert changed.wakes == 1
        futures.append(jobs.submit(device))
        assert device.begun.acquire(timeout=WAIT_S)
        assert changed.wakes == 2
        device.may_finish.set()
        assert [color_of(job) for job in futures] == ["r"] * 4
        assert device.batches == [1, 3]


class TestWhatSharesABatch:
    def test_each_network_has_its_own_batches(self, jobs: Jobs, device: Device) -> None:
        other = Device()
        with busy(jobs, device):
            submitted_jobs = [jobs.submit(network) for network in (device, other, device, other)]
        assert [color_of(job) for job in submitted_jobs] == ["r"] * 4
        assert (device.batches, other.batches) == ([2], [2])

    @pytest.mark.parametrize(
        "other", [Method("layercam"), Method(layer="blocks"), Method(normalize="joint"), Method(flip=True)]
    )
    def test_each_method_has_its_own_batches(self, jobs: Jobs, device: Device, other: Method) -> None:
        with busy(jobs, device):
            submitted_jobs = [jobs.submit(device, method=method) for method in (GRADCAM, other, GRADCAM)]
        assert [color_of(job) for job in submitted_jobs] == ["r"] * 3
        assert sorted(device.batches) == [1, 2]

    def test_images_with_few_and_with_many_classes_do_not_share_a_batch(
        self, jobs: Jobs, device: Device
    ) -> None:
        with busy(jobs, device):
            submitted_jobs = [
                jobs.submit(device, classes=classes) for classes in ((0,), (0, 1, 2), (-1, -2, -3, -3), (2,))
            ]
        widths = [job.result(WAIT_S).computed.class_ids.shape[1] for job in submitted_jobs]
        assert widths == [1, 4, 4, 1]
        assert device.batches == [2, 2]


class TestPriority:
    def test_urgent_jobs_go_before_bulk_jobs_which_fill_the_rest_of_the_batch(
        self, jobs: Jobs, device: Device
    ) -> None:
        jobs.batcher.limit(device, 2)
        with busy(jobs, device):
            bulk = [jobs.submit(device, RED, bulk=True) for _ in range(3)]
            urgent = jobs.submit(device, GREEN)
        assert color_of(urgent) == "g"
        assert [color_of(job) for job in bulk] == ["r"] * 3
        assert device.colors == ["g", "r", "r", "r"]

    def test_a_queue_with_urgent_jobs_goes_before_a_queue_of_bulk_jobs(
        self, jobs: Jobs, device: Device
    ) -> None:
        with busy(jobs, device):
            bulk = jobs.submit(device, RED, method=Method("layercam"), bulk=True)
            urgent = jobs.submit(device, GREEN, method=Method("hirescam"))
        assert (color_of(bulk), color_of(urgent), device.colors) == ("r", "g", ["g", "r"])

    def test_the_batch_of_a_shard_is_not_shared(self, jobs: Jobs, device: Device) -> None:
        with busy(jobs, device):
            many = [jobs.submit_many(device, np.stack([RED, GREEN, BLUE])) for _ in range(2)]
            bulk = jobs.submit(device, GREEN, bulk=True)
        responses = [shard.result(WAIT_S) for shard in many]
        assert (color_of(bulk), sorted(device.batches)) == ("g", [1, 3, 3])
        assert [response.computed.class_ids.ravel().tolist() for response in responses] == [[0, 1, 2]] * 2

    def test_an_urgent_job_gets_the_next_batch_even_if_shards_saturate_the_device(
        self, jobs: Jobs, device: Device
    ) -> None:
        other = Device()
        other.colors, other.begun = device.colors, device.begun
        with busy(jobs, device):
            many = [jobs.submit_many(network, np.stack([RED] * 2)) for network in (device, other) * 2]
            urgent = jobs.submit(device, GREEN)
        assert (color_of(urgent), device.colors[0]) == ("g", "g")
        assert all(shard.result(WAIT_S) for shard in many)

    def test_shards_that_waited_long_get_at_most_every_second_batch_while_urgent_jobs_wait(
        self, jobs: Jobs, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.inference.request.BULK_YIELDS_FOR_S", 0)
        jobs.batcher.limit(device, 1)
        methods = [Method(name) for name in ("gradcam", "layercam", "hirescam")]
        with busy(jobs, device):
            many = [jobs.submit_many(device, RED[None], method) for method in methods for _ in range(2)]
            urgent = [jobs.submit(device, GREEN) for _ in range(4)]
        assert [color_of(job) for job in urgent] == ["g"] * 4
        assert all(shard.result(WAIT_S) for shard in many)
        order = "".join(device.colors)
        assert "rr" not in order[: order.rindex("g")]
        assert "r" in order[: order.rindex("g")], "shards that waited long are not starved"

    def test_the_batch_of_a_shard_that_fails_is_not_split(self, jobs: Jobs, device: Device) -> None:
        device.max_images = 2
        with pytest.raises(DeviceOutOfMemory):
            jobs.batcher.compute_many(device, np.stack([RED] * 3), (-1,), GRADCAM, Deadline(WAIT_S))
        assert device.batches == [3], "its caller splits it"

    def test_a_bulk_job_that_waited_long_is_as_urgent_as_others(
        self, jobs: Jobs, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.inference.request.BULK_YIELDS_FOR_S", 0)
        jobs.batcher.limit(device, 1)
        with busy(jobs, device):
            bulk, urgent = jobs.submit(device, RED, bulk=True), jobs.submit(device, GREEN)
        assert (color_of(bulk), color_of(urgent), device.colors) == ("r", "g", ["r", "g"])

    def test_a_queue_that_is_always_full_does_not_starve_others(self, jobs: Jobs, device: Device) -> None:
        jobs.batcher.limit(device, 2)
        saturated, stopped = threading.Event(), threading.Event()

        def saturate() -> None:
            while not stopped.is_set():
                jobs.batcher.compute(device, RED, (-1,), GRADCAM, Deadline(WAIT_S), bulk=True)
                if len(device.batches) > 5:
                    saturated.set()

        threads = [jobs.pool.submit(saturate) for _ in range(16)]
        assert saturated.wait(WAIT_S)
        before = len(device.batches)
        assert color_of(jobs.submit(device, GREEN, method=Method("layercam"), deadline=Deadline(20))) == "g"
        passed = len(device.batches) - before
        stopped.set()
        for thread in threads:
            thread.result(WAIT_S)
        assert passed < 50

    def test_queues_take_turns_however_many_requests_wait_in_one_of_them(
        self, jobs: Jobs, device: Device
    ) -> None:
        jobs.batcher.limit(device, 1)
        with busy(jobs, device):
            many = [jobs.submit(device, RED) for _ in range(4)]
            single = jobs.submit(device, GREEN, method=Method("layercam"))
        assert color_of(single) == "g"
        assert [color_of(job) for job in many] == ["r"] * 4
        assert device.colors.index("g") <= 1


class TestFailures:
    def test_a_batch_that_is_too_large_for_the_memory_is_halved_until_it_fits(
        self, jobs: Jobs, device: Device
    ) -> None:
        device.max_images = 2
        with busy(jobs, device):
            submitted_jobs = [jobs.submit(device, image) for image in (RED, GREEN, BLUE, RED, GREEN)]
        assert [color_of(job) for job in submitted_jobs] == ["r", "g", "b", "r", "g"]
        assert device.batches[0] == 5
        with busy(jobs, device):
            submitted_jobs = [jobs.submit(device) for _ in range(4)]
        assert [color_of(job) for job in submitted_jobs] == ["r"] * 4
        assert device.batches == [2, 2], "the limit was lowered"

    def test_a_single_image_that_does_not_fit_into_memory_fails_with_the_error_of_the_device(
        self, jobs: Jobs, device: Device
    ) -> None:
        device.max_images = 0
        with pytest.raises(DeviceOutOfMemory, match="No device memory for 1 images"):
            jobs.submit(device).result(WAIT_S)

    def test_an_image_with_an_error_fails_alone(self, jobs: Jobs, device: Device) -> None:
        with busy(jobs, device):
            good = [jobs.submit(device, image) for image in (RED, GREEN)]
            bad = jobs.submit(device, BLACK)
            good += [jobs.submit(device, image) for image in (BLUE, RED)]
        with pytest.raises(ValueError, match="black"):
            bad.result(WAIT_S)
        assert [color_of(job) for job in good] == ["r", "g", "b", "r"]
        assert color_of(jobs.submit(device)) == "r"

    def test_a_permanent_error_is_not_retried_and_each_job_gets_its_own_copy(
        self, jobs: Jobs, device: Device
    ) -> None:
        with busy(jobs, device):
            bad = [jobs.submit(device, method=Method(layer="stones")) for _ in range(3)]
        for job in bad:
            with pytest.raises(UnknownLayer, match="stones"):
                job.result(WAIT_S)
        assert len({id(job.exception()) for job in bad}) == 3
        assert device.batches == [3]

    def test_a_system_exit_in_a_network_does_not_end_the_thread_of_the_device(
        self, jobs: Jobs, device: Device
    ) -> None:
        class Mute(BaseException):
            def __str__(self) -> str:
                raise SystemExit

        failures = {"a custom layer": SystemExit("a custom layer"), "cannot be told": Mute()}
        for text, failure in failures.items():
            device.failure = failure
            with pytest.raises(InternalError, match=f"Unforeseen {type(failure).__name__}: .*{text}"):
                jobs.submit(device).result(WAIT_S)
        device.failure = None
        assert color_of(jobs.submit(device)) == "r"

    def test_no_job_waits_beyond_its_deadline_for_a_device_that_hangs(
        self, jobs: Jobs, device: Device
    ) -> None:
        device.may_finish.clear()
        submitted_jobs = [jobs.submit(device, deadline=Deadline(0.05)) for _ in range(3)]
        for job in submitted_jobs:
            with pytest.raises(JobTimeout, match="waiting for the device"):
                job.result(WAIT_S)
        device.may_finish.set()
        assert color_of(jobs.submit(device)) == "r"

    def test_when_the_thread_of_the_device_ends_all_waiting_and_later_requests_fail(
        self, jobs: Jobs, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with busy(jobs, device):
            waiting = [jobs.submit(device) for _ in range(3)]
            monkeypatch.setattr(jobs.batcher, "_take_batch", lambda: 1 / 0)
        for job in waiting:
            with pytest.raises(
                InternalError, match="thread of the device ended: Unforeseen ZeroDivisionError"
            ):
                job.result(WAIT_S)
        with pytest.raises(InternalError, match="thread of the device ended"):
            jobs.submit(device).result(WAIT_S)


class TestLeavingTheQueue:
    def test_a_request_whose_deadline_passed_is_not_computed(self, jobs: Jobs, device: Device) -> None:
        with busy(jobs, device):
            late, other = jobs.submit(device, GREEN, deadline=Deadline(0.01)), jobs.submit(device)
            with pytest.raises(JobTimeout, match=r"timeout_s of 0\.01 s \(at: waiting for the device\)"):
                late.result(WAIT_S)
        assert (color_of(other), device.colors) == ("r", ["r"])

    def test_the_halves_of_a_failed_batch_are_not_computed_if_their_jobs_expired(
        self, jobs: Jobs, device: Device
    ) -> None:
        deadline = Deadline(WAIT_S)
        with busy(jobs, device):
            submitted_jobs = [jobs.submit(device, deadline=deadline) for _ in range(4)]
            device.max_images = 3
            device.before_failing = lambda: deadline.cancel(JobExpired("The job expired."))
        assert all(isinstance(job.exception(WAIT_S), JobExpired) for job in submitted_jobs)
        assert color_of(jobs.submit(device)) == "r"
        assert device.batches == [4, 1], "neither half was computed"

    def test_a_request_whose_job_was_cancelled_is_not_computed(self, jobs: Jobs, device: Device) -> None:
        deadline = Deadline(WAIT_S)
        with busy(jobs, device):
            cancelled, other = jobs.submit(device, GREEN, deadline=deadline), jobs.submit(device)
            deadline.cancel(JobExpired("The job expired."))
        with pytest.raises(JobExpired, match="The job expired"):
            cancelled.result(WAIT_S)
        assert (color_of(other), device.colors) == ("r", ["r"])

    def test_a_request_waits_for_a_deadline_that_is_extended(self, jobs: Jobs, device: Device) -> None:
        deadline = Deadline(0.2)
        with busy(jobs, device):
            waiting_job = jobs.submit(device, deadline=deadline)
            deadline._end_s += WAIT_S
            time.sleep(0.3)
        assert color_of(waiting_job) == "r"


class TestPipelining:
    """A device that computes asynchronously: `begin` returns at once."""

    def test_the_next_full_batch_is_started_while_the_device_computes(
        self, jobs: Jobs, device: Device
    ) -> None:
        jobs.batcher.limit(device, 2)
        device.may_finish.clear()
        submitted_jobs = [jobs.submit(device, RED)]
        assert device.begun.acquire(timeout=WAIT_S)
        submitted_jobs += [jobs.submit(device, GREEN) for _ in range(5)]
        assert device.begun.acquire(timeout=WAIT_S)
        assert device.batches == [1, 2], "one is computed, one is ready, the others wait"
        device.may_finish.set()
        assert [color_of(job) for job in submitted_jobs] == ["r"] + ["g"] * 5

    def test_a_batch_that_is_not_full_keeps_filling_up(self, jobs: Jobs, device: Device) -> None:
        device.may_finish.clear()
        submitted_jobs = [jobs.submit(device, RED)]
        assert device.begun.acquire(timeout=WAIT_S)
        submitted_jobs += [jobs.submit(device, GREEN) for _ in range(3)]
        assert device.batches == [1]
        device.may_finish.set()
        assert [color_of(job) for job in submitted_jobs] == ["r", "g", "g", "g"]
        assert device.batches == [1, 3]

    def test_an_exclusive_function_gets_its_turn_on_a_busy_device(self, jobs: Jobs, device: Device) -> None:
        jobs.batcher.limit(device, 1)
        with busy(jobs, device):
            many = [jobs.submit(device) for _ in range(6)]
            exclusive = jobs.pool.submit(
                jobs.batcher.run_exclusive, lambda: len(device.batches), Deadline(WAIT_S)
            )
            while len(jobs.batcher._queues) < 2:
                time.sleep(0.001)
        assert exclusive.result(WAIT_S) <= 1, "only batches that were started before it"
        assert {color_of(job) for job in many} == {"r"}

    def test_an_exclusive_function_returns_or_raises_to_its_caller(self, jobs: Jobs) -> None:
        assert jobs.batcher.run_exclusive(lambda: 7, Deadline(1)) == 7
        with pytest.raises(ZeroDivisionError):
            jobs.batcher.run_exclusive(lambda: 1 / 0, Deadline(1))


def test_under_load_each_job_gets_its_own_result_or_its_own_error() -> None:
    """32 threads, three devices with little memory, bad images, late jobs, jobs that never submit."""
    batcher, devices = Batcher(wait_s=0.002), [Device(max_images=max_images) for max_images in (3, 5, 1000)]
    images = {"r": RED, "g": GREEN, "b": BLUE, "black": BLACK}

    def job(number: int) -> bool:
        rng = random.Random(number)  # noqa: S311  # reproducible
        color, device = rng.choice([*images]), rng.choice(devices)
        method = Method(rng.choice(["gradcam", "layercam"]))
        late = rng.random() < 0.1
        try:
            with batcher.expecting() as submitted:
                if rng.random() < 0.05:
                    return True
                response = batcher.compute(
                    device,
                    images[color],
                    (-1,) * rng.choice([1, 2, 3]),
                    method,
                    Deadline(1e-4 if late else WAIT_S),
                    bulk=rng.random() < 0.5,
                    submitted=submitted,
                )
        except JobTimeout:
            return late
        except ValueError as error:
            return color == "black" and str(error) == "black"
        return "rgb"[response.computed.class_ids[response.index, 0]] == color

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(job, range(600)))
    assert max(size for device in devices for size in device.batches) > 1
    assert (batcher._expected, batcher._at_device, batcher._retries) == (0, 0, [])
    assert not [queue for queue in batcher._queues.values() if queue.waiting]
