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

PLENTY_S = 60.0
RED, GREEN, BLUE = (np.full((16, 16, 3), color, np.uint8) for color in np.eye(3, dtype=np.uint8) * 255)
BLACK = np.zeros((16, 16, 3), np.uint8)


@dataclass(eq=False)
class Device(TinyNetwork):
    """A tiny network on a device that can be held up, has little memory, and cannot stand black."""

    room: int = 1000  # images that fit
    batches: list[int] = field(default_factory=list)  # sizes, as they were begun
    colors: list[str] = field(default_factory=list)  # of the images, in the order they were computed
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
        assert self.may_begin.wait(PLENTY_S)
        if self.failure:
            raise self.failure
        if len(pixels) > self.room:
            self.before_failing()
            message = f"No device memory for {len(pixels)} images."
            raise DeviceOutOfMemory(message)
        if not pixels.any(axis=(1, 2, 3)).all():
            message = "black"
            raise ValueError(message)
        computed = self.compute(pixels, wanted, method)

        def finish() -> Computed:
            assert self.may_finish.wait(PLENTY_S)
            return computed

        return finish


@dataclass
class Jobs:
    """Job threads that hand in images, in an order that is kept."""

    pool: ThreadPoolExecutor
    batcher: Batcher

    def ask(
        self,
        network: TinyNetwork,
        pixels: NDArray[np.uint8] = RED,
        wish: tuple[int, ...] = (-1,),
        method: Method = GRADCAM,
        *,
        bulk: bool = False,
        deadline: Deadline | None = None,
    ) -> Future[InferenceResponse]:
        """Start a job thread; return when its request is waiting, or has been taken."""
        handed_in = threading.Event()
        limit = deadline or Deadline(PLENTY_S)
        future = self.pool.submit(
            self.batcher.compute,
            network,
            pixels,
            wish,
            method,
            limit,
            bulk=bulk,
            submitted=handed_in.set,
        )
        future.add_done_callback(lambda _: handed_in.set())
        assert handed_in.wait(PLENTY_S)
        with self.batcher._changed:  # held from before `submitted` until the request waits
            return future

    def ask_many(
        self, network: TinyNetwork, pixels: NDArray[np.uint8], method: Method = GRADCAM
    ) -> Future[InferenceResponse]:
        """Start a shard's pass while the device is busy; return when it waits."""
        before = self.waiting()
        future = self.pool.submit(
            self.batcher.compute_many, network, pixels, (-1,), method, Deadline(PLENTY_S)
        )
        while self.waiting() == before:
            time.sleep(0.001)
        return future

    def waiting(self) -> int:
        with self.batcher._changed:
            return sum(len(group.waiting) for group in self.batcher._queues.values())


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with ThreadPoolExecutor(32) as pool:
        yield Jobs(pool, Batcher(wait_s=PLENTY_S))


@contextmanager
def busy(jobs: Jobs, device: Device) -> Iterator[None]:
    """The device computes something else meanwhile."""
    device.may_begin.clear()
    while device.begun.acquire(blocking=False):
        pass  # what was begun before
    first = jobs.ask(device, BLUE)
    assert device.begun.acquire(timeout=PLENTY_S)
    device.batches.clear()
    device.colors.clear()
    try:
        yield
    finally:
        device.may_begin.set()
    assert seen(first) == "b"


def seen(job: Future[InferenceResponse]) -> str:
    """The color that the network saw in a job's own image."""
    answer = job.result(PLENTY_S)
    return "rgb"[answer.computed.class_ids[answer.index, 0]]


