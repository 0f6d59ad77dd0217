"""The border between a job process and the engine process: here both ends are in one process."""

import contextlib
import errno
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradcam_worker import __version__
from gradcam_worker.errors import (
    EngineUnavailable,
    GradcamError,
    InternalError,
    InvalidSettings,
    JobCanceled,
    JobTimeout,
    NetworkCrashed,
    NetworkIncompatible,
    UnknownLayer,
    WeightsUnavailable,
)
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.explain import Explanation, explain_pixels
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method
from gradcam_worker.gradcam.sizing import SIZINGS, Sizing
from gradcam_worker.inference import engine_client, engine_server, messages
from gradcam_worker.inference.engine_client import EngineClient
from gradcam_worker.inference.engine_server import EngineFacts, EngineServer
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.inference.pixel_pool import (
    ALIGNMENT,
    HEADER_BYTES,
    MFD_NOEXEC_SEAL,
    Block,
    MappedPool,
    PixelPool,
)
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.testing import TinyNetwork
from tests.gradcam.sized_network import SizedNetwork
from tests.networks_with_inputs import AgedNetwork

WAIT_S = 60
ROW = CATALOG["efficientnet_lite0"]
RED = np.full((16, 16, 3), (255, 0, 0), np.uint8)
FACTS = EngineFacts("cpu", on_gpu=False, max_batch=8)


@contextmanager
def engine(path: Path, cache: ModelCache) -> Iterator[EngineServer]:
    """An engine that serves in a thread."""
    server = EngineServer(cache, path, FACTS)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()


@contextmanager
def client(
    path: Path, pool_bytes: int = 1024 * 1024, observer: Observer = NULL_OBSERVER
) -> Iterator[EngineClient]:
    connected = EngineClient(path, pool_bytes=pool_bytes, observer=observer)
    try:
        yield connected
    finally:
        connected.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine"


def explain(inference: Any, pixels: Any = RED, seconds: float = WAIT_S) -> Explanation:
    network = inference.load(ROW)
    with inference.reserve() as slot:
        result = slot.infer(network, pixels, (-1, -2), GRADCAM, Deadline(seconds))
    explanation: Explanation = result.explanation
    return explanation