class TestWhenABatchCloses:
    def test_a_lone_job_waits_for_nobody(self, jobs: Jobs, device: Device) -> None:
        assert seen(jobs.ask(device)) == "r"
        assert device.batches == [1]

    def test_a_batch_waits_for_a_job_that_is_on_its_way(self, jobs: Jobs, device: Device) -> None:
        with jobs.batcher.expecting() as submitted:
            first = jobs.ask(device, RED)
            answer = jobs.batcher.compute(
                device, GREEN, (-1,), GRADCAM, Deadline(PLENTY_S), submitted=submitted
            )
        assert (seen(first), answer.batch_size, device.batches) == ("r", 2, [2])

    def test_a_job_that_never_hands_in_is_not_waited_for_once_it_has_ended(
        self, jobs: Jobs, device: Device
    ) -> None:
        with jobs.batcher.expecting():
            first = jobs.ask(device)
            assert not device.batches
        assert seen(first) == "r"

    def test_it_waits_no_longer_than_it_may(self, device: Device) -> None:
        batcher = Batcher(wait_s=0.001)
        with batcher.expecting():
            answer = batcher.compute(device, RED, (-1,), GRADCAM, Deadline(PLENTY_S))
        assert answer.batch_size == 1
        assert answer.waited_s >= 0.001

    def test_it_waits_no_longer_than_a_pass_takes(self, jobs: Jobs, device: Device) -> None:
        seen(jobs.ask(device))
        with jobs.batcher.expecting():  # for a minute, if nothing were known of how long a pass takes
            assert seen(jobs.ask(device)) == "r"

    def test_it_waits_for_nobody_once_it_is_full(self, jobs: Jobs, device: Device) -> None:
        jobs.batcher.limit(device, 3)
        with jobs.batcher.expecting():
            assert [seen(job) for job in [jobs.ask(device) for _ in range(3)]] == ["r"] * 3
        assert device.batches == [3]

    def test_what_comes_while_the_device_computes_shares_the_next_batch(
        self, jobs: Jobs, device: Device
    ) -> None:
        with busy(jobs, device):
            others = [jobs.ask(device, image) for image in (RED, GREEN, BLUE, GREEN)]
        assert [seen(job) for job in others] == ["r", "g", "b", "g"], "each has the answer to its own image"
        assert device.batches == [4]

    def test_no_batch_is_larger_than_it_may_be(self, jobs: Jobs, device: Device) -> None:
        jobs.batcher.limit(device, 2)
        with busy(jobs, device):
            others = [jobs.ask(device) for _ in range(5)]
        assert {seen(job) for job in others} == {"r"}
        assert device.batches == [2, 2, 1]


class TestWhatSharesABatch:
    def test_another_network_has_a_batch_of_its_own(self, jobs: Jobs, device: Device) -> None:
        other = Device()
        with busy(jobs, device):
            asked = [jobs.ask(which) for which in (device, other, device, other)]
        assert [seen(job) for job in asked] == ["r"] * 4
        assert (device.batches, other.batches) == ([2], [2])

    @pytest.mark.parametrize(
        "other", [Method("layercam"), Method(layer="blocks"), Method(normalize="joint"), Method(flip=True)]
    )
    def test_another_method_has_a_batch_of_its_own(self, jobs: Jobs, device: Device, other: Method) -> None:
        with busy(jobs, device):
            asked = [jobs.ask(device, method=method) for method in (GRADCAM, other, GRADCAM)]
        assert [seen(job) for job in asked] == ["r"] * 3
        assert sorted(device.batches) == [1, 2]

    def test_wishes_of_unlike_length_do_not_make_each_other_dear(self, jobs: Jobs, device: Device) -> None:
        with busy(jobs, device):
            asked = [jobs.ask(device, wish=wish) for wish in ((0,), (0, 1, 2), (-1, -2, -3, -3), (2,))]
        widths = [job.result(PLENTY_S).computed.class_ids.shape[1] for job in asked]
        assert widths == [1, 4, 4, 1]
        assert device.batches == [2, 2]


class TestWhoComesFirst:
    def test_who_is_urgent_goes_before_bulk_and_bulk_fills_what_is_left(
        self, jobs: Jobs, device: Device
    ) -> None:
        jobs.batcher.limit(device, 2)
        with busy(jobs, device):
            bulk = [jobs.ask(device, RED, bulk=True) for _ in range(3)]
            urgent = jobs.ask(device, GREEN)
        assert seen(urgent) == "g"
        assert [seen(job) for job in bulk] == ["r"] * 3
        assert device.colors == ["g", "r", "r", "r"]

    def test_a_group_with_urgent_jobs_goes_before_a_group_of_bulk(self, jobs: Jobs, device: Device) -> None:
        with busy(jobs, device):
            bulk = jobs.ask(device, RED, method=Method("layercam"), bulk=True)
            urgent = jobs.ask(device, GREEN, method=Method("hirescam"))
        assert (seen(bulk), seen(urgent), device.colors) == ("r", "g", ["g", "r"])

    def test_a_pass_of_many_is_joined_by_nothing_and_joins_nothing(self, jobs: Jobs, device: Device) -> None:
        with busy(jobs, device):
            many = [jobs.ask_many(device, np.stack([RED, GREEN, BLUE])) for _ in range(2)]
            bulk = jobs.ask(device, GREEN, bulk=True)
        found = [one.result(PLENTY_S) for one in many]
        assert (seen(bulk), sorted(device.batches)) == ("g", [1, 3, 3])
        assert [one.computed.class_ids.ravel().tolist() for one in found] == [[0, 1, 2]] * 2

    def test_whoever_is_urgent_gets_the_next_pass_though_shards_saturate_the_device(
        self, jobs: Jobs, device: Device
    ) -> None:
        other = Device()
        other.colors, other.begun = device.colors, device.begun
        with busy(jobs, device):
            many = [jobs.ask_many(one, np.stack([RED] * 2)) for one in (device, other) * 2]
            urgent = jobs.ask(device, GREEN)
        assert (seen(urgent), device.colors[0]) == ("g", "g")
        assert all(one.result(PLENTY_S) for one in many)

    def test_shards_that_have_waited_long_get_turns_but_never_two_before_somebody_urgent(
        self, jobs: Jobs, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.inference.request.YIELDS_FOR_S", 0)
        jobs.batcher.limit(device, 1)
        ways = [Method(name) for name in ("gradcam", "layercam", "hirescam")]
        with busy(jobs, device):
            many = [jobs.ask_many(device, RED[None], way) for way in ways for _ in range(2)]
            urgent = [jobs.ask(device, GREEN) for _ in range(4)]
        assert [seen(one) for one in urgent] == ["g"] * 4
        assert all(one.result(PLENTY_S) for one in many)
        order = "".join(device.colors)
        assert "rr" not in order[: order.rindex("g")]
        assert "r" in order[: order.rindex("g")], "who has waited long has turns"

    def test_a_pass_of_many_that_fails_is_not_taken_apart(self, jobs: Jobs, device: Device) -> None:
        device.room = 2
        with pytest.raises(DeviceOutOfMemory):
            jobs.batcher.compute_many(device, np.stack([RED] * 3), (-1,), GRADCAM, Deadline(PLENTY_S))
        assert device.batches == [3], "whoever asked for it knows how"

    def test_bulk_that_has_waited_long_waits_no_longer_behind_others(
        self, jobs: Jobs, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.inference.request.YIELDS_FOR_S", 0)
        jobs.batcher.limit(device, 1)
        with busy(jobs, device):
            bulk, urgent = jobs.ask(device, RED, bulk=True), jobs.ask(device, GREEN)
        assert (seen(bulk), seen(urgent), device.colors) == ("r", "g", ["r", "g"])

    def test_nobody_is_overtaken_for_ever_by_a_group_that_is_always_full(
        self, jobs: Jobs, device: Device
    ) -> None:
        jobs.batcher.limit(device, 2)
        asked, over = threading.Event(), threading.Event()

        def crowd() -> None:
            while not over.is_set():
                jobs.batcher.compute(device, RED, (-1,), GRADCAM, Deadline(PLENTY_S), bulk=True)
                if len(device.batches) > 5:
                    asked.set()

        crowds = [jobs.pool.submit(crowd) for _ in range(16)]
        assert asked.wait(PLENTY_S)
        before = len(device.batches)
        assert seen(jobs.ask(device, GREEN, method=Method("layercam"), deadline=Deadline(20))) == "g"
        passed = len(device.batches) - before
        over.set()
        for one in crowds:
            one.result(PLENTY_S)
        assert passed < 50

    def test_networks_take_turns_however_many_wait_for_one_of_them(self, jobs: Jobs, device: Device) -> None:
        jobs.batcher.limit(device, 1)
        with busy(jobs, device):
            many = [jobs.ask(device, RED) for _ in range(4)]
            one = jobs.ask(device, GREEN, method=Method("layercam"))
        assert seen(one) == "g"
        assert [seen(job) for job in many] == ["r"] * 4
        assert device.colors.index("g") <= 1


class TestFailures:
    def test_a_batch_that_runs_out_of_memory_is_halved_until_it_fits_and_nobody_fails(
        self, jobs: Jobs, device: Device
    ) -> None:
        device.room = 2
        with busy(jobs, device):
            asked = [jobs.ask(device, image) for image in (RED, GREEN, BLUE, RED, GREEN)]
        assert [seen(job) for job in asked] == ["r", "g", "b", "r", "g"]
        assert device.batches[0] == 5
        with busy(jobs, device):
            asked = [jobs.ask(device) for _ in range(4)]
        assert [seen(job) for job in asked] == ["r"] * 4
        assert device.batches == [2, 2], "what fits has been learned"

    def test_one_image_that_does_not_fit_fails_with_the_devices_own_error(
        self, jobs: Jobs, device: Device
    ) -> None:
        device.room = 0
        with pytest.raises(DeviceOutOfMemory, match="No device memory for 1 images"):
            jobs.ask(device).result(PLENTY_S)

    def test_a_bad_image_fails_alone(self, jobs: Jobs, device: Device) -> None:
        with busy(jobs, device):
            good = [jobs.ask(device, image) for image in (RED, GREEN)]
            bad = jobs.ask(device, BLACK)
            good += [jobs.ask(device, image) for image in (BLUE, RED)]
        with pytest.raises(ValueError, match="black"):
            bad.result(PLENTY_S)
        assert [seen(job) for job in good] == ["r", "g", "b", "r"]
        assert seen(jobs.ask(device)) == "r"

    def test_what_can_never_succeed_is_tried_once_and_is_each_jobs_own_error(
        self, jobs: Jobs, device: Device
    ) -> None:
        with busy(jobs, device):
            bad = [jobs.ask(device, method=Method(layer="stones")) for _ in range(3)]
        for job in bad:
            with pytest.raises(UnknownLayer, match="stones"):
                job.result(PLENTY_S)
        assert len({id(job.exception()) for job in bad}) == 3
        assert device.batches == [3]

    def test_even_an_exit_in_the_devices_thread_does_not_end_it(self, jobs: Jobs, device: Device) -> None:
        class Mute(BaseException):
            def __str__(self) -> str:
                raise SystemExit

        failures = {"somebody's layer": SystemExit("somebody's layer"), "cannot be told": Mute()}
        for said, failure in failures.items():
            device.failure = failure
            with pytest.raises(InternalError, match=f"Unforeseen {type(failure).__name__}: .*{said}"):
                jobs.ask(device).result(PLENTY_S)
        device.failure = None
        assert seen(jobs.ask(device)) == "r"

    def test_a_device_that_never_answers_holds_nobody_beyond_the_deadline(
        self, jobs: Jobs, device: Device
    ) -> None:
        device.may_finish.clear()
        asked = [jobs.ask(device, deadline=Deadline(0.05)) for _ in range(3)]
        for job in asked:
            with pytest.raises(JobTimeout, match="waiting for the device"):
                job.result(PLENTY_S)
        device.may_finish.set()
        assert seen(jobs.ask(device)) == "r"

    def test_when_the_devices_thread_itself_ends_all_who_wait_and_all_who_come_are_told(
        self, jobs: Jobs, device: Device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with busy(jobs, device):
            waiting = [jobs.ask(device) for _ in range(3)]
            monkeypatch.setattr(jobs.batcher, "_choose", lambda: 1 / 0)
        for job in waiting:
            with pytest.raises(
                InternalError, match="thread of the device ended: Unforeseen ZeroDivisionError"
            ):
                job.result(PLENTY_S)
        with pytest.raises(InternalError, match="thread of the device ended"):
            jobs.ask(device).result(PLENTY_S)


class TestLeavingTheQueue:
    def test_who_is_late_leaves_before_it_costs_anything(self, jobs: Jobs, device: Device) -> None:
        with busy(jobs, device):
            late, other = jobs.ask(device, GREEN, deadline=Deadline(0.01)), jobs.ask(device)
            with pytest.raises(JobTimeout, match=r"timeout_s of 0\.01 s \(at: waiting for the device\)"):
                late.result(PLENTY_S)
        assert (seen(other), device.colors) == ("r", ["r"])

    def test_halves_of_a_batch_whose_jobs_are_gone_are_not_tried(self, jobs: Jobs, device: Device) -> None:
        deadline = Deadline(PLENTY_S)
        with busy(jobs, device):
            asked = [jobs.ask(device, deadline=deadline) for _ in range(4)]
            device.room = 3
            device.before_failing = lambda: deadline.cancel(JobExpired("Nobody wants it any more."))
        assert all(isinstance(job.exception(PLENTY_S), JobExpired) for job in asked)
        assert seen(jobs.ask(device)) == "r"
        assert device.batches == [4, 1], "both halves were left alone"

    def test_who_is_cancelled_leaves_before_it_costs_anything(self, jobs: Jobs, device: Device) -> None:
        deadline = Deadline(PLENTY_S)
        with busy(jobs, device):
            unwanted, other = jobs.ask(device, GREEN, deadline=deadline), jobs.ask(device)
            deadline.cancel(JobExpired("Nobody wants it any more."))
        with pytest.raises(JobExpired, match="Nobody wants it"):
            unwanted.result(PLENTY_S)
        assert (seen(other), device.colors) == ("r", ["r"])

    def test_a_deadline_that_is_put_off_is_waited_for(self, jobs: Jobs, device: Device) -> None:
        deadline = Deadline(0.2)
        with busy(jobs, device):
            patient = jobs.ask(device, deadline=deadline)
            deadline.extend(PLENTY_S)
            time.sleep(0.3)
        assert seen(patient) == "r"


class TestAhead:
    """A device that computes on its own: `begin` returns at once."""

    def test_the_next_full_batch_is_handed_over_while_this_one_computes(
        self, jobs: Jobs, device: Device
    ) -> None:
        jobs.batcher.limit(device, 2)
        device.may_finish.clear()
        asked = [jobs.ask(device, RED)]
        assert device.begun.acquire(timeout=PLENTY_S)
        asked += [jobs.ask(device, GREEN) for _ in range(5)]
        assert device.begun.acquire(timeout=PLENTY_S)
        assert device.batches == [1, 2], "one computes, one is there already, the others wait"
        device.may_finish.set()
        assert [seen(job) for job in asked] == ["r"] + ["g"] * 5

    def test_a_batch_that_is_not_full_goes_on_filling_up(self, jobs: Jobs, device: Device) -> None:
        device.may_finish.clear()
        asked = [jobs.ask(device, RED)]
        assert device.begun.acquire(timeout=PLENTY_S)
        asked += [jobs.ask(device, GREEN) for _ in range(3)]
        assert device.batches == [1]
        device.may_finish.set()
        assert [seen(job) for job in asked] == ["r", "g", "g", "g"]
        assert device.batches == [1, 3]

    def test_what_runs_alone_has_its_turn_however_busy_the_device_is(
        self, jobs: Jobs, device: Device
    ) -> None:
        jobs.batcher.limit(device, 1)
        with busy(jobs, device):
            many = [jobs.ask(device) for _ in range(6)]
            alone = jobs.pool.submit(
                jobs.batcher.run_exclusive, lambda: len(device.batches), Deadline(PLENTY_S)
            )
            while len(jobs.batcher._queues) < 2:
                time.sleep(0.001)
        assert alone.result(PLENTY_S) <= 1, "batches that had been begun before it"
        assert {seen(job) for job in many} == {"r"}

    def test_what_runs_alone_returns_or_raises_what_it_does(self, jobs: Jobs) -> None:
        assert jobs.batcher.run_exclusive(lambda: 7, Deadline(1)) == 7
        with pytest.raises(ZeroDivisionError):
            jobs.batcher.run_exclusive(lambda: 1 / 0, Deadline(1))


def test_in_a_crowd_everyone_gets_their_own_answer_or_their_own_error() -> None:
    """32 threads, three networks of little memory, bad images, late jobs, jobs that never hand in."""
    batcher, devices = Batcher(wait_s=0.002), [Device(room=room) for room in (3, 5, 1000)]
    images = {"r": RED, "g": GREEN, "b": BLUE, "black": BLACK}

    def job(number: int) -> bool:
        chance = random.Random(number)  # noqa: S311  # the same chances in every run
        color, device = chance.choice([*images]), chance.choice(devices)
        method = Method(chance.choice(["gradcam", "layercam"]))
        late = chance.random() < 0.1
        try:
            with batcher.expecting() as submitted:
                if chance.random() < 0.05:
                    return True
                answer = batcher.compute(
                    device,
                    images[color],
                    (-1,) * chance.choice([1, 2, 3]),
                    method,
                    Deadline(1e-4 if late else PLENTY_S),
                    bulk=chance.random() < 0.5,
                    submitted=submitted,
                )
        except JobTimeout:
            return late
        except ValueError as error:
            return color == "black" and str(error) == "black"
        return "rgb"[answer.computed.class_ids[answer.index, 0]] == color

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(job, range(600)))
    assert max(size for device in devices for size in device.batches) > 1
    assert (batcher._expected, batcher._at_device, batcher._retries) == (0, 0, [])
    assert not [group for group in batcher._queues.values() if group.waiting]