def assert_equal(one: Explanation, other: Explanation) -> None:
    assert (one.network, one.layer, one.predictions, one.explained) == (
        other.network,
        other.layer,
        other.predictions,
        other.explained,
    )
    for name in ("heatmaps", "raw_min", "raw_max"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_an_explanation_is_the_same_across_the_border(path: Path) -> None:
    here = ModelCache(lambda _: TinyNetwork())
    with engine(path, ModelCache(lambda _: TinyNetwork())), client(path) as remote:
        assert remote.connect(WAIT_S).device == "cpu"
        assert_equal(explain(remote), explain(here))
        network, images = remote.load(ROW), np.stack([RED, RED[:, :, ::-1]])
        for one, other in zip(
            remote.infer_many(network, images, (-1,), GRADCAM, Deadline(WAIT_S)),
            here.infer_many(here.load(ROW), images, (-1,), GRADCAM, Deadline(WAIT_S)),
            strict=True,
        ):
            assert isinstance(one, Explanation)
            assert isinstance(other, Explanation)
            assert_equal(one, other)
        deadline = Deadline(WAIT_S)
        measured = remote.measure(network, RED, explain(remote), ["deletion"], deadline)
        assert 0 < deadline.device_s < WAIT_S
        expected = here.measure(here.load(ROW), RED, explain(here), ["deletion"], Deadline(WAIT_S))
        assert measured.metrics == expected.metrics
        assert network.labels == here.load(ROW).labels
        assert remote.shard_batch_size(network) == 8


def test_the_sizing_of_a_network_crosses_the_border(path: Path) -> None:
    sizing = Sizing("lanczos", "letterbox", color=(1, 2, 3))
    with engine(path, ModelCache(lambda row: SizedNetwork(row.sizing))), client(path) as remote:
        remote.connect(WAIT_S)
        facts = remote.load(replace(ROW, sizing=sizing)).facts
    assert facts == SizedNetwork(sizing).facts


def test_levels_with_fractions_cross_the_border_as_they_are(path: Path) -> None:
    row, sizing = replace(ROW, sizing=SIZINGS["tf.image.resize"]), SIZINGS["tf.image.resize"]
    images = np.random.default_rng(0).uniform(0, 255, (2, *RED.shape)).astype(np.float32)
    here = SizedNetwork(sizing).compute(images, np.array([[-1, -2]] * 2, np.int32))
    with engine(path, ModelCache(lambda _: SizedNetwork(sizing))), client(path) as remote:
        remote.connect(WAIT_S)
        network = remote.load(row)
        found = remote.infer_many(network, images, (-1, -2), GRADCAM, Deadline(WAIT_S))
        with remote.reserve() as slot:
            one = slot.infer(network, images[0], (-1, -2), GRADCAM, Deadline(WAIT_S)).explanation
    for explanation, raw in zip([*found, one], [*here.raw, here.raw[0]], strict=True):
        assert isinstance(explanation, Explanation)
        np.testing.assert_array_equal(explanation.raw_max, raw.max((1, 2)))


def test_classes_against_cross_the_border_and_a_plain_method_needs_no_byte_more(path: Path) -> None:
    here, method, pixels = ModelCache(lambda _: TinyNetwork()), Method(against=(1,)), RED // 2
    with engine(path, ModelCache(lambda _: TinyNetwork())), client(path) as remote:
        remote.connect(WAIT_S)
        both: tuple[Any, ...] = remote, here
        found = [
            inference.infer_many(inference.load(ROW), pixels[None], (0, 2), method, Deadline(WAIT_S))[0]
            for inference in both
        ]
        assert isinstance(found[0], Explanation)
        assert isinstance(found[1], Explanation)
        assert_equal(found[0], found[1])
        assert [label.name for label in found[0].against] == ["green"]
        with remote.reserve() as slot:
            one = slot.infer(remote.load(ROW), pixels, (-1,), method, Deadline(WAIT_S)).explanation
        assert one.explained[0].name == "red"
    assert engine_client._fields(Method(flip=True)) == ("gradcam", None, "logit", "per_class", True)


def test_features_and_the_own_classes_of_images_cross_the_border(path: Path) -> None:
    here, images = ModelCache(lambda _: TinyNetwork()), np.stack([RED, RED[:, :, ::-1], RED])
    selections = [(-1, 2), (-1, -1), (2, 1)]
    with engine(path, ModelCache(lambda _: TinyNetwork())), client(path) as remote:
        remote.connect(WAIT_S)
        both: tuple[Any, ...] = remote, here
        for method in (Method(features=True), Method(features=True, against=(0,)), GRADCAM):
            found = [
                inference.infer_many(inference.load(ROW), images, selections, method, Deadline(WAIT_S))
                for inference in both
            ]
            for one, other in zip(*found, strict=True):
                assert_equal(one, other)
                assert (one.features is None) is not method.features
                if method.features:
                    np.testing.assert_array_equal(one.features, other.features)
                    assert one.features.shape == (len(one.explained), 3)
        assert [[prediction.name for prediction in one.explained] for one in found[0]] == [
            ["red", "blue"],
            ["blue"],
            ["blue", "green"],
        ]


def test_values_beside_the_image_are_the_same_across_the_border(path: Path) -> None:
    there, here = AgedNetwork(), AgedNetwork()
    images = np.stack([RED, RED[:, :, ::-1]])
    values = np.array([[0.61, 1, 0], [0.07, 0, 1]], np.float32)
    with engine(path, ModelCache(lambda _: there)), client(path) as remote:
        remote.connect(WAIT_S)
        for inference in (remote, ModelCache(lambda _: here)):
            network: Any = inference.load(ROW)
            assert network.facts.inputs == AgedNetwork.facts.inputs
            results = inference.infer_many(network, images, (-1,), GRADCAM, Deadline(WAIT_S), values=values)
            probabilities = [
                result.explained[0].probability for result in results if isinstance(result, Explanation)
            ]
            scores = np.exp(AgedNetwork().scores(images, values))
            np.testing.assert_allclose(probabilities, (scores / scores.sum(1, keepdims=True)).max(1), 1e-5)
            with inference.reserve() as slot:
                one = slot.infer(network, RED, (-1,), GRADCAM, Deadline(WAIT_S), values=values[1])
            measured = inference.measure(
                network, RED, one.explanation, ["deletion"], Deadline(WAIT_S), values=values[1]
            )
            assert measured.metrics[0]["deletion"] > 0
    assert [one.tolist() for one in there.seen] == [one.tolist() for one in here.seen]
    assert {tuple(row) for one in here.seen[2:] for row in one} == {tuple(values[1])}, (
        "fixed while it measures"
    )


def test_images_with_different_values_share_a_batch(path: Path) -> None:
    network, together = AgedNetwork(), threading.Barrier(4)
    cache = ModelCache(lambda _: network, max_batch=4, wait_s=WAIT_S)
    ages = [0.1, 0.2, 0.3, 0.4]
    with engine(path, cache), client(path) as remote, ThreadPoolExecutor(4) as threads:
        remote.connect(WAIT_S)
        loaded: Any = remote.load(ROW)

        def ask(age: float) -> float:
            with remote.reserve() as slot:
                together.wait(WAIT_S)
                values = np.array([age, 1, 0], np.float32)
                answer = slot.compute(loaded, RED, (1,), GRADCAM, Deadline(WAIT_S), values=values)
            return float(answer.computed.scores[0, 1])

        answers = [*threads.map(ask, ages)]
    np.testing.assert_allclose(answers, [AgedNetwork().scores(RED[None])[0, 1] + age for age in ages], 1e-6)
    assert [len(one) for one in network.seen] == [4]


@pytest.mark.parametrize("flip", [False, True])
def test_integrated_gradients_cross_the_border_in_parts_which_other_jobs_may_share(
    path: Path, flip: bool
) -> None:
    here = ModelCache(lambda _: TinyNetwork())
    method = Method("integrated_gradients", flip=flip, baseline="blurred", steps=20)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    expected = explain_pixels(TinyNetwork(), images, [(-1, -2)] * 3, method)
    with engine(path, ModelCache(lambda _: TinyNetwork())) as server, client(path) as remote:
        remote.connect(WAIT_S)
        both: tuple[Any, ...] = here, remote
        for inference in both:
            network = inference.load(ROW)
            found = inference.infer_many(network, images, (-1, -2), method, Deadline(WAIT_S))

            def one(pixels: Any, inference: Any = inference, network: Any = network) -> Any:
                with inference.reserve() as slot:
                    return slot.infer(network, pixels, (-1, -2), method, Deadline(WAIT_S)).explanation

            with ThreadPoolExecutor(3) as pool:
                found += pool.map(one, images)
            for index, explanation in enumerate(found):
                assert isinstance(explanation, Explanation)
                assert explanation.explained == expected[index % 3].explained
                np.testing.assert_allclose(explanation.heatmaps, expected[index % 3].heatmaps, atol=1e-5)
                assert explanation.completeness_error is not None
                assert explanation.completeness_error.max() < 1e-3
        assert remote.in_flight == server._expected() == 0


def test_only_this_user_can_open_the_socket(path: Path) -> None:
    with engine(path, ModelCache(lambda _: TinyNetwork())):
        assert path.stat().st_mode & 0o777 == 0o600


class Observed(Observer):
    """Remembers what the client tells."""

    def __init__(self) -> None:
        self.resent: list[int] = []
        self.waited_s: list[float] = []

    def engine_requests_resent(self, count: int) -> None:
        self.resent.append(count)

    def pixel_pool_waited(self, seconds: float) -> None:
        self.waited_s.append(seconds)


class Blocking(TinyNetwork):
    """Waits at the device until it is released; counts how many images each of its passes has."""

    def __init__(self) -> None:
        self.is_busy, self.may_go_on = threading.Event(), threading.Event()
        self.passes: list[int] = []

    def compute(self, pixels: Any, wanted: Any, method: Method = GRADCAM) -> Computed:
        self.passes.append(len(pixels))
        self.is_busy.set()
        assert self.may_go_on.wait(WAIT_S)
        return super().compute(pixels, wanted, method)


def kill(server: EngineServer) -> None:
    """End an engine as its death does: nothing more is answered, and its marks stay in the pools."""
    server._listener.close()
    for connection in [*server._connections]:
        connection.closed = True
        connection.pool.mark = lambda *_: None  # type: ignore[method-assign]
        connection.stream.shutdown(socket.SHUT_RDWR)


def wait_for(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def the(network: TinyNetwork, _: NetworkRow) -> TinyNetwork:
    return network


def score_at(key: str, offset: int, number: int, _: int) -> messages.Score:
    return messages.Score(number, key, offset, 1, bulk=False, alone=False)


def test_what_an_engine_did_not_answer_its_successor_does(path: Path) -> None:
    first, second = Blocking(), Blocking()
    second.may_go_on.set()
    observer = Observed()
    with client(path, observer=observer) as remote, ThreadPoolExecutor(8) as pool:
        with engine(path, ModelCache(lambda _: first, max_batch=4)) as server:
            remote.connect(WAIT_S)
            remote.load(ROW)
            asked = [pool.submit(explain, remote) for _ in range(8)]
            assert first.is_busy.wait(WAIT_S)
            wait_for(lambda: sum(map(len, (c.requests for c in server._connections))) == 8)
            kill(server)
            first.may_go_on.set()
        at_device = first.passes[0]
        with engine(path, ModelCache(lambda _: second, max_batch=4)):
            for future in asked:
                assert future.result(WAIT_S).explained[0].name == "red"
        assert remote.resent == sum(observer.resent) == 8
        assert remote.in_flight == 0
        assert remote._pool.free_bytes == remote._pool.size - HEADER_BYTES, "every block is free again"
    assert second.passes.count(1) >= at_device, "each that was at the device runs alone"


def test_a_request_that_ends_two_engines_fails_and_others_do_not(path: Path) -> None:
    engines = [Blocking(), Blocking()]
    with client(path) as remote, ThreadPoolExecutor(2) as pool:
        for number, network in enumerate(engines):
            with engine(path, ModelCache(partial(the, network))) as server:
                remote.connect(WAIT_S)
                if number == 0:
                    remote.load(ROW)
                    deadly = pool.submit(explain, remote)
                assert network.is_busy.wait(WAIT_S)
                kill(server)
                network.may_go_on.set()
        with pytest.raises(NetworkCrashed, match="and nothing else"):
            deadly.result(WAIT_S)
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            assert explain(remote).explained[0].name == "red"
    assert [network.passes for network in engines] == [[1], [1]]


def test_a_network_that_the_engine_has_unloaded_is_loaded_again(path: Path) -> None:
    loads: list[str] = []

    def load(row: NetworkRow) -> TinyNetwork:
        loads.append(row.name)
        return TinyNetwork()

    with engine(path, ModelCache(load, max_bytes=1)), client(path) as remote:
        remote.connect(WAIT_S)
        network = remote.load(ROW)
        assert remote.load(ROW) is network, "it is asked for once"
        remote.load(CATALOG["vgg16"])
        assert explain(remote).explained
    assert loads == [ROW.name, "vgg16", ROW.name]


@pytest.mark.parametrize(
    "error", [NetworkIncompatible("no such head"), WeightsUnavailable("no route"), ValueError("odd")]
)
def test_an_error_keeps_its_class_and_its_text(path: Path, error: Exception) -> None:
    def load(_: NetworkRow) -> TinyNetwork:
        raise error

    with engine(path, ModelCache(load)), client(path) as remote:
        remote.connect(WAIT_S)
        expected = type(error) if isinstance(error, GradcamError) else InternalError
        with pytest.raises(expected, match=str(error)):
            remote.load(ROW)


def test_an_unknown_layer_fails_its_own_request(path: Path) -> None:
    with engine(path, ModelCache(lambda _: TinyNetwork())), client(path) as remote:
        remote.connect(WAIT_S)
        network = remote.load(ROW)
        with pytest.raises(UnknownLayer, match="'nowhere' does not exist"), remote.reserve() as slot:
            slot.infer(network, RED, (-1,), Method(layer="nowhere"), Deadline(WAIT_S))
        assert explain(remote).explained


class Wide(TinyNetwork):
    """Computes with 64 bits."""

    def compute(self, pixels: Any, wanted: Any, method: Method = GRADCAM) -> Computed:
        computed, wide = super().compute(pixels, wanted, method), np.float64
        scores, class_ids, raw = computed.scores, computed.class_ids, computed.raw
        return Computed(computed.layer, scores.astype(wide), class_ids.astype(int), raw.astype(wide))


def test_results_of_other_types_are_sent_too(path: Path) -> None:
    with engine(path, ModelCache(lambda _: Wide())), client(path) as remote:
        remote.connect(WAIT_S)
        assert_equal(explain(remote), explain(ModelCache(lambda _: TinyNetwork())))


def test_a_deadline_ends_the_wait_and_the_memory_is_kept_until_the_engine_answers(path: Path) -> None:
    network = Blocking()
    with engine(path, ModelCache(lambda _: network)), client(path) as remote:
        remote.connect(WAIT_S)
        remote.load(ROW)
        with pytest.raises(JobTimeout):
            explain(remote, seconds=0.2)
        assert network.is_busy.wait(WAIT_S)
        everything = remote._pool.size - HEADER_BYTES
        assert remote._pool.free_bytes < everything
        network.may_go_on.set()
        wait_for(lambda: remote._pool.free_bytes == everything)


def test_a_job_gets_the_time_back_for_which_there_was_no_engine(path: Path) -> None:
    first = Blocking()
    with client(path) as remote, ThreadPoolExecutor(1) as pool:
        with engine(path, ModelCache(lambda _: first)) as server:
            remote.connect(WAIT_S)
            remote.load(ROW)
            asked = pool.submit(explain, remote, RED, 1.0)
            assert first.is_busy.wait(WAIT_S)
            kill(server)
            first.may_go_on.set()
        time.sleep(1.5)
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            assert asked.result(WAIT_S).explained


def test_requests_of_one_job_get_the_time_back_once(path: Path) -> None:
    first = Blocking()
    with client(path) as remote, ThreadPoolExecutor(2) as pool:
        deadline = Deadline(WAIT_S)
        with engine(path, ModelCache(lambda _: first)) as server:
            remote.connect(WAIT_S)
            network, pixels = remote.load(ROW), np.stack([RED])
            ask = partial(remote.infer_many, network, pixels, (-1,), GRADCAM, deadline)
            asked = [pool.submit(ask) for _ in range(2)]
            wait_for(lambda: sum(len(c.requests) for c in server._connections) == 2)
            kill(server)
            first.may_go_on.set()
        wait_for(lambda: remote.not_ready)
        pass_time(remote, 100.0)
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            assert all(future.result(WAIT_S) for future in asked)
        assert WAIT_S / 2 < deadline.left_s() <= WAIT_S, "what was lost, and nothing of it twice"


def pass_time(remote: EngineClient, seconds: float) -> None:
    """Let time pass for the jobs that wait while there is no engine."""
    with remote._lock:
        assert remote._absent_since_s
        remote._absent_since_s -= seconds
        for deadline in {wait.deadline for wait in remote._waits}:
            deadline._end_s -= seconds
            deadline._given_back_until_s -= seconds
        for wait in remote._waits:
            wait.since_s -= seconds


def test_a_job_waits_for_its_network_while_there_is_no_engine_and_loses_no_time(path: Path) -> None:
    with client(path) as remote, ThreadPoolExecutor(1) as pool:
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            remote.connect(WAIT_S)
        wait_for(lambda: remote.not_ready)
        deadline = Deadline(WAIT_S)
        asked = pool.submit(remote.load, ROW, deadline)
        wait_for(lambda: remote.in_flight)
        pass_time(remote, 100.0)
        assert not deadline.left_s()
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            assert asked.result(WAIT_S).row is ROW
        assert WAIT_S / 2 < deadline.left_s() <= WAIT_S


def test_loading_takes_no_time_of_a_job(path: Path) -> None:
    may_go_on = threading.Event()

    def load(_: NetworkRow) -> TinyNetwork:
        assert may_go_on.wait(WAIT_S)
        return TinyNetwork()

    with engine(path, ModelCache(load)), client(path) as remote, ThreadPoolExecutor(1) as pool:
        remote.connect(WAIT_S)
        deadline = Deadline(0.2)
        asked = pool.submit(remote.load, ROW, deadline)
        time.sleep(0.5)
        assert not asked.done()
        may_go_on.set()
        assert asked.result(WAIT_S)
        assert deadline.left_s() > 0


def test_a_job_waits_for_no_engine_for_ever_and_may_be_tried_elsewhere(path: Path) -> None:
    small = HEADER_BYTES + RED.nbytes + ALIGNMENT
    with client(path, pool_bytes=small) as remote, ThreadPoolExecutor(3) as pool:
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            remote.connect(WAIT_S)
            network = remote.load(ROW)
        wait_for(lambda: remote.not_ready)
        remote._pool.reserve(RED.nbytes, Deadline(WAIT_S))
        deadlines = [Deadline(WAIT_S) for _ in range(2)]
        asked: list[Future[Any]] = [
            pool.submit(remote.load, CATALOG["vgg16"], deadlines[0]),
            pool.submit(remote.compute, network, RED, (-1,), GRADCAM, deadlines[1]),  # waits for memory
        ]
        wait_for(lambda: len(remote._waits) == 2)
        pass_time(remote, engine_client.MAX_ABSENCE_S + 2 * WAIT_S)
        for future in asked:
            error = future.exception(WAIT_S)
            assert isinstance(error, EngineUnavailable)
            assert "has not answered for 30" in str(error)
            assert error.retryable
        assert remote.in_flight == 0


def test_a_job_that_waits_for_memory_gets_the_time_back_for_which_there_was_no_engine(path: Path) -> None:
    first = Blocking()
    small = HEADER_BYTES + RED.nbytes + ALIGNMENT
    with client(path, pool_bytes=small) as remote, ThreadPoolExecutor(2) as pool:
        with engine(path, ModelCache(lambda _: first)) as server:
            remote.connect(WAIT_S)
            network, deadlines = remote.load(ROW), [Deadline(2 * WAIT_S), Deadline(WAIT_S)]
            asked = [pool.submit(remote.compute, network, RED, (-1,), GRADCAM, deadlines[0])]
            assert first.is_busy.wait(WAIT_S)
            asked.append(pool.submit(remote.compute, network, RED, (-1,), GRADCAM, deadlines[1]))
            wait_for(lambda: len(remote._waits) == 2)
            kill(server)
            first.may_go_on.set()
        wait_for(lambda: remote.not_ready)
        pass_time(remote, 100.0)
        assert not deadlines[1].left_s()
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            assert all(future.result(WAIT_S).batch_size == 1 for future in asked)
        assert WAIT_S / 2 < deadlines[1].left_s() <= WAIT_S


def test_a_cancelled_job_waits_for_no_network(path: Path) -> None:
    with client(path) as remote, ThreadPoolExecutor(1) as pool:
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            remote.connect(WAIT_S)
        wait_for(lambda: remote.not_ready)
        deadline = Deadline(WAIT_S)
        asked = pool.submit(remote.load, ROW, deadline)
        wait_for(lambda: remote.in_flight)
        deadline.cancel(JobCanceled("no longer wanted"))
        with pytest.raises(JobCanceled, match="no longer wanted"):
            asked.result(WAIT_S / 2)
        assert remote.in_flight == 0


def test_a_job_gets_the_time_back_for_which_its_engine_was_silent(path: Path) -> None:
    network = Blocking()
    with engine(path, ModelCache(lambda _: network)) as server, client(path) as remote:
        remote.connect(WAIT_S)
        loaded, report = remote.load(ROW), threading.Event()
        server._report_state = report.set  # type: ignore[method-assign]  # it says nothing any more
        assert report.wait(WAIT_S)
        with remote._lock:
            remote._heard_s -= engine_client.SILENT_AFTER_S
        deadline = Deadline(0.5)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(remote.compute, loaded, RED, (-1,), GRADCAM, deadline)
            assert network.is_busy.wait(WAIT_S)
            time.sleep(1.0)
            network.may_go_on.set()
            assert asked.result(WAIT_S).batch_size == 1
        assert deadline.left_s() > 0


def test_a_changed_network_is_loaded_beside_the_old_one_which_is_kept_while_it_is_used(path: Path) -> None:
    loaded: list[weakref.ref[TinyNetwork]] = []

    def load(_: NetworkRow) -> TinyNetwork:
        network = TinyNetwork()
        loaded.append(weakref.ref(network))
        return network

    cache = ModelCache(load)
    with engine(path, cache), client(path) as remote:
        remote.connect(WAIT_S)
        old = remote.load(ROW)
        new = remote.load(replace(ROW, target_layer="other"))
        assert new.key != old.key
        for network in (old, new, old, new):
            with remote.reserve() as slot:
                assert slot.infer(network, RED, (-1,), GRADCAM, Deadline(WAIT_S)).explanation.explained
        assert len(loaded) == 2, "each once"
        cache.keep_replaced_s = 0.01
        wait_for(lambda: loaded[0]() is None)
        assert loaded[1]()


def test_a_full_pool_makes_requests_wait_and_no_longer_than_their_deadline(path: Path) -> None:
    network = Blocking()
    with (
        engine(path, ModelCache(lambda _: network)),
        client(path, pool_bytes=HEADER_BYTES + 2 * (RED.nbytes + ALIGNMENT)) as remote,
        ThreadPoolExecutor(4) as pool,
    ):
        remote.connect(WAIT_S)
        remote.load(ROW)
        asked = [pool.submit(explain, remote) for _ in range(4)]
        assert network.is_busy.wait(WAIT_S)
        wait_for(lambda: remote._pool.free_bytes == 0)
        with pytest.raises(JobTimeout, match="shared memory"):
            explain(remote, seconds=0.2)
        network.may_go_on.set()
        assert all(future.result(WAIT_S).explained for future in asked)
        with pytest.raises(InternalError, match="GRADCAM_ENGINE_POOL_BYTES"):
            remote._pool.reserve(10_000, Deadline(WAIT_S))


def test_only_a_request_that_finds_no_room_is_told_to_have_waited() -> None:
    observer = Observed()
    pool = PixelPool(HEADER_BYTES + 2 * ALIGNMENT, observer)
    block = pool.reserve(ALIGNMENT, Deadline(WAIT_S))
    assert observer.waited_s == []
    with pytest.raises(JobTimeout, match="shared memory"):
        pool.reserve(ALIGNMENT, Deadline(0.01))
    assert observer.waited_s.pop() >= 0.01
    block.release()
    pool.reserve(ALIGNMENT, Deadline(WAIT_S))
    assert observer.waited_s == []


def test_blocks_of_different_sizes_never_overlap_and_all_become_free() -> None:
    pool, random = PixelPool(1024 * 1024), np.random.default_rng(1)
    blocks: list[tuple[Block, int]] = []
    for number in range(2000):
        if blocks and random.random() < 0.5:
            block, value = blocks.pop(random.integers(len(blocks)))
            assert (block.pixels((block.size - ALIGNMENT,), "uint8") == value).all()
            block.release()
        else:
            with contextlib.suppress(JobTimeout):
                block = pool.reserve(int(random.integers(1, 40_000)), Deadline(0.001))
                block.pixels((block.size - ALIGNMENT,), "uint8")[:] = number % 251
                blocks.append((block, number % 251))
    for block, _ in blocks:
        block.release()
    assert pool._free == [(HEADER_BYTES, pool.size - HEADER_BYTES)]


def four_requests(
    job_process: EngineClient, pool: ThreadPoolExecutor, server: EngineServer, network: Blocking
) -> list[Future[Any]]:
    """Connect and send four requests; return when the engine has all of them, one of them at the device."""
    job_process.connect(WAIT_S)
    job_process.load(ROW)
    sent = [pool.submit(explain, job_process) for _ in range(4)]
    assert network.is_busy.wait(WAIT_S)
    wait_for(lambda: sum(len(c.requests) for c in server._connections) == 4)
    return sent


def test_a_job_process_that_ends_leaves_nothing_behind(path: Path) -> None:
    network = Blocking()
    cache = ModelCache(lambda _: network, max_batch=1)
    with engine(path, cache) as server, client(path) as other, ThreadPoolExecutor(4) as pool:
        with client(path) as dying:
            lost = four_requests(dying, pool, server, network)
        for future in lost:
            with pytest.raises(InternalError, match="closed"):
                future.result(WAIT_S)
        wait_for(lambda: not server._connections)
        network.may_go_on.set()
        other.connect(WAIT_S)
        assert explain(other).explained
        assert server._expected() == 0
    assert len(network.passes) <= 3, "what waited for the device was dropped"


@contextmanager
def no_collection() -> Iterator[None]:
    """Free what nothing refers to, and no cycles."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_the_memory_of_a_job_process_that_has_ended_waits_for_no_collection(path: Path) -> None:
    network = Blocking()
    cache = ModelCache(lambda _: network, max_batch=1)
    with engine(path, cache) as server, ThreadPoolExecutor(4) as pool, no_collection():
        with client(path) as dying:
            lost = four_requests(dying, pool, server, network)
            (memory,) = (weakref.ref(c.pool) for c in server._connections)
        assert all(future.exception(WAIT_S) for future in lost)
        network.may_go_on.set()
        wait_for(lambda: memory() is None)


def test_a_job_process_that_stops_reading_delays_no_other(path: Path) -> None:
    with engine(path, ModelCache(lambda _: TinyNetwork())) as server, client(path) as other:
        stopped = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stopped.connect(str(path))
        pool = PixelPool(1024 * 1024)
        hello = messages.encode(messages.Hello(__version__, 1, pool.size))
        socket.send_fds(stopped, [b"".join(hello)], [pool.fd])
        other.connect(WAIT_S)
        wait_for(lambda: len(server._connections) == 2)
        silent = next(c for c in server._connections if c.pid == 1)
        for _ in range(40):  # far more than the system keeps for a socket
            silent.send(messages.Failed(1, "internal", "x" * 1_000_000))
        assert silent._unsent
        stopped.sendall(b"".join(messages.encode(messages.Register("key", "{")))[:9])  # half a message
        assert explain(other).explained
        stopped.close()
        wait_for(lambda: len(server._connections) == 1)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        messages.LENGTHS.pack(2**31, 0),
        messages.LENGTHS.pack(3, 0) + b"[9]",
        messages.LENGTHS.pack(5, 0) + b"[[[[[",
        b"".join(messages.encode(messages.Infer(1, "key", 0, 0, (-1,), ("gradcam",), False, False))),
        b"".join(messages.encode(messages.Hello(__version__, 1, 4096))),
    ],
    ids=["http", "huge", "no fields", "no json", "no hello", "no pool"],
)
def test_what_is_no_message_ends_its_connection_and_no_other(path: Path, sent: bytes) -> None:
    with engine(path, ModelCache(lambda _: TinyNetwork())), client(path) as other:
        other.connect(WAIT_S)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.settimeout(WAIT_S)
            stranger.connect(str(path))
            stranger.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
        assert explain(other).explained


def test_pixels_outside_the_pool_are_refused(path: Path) -> None:
    with engine(path, ModelCache(lambda _: TinyNetwork())), client(path) as remote:
        remote.connect(WAIT_S)
        network = remote.load(ROW)
        for offset in (0, remote._pool.size - 10, -5, 2**40):
            with pytest.raises(GradcamError):
                remote._ask(partial(score_at, network.key, offset), Deadline(WAIT_S))
            assert explain(remote).explained


def test_an_engine_of_another_version_is_refused_with_both_versions(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(path, ModelCache(lambda _: TinyNetwork())), client(path) as remote:
        monkeypatch.setattr(engine_client, "__version__", "0.0.1")
        with pytest.raises(InvalidSettings, match=rf"version {__version__}, the job process 0.0.1"):
            remote.connect(WAIT_S)


def test_batches_wait_for_jobs_of_other_processes(path: Path) -> None:
    network = Blocking()
    network.may_go_on.set()
    cache = ModelCache(lambda _: network, max_batch=2, wait_s=WAIT_S)
    with engine(path, cache), client(path) as one, client(path) as two, ThreadPoolExecutor(1) as pool:
        for remote in (one, two):
            remote.connect(WAIT_S)
            remote.load(ROW)
        with two.reserve() as slot:
            first = pool.submit(explain, one)
            wait_for(lambda: len(one._requests) == 1)
            slot.infer(two.load(ROW), RED, (-1, -2), GRADCAM, Deadline(WAIT_S))
        assert first.result(WAIT_S).explained
    assert network.passes == [2]


def greeted(path: Path, pool: PixelPool) -> socket.socket:
    """A job process that has only said hello."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.settimeout(WAIT_S)
    stream.connect(str(path))
    hello = b"".join(messages.encode(messages.Hello(__version__, 1, pool.size)))
    socket.send_fds(stream, [hello], [pool.fd])
    return stream


def received(stream: socket.socket) -> Iterator[messages.Message]:
    receiver = messages.Receiver()
    while data := stream.recv(4096):
        yield from (message for message, _ in receiver.feed(data))


def test_a_message_that_is_sent_just_when_a_job_process_has_read_all_others_arrives(path: Path) -> None:
    with (
        engine(path, ModelCache(lambda _: TinyNetwork())) as server,
        greeted(path, PixelPool(1024 * 1024)) as slow,
    ):
        wait_for(lambda: any(c.is_greeted for c in server._connections))
        (connection,) = server._connections
        send_rest, message = connection.send_rest, messages.Failed(1, "internal", "x" * 9_000_000)

        def send_rest_and_more() -> None:
            send_rest()
            if not connection.is_behind:
                connection.send_rest = send_rest  # type: ignore[method-assign]
                connection.send(message)  # as another thread does

        connection.send_rest = send_rest_and_more  # type: ignore[method-assign]
        connection.send(message)
        assert connection.is_behind
        answers = (one for one in received(slow) if isinstance(one, messages.Failed))
        assert [next(answers), next(answers)] == [message, message]


def test_a_job_process_that_does_not_read_is_sent_no_state(path: Path) -> None:
    with (
        engine(path, ModelCache(lambda _: TinyNetwork())) as server,
        greeted(path, PixelPool(1024 * 1024)),
    ):
        wait_for(lambda: any(c.is_greeted for c in server._connections))
        (connection,) = server._connections
        connection.send(messages.Failed(1, "internal", "x" * 9_000_000))
        waiting = len(connection._unsent)
        server._report_state()
        assert len(connection._unsent) == waiting > 0


def test_an_engine_marks_nothing_in_the_memory_of_a_job_process_that_has_disconnected(path: Path) -> None:
    network = Blocking()
    cache = ModelCache(lambda _: network, max_batch=1)
    with engine(path, cache) as server, ThreadPoolExecutor(2) as pool:
        with client(path) as remote:
            remote.connect(WAIT_S)
            remote.load(ROW)
            asked = [pool.submit(explain, remote) for _ in range(2)]
            assert network.is_busy.wait(WAIT_S)
            wait_for(lambda: sum(len(c.requests) for c in server._connections) == 2)
            (connection,) = server._connections
            offsets = [request.offset for request in connection.requests.values()]
        wait_for(lambda: connection.closed)
        for offset in offsets:
            remote._pool.memory[offset] = 77  # as another request whose pixels are there
        network.may_go_on.set()
        wait_for(lambda: not connection.requests)
        assert [remote._pool.memory[offset] for offset in offsets] == [77, 77]
        for future in asked:
            assert isinstance(future.exception(WAIT_S), InternalError)


def test_memory_that_is_free_again_is_not_written_to_after_the_end_of_an_engine(path: Path) -> None:
    network = Blocking()
    with client(path) as remote, engine(path, ModelCache(lambda _: network)) as server:
        remote.connect(WAIT_S)
        remote.load(ROW)
        with pytest.raises(JobTimeout):
            explain(remote, seconds=0.2)
        assert network.is_busy.wait(WAIT_S)
        (request,) = remote._requests.values()
        block, release = request.block, remote._pool.release
        assert block

        def release_to_another(block: Block) -> None:
            release(block)
            remote._pool.memory[block.offset] = 77

        remote._pool.release = release_to_another  # type: ignore[method-assign]
        kill(server)
        wait_for(lambda: not remote.in_flight)
        with remote._lock:
            assert remote._pool.memory[block.offset] == 77
        network.may_go_on.set()


def test_what_an_engine_answers_before_it_closes_a_connection_is_received(path: Path) -> None:
    """A message could not be sent: the client ends its side, and reads on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, client(path) as remote:
        listener.bind(str(path))
        listener.listen()
        with ThreadPoolExecutor(2) as pool:
            connecting = pool.submit(remote.connect, WAIT_S)
            stream, _ = listener.accept()
            welcome = messages.Welcome(__version__, 1, "cpu", on_gpu=False, max_batch=8, not_ready=None)
            stream.sendall(b"".join(messages.encode(welcome)))
            assert connecting.result(WAIT_S) == welcome
            loading = pool.submit(remote.load, ROW)
            answered = (one for one in received(stream) if isinstance(one, messages.Load))
            request = next(answered).request
            with remote._lock:
                connected = remote._stream
                assert connected
                connected.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        connected.send(b"x" * 100_000)
                remote._send(messages.Cancel(99))  # finds no room
                connected.setblocking(True)
            with contextlib.suppress(messages.BrokenMessage):
                assert list(answered) == []
            while stream.recv(1_000_000):
                pass
            failed = messages.Failed(request, UnknownLayer.code, "late")
            stream.sendall(b"".join(messages.encode(failed)))
            with pytest.raises(UnknownLayer, match="late"):
                loading.result(WAIT_S)
        stream.close()


def test_a_cancelled_job_waits_for_no_engine(path: Path) -> None:
    network = Blocking()
    with engine(path, ModelCache(lambda _: network)), client(path) as remote, ThreadPoolExecutor(1) as pool:
        remote.connect(WAIT_S)
        loaded, deadline = remote.load(ROW), Deadline(WAIT_S)
        asked = pool.submit(remote.compute, loaded, RED, (-1,), GRADCAM, deadline)
        assert network.is_busy.wait(WAIT_S)
        deadline.cancel(JobCanceled("no longer wanted"))
        with pytest.raises(JobCanceled, match="no longer wanted"):
            asked.result(WAIT_S / 2)
        network.may_go_on.set()


def test_the_memory_of_a_request_that_no_engine_has_is_free_when_it_is_given_up(path: Path) -> None:
    with client(path) as remote:
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            remote.connect(WAIT_S)
            network = remote.load(ROW)
        wait_for(lambda: remote.not_ready)
        deadline = Deadline(WAIT_S)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(remote.compute, network, RED, (-1,), GRADCAM, deadline)
            wait_for(lambda: remote.in_flight)
            deadline.cancel(JobCanceled("no longer wanted"))
            with pytest.raises(JobCanceled):
                asked.result(WAIT_S)
        assert remote.in_flight == 0
        assert remote.free_bytes == remote._pool.size - HEADER_BYTES


def test_a_network_that_loads_slowly_delays_no_other_however_many_jobs_wait_for_it(path: Path) -> None:
    may_go_on, loads = threading.Event(), list[str]()

    def load(row: NetworkRow) -> TinyNetwork:
        loads.append(row.name)
        assert row.name != ROW.name or may_go_on.wait(WAIT_S)
        return TinyNetwork()

    with engine(path, ModelCache(load)) as server, client(path) as remote, ThreadPoolExecutor(9) as pool:
        remote.connect(WAIT_S)
        slow = [pool.submit(explain, remote) for _ in range(8)]
        wait_for(lambda: [len(waiting) for waiting in server._waiting_for.values()] == [8])
        assert pool.submit(remote.load, CATALOG["vgg16"]).result(WAIT_S / 2)
        may_go_on.set()
        assert all(future.result(WAIT_S).explained for future in slow)
    assert loads == [ROW.name, "vgg16"]


@contextmanager
def setting(event: threading.Event) -> Iterator[None]:
    """Set an event in the end, whatever happens."""
    try:
        yield
    finally:
        event.set()


def test_requests_that_are_given_up_while_their_network_loads_are_answered_at_once(path: Path) -> None:
    may_go_on = threading.Event()

    def load(_: NetworkRow) -> TinyNetwork:
        may_go_on.wait()
        return TinyNetwork()

    with (
        engine(path, ModelCache(load)) as server,
        client(path) as remote,
        ThreadPoolExecutor(1) as pool,
        setting(may_go_on),
    ):
        remote.connect(WAIT_S)
        # A successor of the engine gets requests whose networks it has not loaded.
        network = engine_client.RemoteNetwork(
            remote._register(ROW), ROW, TinyNetwork().facts, TinyNetwork.labels
        )
        deadline = Deadline(WAIT_S)
        asked = pool.submit(remote.compute, network, RED, (-1,), GRADCAM, deadline, images=1)
        wait_for(lambda: sum(map(len, server._waiting_for.values())) == 1)
        deadline.cancel(JobCanceled("no longer wanted"))
        with pytest.raises(JobCanceled, match="no longer wanted"):
            asked.result(WAIT_S / 2)
        wait_for(lambda: remote.free_bytes == remote._pool.size - HEADER_BYTES)
        assert remote.in_flight == 0
        may_go_on.set()
        assert explain(remote).explained


def test_a_job_process_that_ends_while_its_network_loads_leaves_no_memory_and_no_load_to_begin(
    path: Path,
) -> None:
    may_go_on, loads = threading.Event(), list[str]()

    def load(row: NetworkRow) -> TinyNetwork:
        loads.append(row.name)
        may_go_on.wait()
        return TinyNetwork()

    names = [name for name in CATALOG if name != ROW.name][: engine_server.LOADERS + 1]
    with engine(path, ModelCache(load)) as server, client(path) as other, setting(may_go_on):
        with client(path) as dying, ThreadPoolExecutor(len(names)) as pool:
            dying.connect(WAIT_S)
            asked = [pool.submit(dying.load, CATALOG[name]) for name in names]
            wait_for(lambda: len(server._waiting_for) == len(names))
            wait_for(lambda: len(loads) == engine_server.LOADERS)
            (connection,) = map(weakref.ref, server._connections)
            dying.close()
            assert all(future.exception(WAIT_S) for future in asked)
        other.connect(WAIT_S)  # the serving thread has turned since
        wait_for(lambda: connection() is None)
        may_go_on.set()
        wait_for(lambda: not server._waiting_for)
        assert len(loads) == engine_server.LOADERS, "nobody waits for the others"
        assert explain(other).explained


def test_an_engine_of_another_version_that_follows_makes_its_job_process_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client(path) as remote:
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            remote.connect(WAIT_S)
            assert remote.failure is None
        monkeypatch.setattr(engine_client, "__version__", "0.0.1")
        with engine(path, ModelCache(lambda _: TinyNetwork())):
            wait_for(lambda: remote.failure)
            assert "0.0.1" in str(remote.not_ready)
            assert remote._thread
            remote._thread.join(WAIT_S)
            with pytest.raises(InvalidSettings, match=r"0\.0\.1"):
                remote.connect(WAIT_S / 2)


def test_an_engine_that_has_too_many_open_files_serves_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def accept_later(listener: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_later)
    with engine(path, ModelCache(lambda _: TinyNetwork())), client(path) as remote:
        assert remote.connect(WAIT_S).device == "cpu"


def test_file_descriptors_that_nobody_asked_for_end_their_connection(path: Path) -> None:
    pool = PixelPool(1024 * 1024)
    with engine(path, ModelCache(lambda _: TinyNetwork())), greeted(path, pool) as stream:
        assert isinstance(next(received(stream)), messages.Welcome)
        socket.send_fds(stream, [b"x"], [pool.fd])
        with contextlib.suppress(ConnectionResetError):
            assert not any(isinstance(one, messages.Loaded) for one in received(stream))


def test_the_memory_of_a_client_that_is_no_longer_used_is_closed(path: Path) -> None:
    remote = EngineClient(path, pool_bytes=1024 * 1024)
    fd = remote._pool.fd
    del remote
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_whoever_waits_for_memory_holds_no_lock_while_it_asks_how_long_it_may() -> None:
    pool = PixelPool(HEADER_BYTES + 2 * ALIGNMENT)
    block = pool.reserve(ALIGNMENT, Deadline(WAIT_S))

    class Limit:
        def left_s(self) -> float:
            return WAIT_S

        def check(self, _: str) -> None:
            with ThreadPoolExecutor(1) as other:
                other.submit(block.release).result(WAIT_S / 2)

    assert pool.reserve(ALIGNMENT, Limit()).offset == block.offset


@pytest.mark.parametrize("refused", [errno.EACCES, errno.EINVAL], ids=["others are refused", "before 6.3"])
def test_shared_memory_is_no_program_where_the_system_knows_that(
    monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    make = os.memfd_create

    def make_as_there(name: str, flags: int) -> int:
        is_no_program = bool(flags & MFD_NOEXEC_SEAL)
        if is_no_program == (refused == errno.EINVAL):
            raise OSError(refused, os.strerror(refused))
        return make(name, flags & ~MFD_NOEXEC_SEAL)

    monkeypatch.setattr(os, "memfd_create", make_as_there)
    pool = PixelPool(1024 * 1024)
    pool.reserve(RED.nbytes, Deadline(WAIT_S)).write(RED)
    assert MappedPool(os.dup(pool.fd), pool.size).pixels(HEADER_BYTES, RED.shape, "uint8")[0, 0, 0] == 255


def test_an_engine_whose_socket_was_removed_can_be_reached_again(path: Path) -> None:
    socket_path = path.parent / "sockets" / "engine"
    socket_path.parent.mkdir()
    with engine(socket_path, ModelCache(lambda _: TinyNetwork())), client(socket_path) as first:
        first.connect(WAIT_S)
        socket_path.unlink()
        socket_path.parent.rmdir()
        wait_for(socket_path.exists)
        assert socket_path.stat().st_mode & 0o777 == 0o600
        assert socket_path.parent.stat().st_mode & 0o777 == 0o700
        with client(socket_path) as second:
            second.connect(WAIT_S)
            assert explain(first).explained == explain(second).explained
