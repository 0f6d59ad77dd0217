"""What the tasks do with messages, over an app that has no broker."""

import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from celery.exceptions import Reject

from gradcam_worker.broker import app as broker
from gradcam_worker.broker import publisher
from gradcam_worker.errors import (
    DeviceOutOfMemory,
    InvalidSettings,
    LedgerUnavailable,
    NetworkIncompatible,
    WeightsUnavailable,
)
from gradcam_worker.execution.handler import Disposition
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.observability.health import Health
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.runtime.processes import preloading, worker_process
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@dataclass
class BrokenHandler:
    """Handles nothing, for a reason; refuses what it is told to."""

    failure: BaseException
    ledger: Ledger = field(default_factory=MemoryLedger)

    def handle(self, *_: object, **__: object) -> Disposition:
        raise self.failure

    def refuse(self, message_id: str, payload: object, error: Any) -> StatusDocument:
        return self.ledger.refuse(message_id, payload, error)


def receive(handler: Any, message_id: str, *, redelivered: bool = False) -> None:
    app = broker.make_app(Settings())
    worker_process.register(app, handler, Outages().ledger)
    request = SimpleNamespace(headers=None, id=message_id, delivery_info={"redelivered": redelivered})
    app.tasks[publisher.EXPLAIN].run.__func__(SimpleNamespace(request=request, name=publisher.EXPLAIN), {})


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "REQUEUE_DELAY_S", 0)


@pytest.mark.parametrize("redelivered", [False, True])
def test_a_message_goes_back_while_the_ledger_is_out_of_reach(redelivered: bool) -> None:
    with pytest.raises(Reject) as caught:
        receive(BrokenHandler(LedgerUnavailable("gone")), new_id(), redelivered=redelivered)
    assert caught.value.requeue


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_a_mistake_of_ours_loses_no_message_and_makes_none_go_round_for_ever(
    kind: type[BaseException],
) -> None:
    handler, message_id = BrokenHandler(kind("surprise")), new_id()
    with pytest.raises(Reject) as caught:
        receive(handler, message_id)
    assert caught.value.requeue
    receive(handler, message_id, redelivered=True)
    error = handler.ledger.read(message_id).error
    assert error is not None
    assert (error.code, f"{kind.__name__}: surprise" in error.detail) == ("internal", True)


def test_a_mistake_of_ours_that_cannot_be_written_down_loses_no_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handler = BrokenHandler(RuntimeError("surprise"))
    monkeypatch.setattr(handler, "refuse", Mock(side_effect=LedgerUnavailable("gone")))
    with pytest.raises(Reject, match="surprise") as caught:
        receive(handler, new_id(), redelivered=True)
    assert caught.value.requeue


def test_a_mistake_of_ours_ends_no_good_job(job: Any) -> None:
    handler = BrokenHandler(RuntimeError("surprise"))
    handler.ledger.submit(job)
    with pytest.raises(Reject):
        receive(handler, job.id, redelivered=True)
    assert handler.ledger.read(job.id).status == "queued"


def test_a_job_is_the_one_argument_of_its_task() -> None:
    assert worker_process._single_argument(({"a": 1},)) == {"a": 1}
    assert worker_process._single_argument((1, 2)) == [1, 2], "which is no job, and is refused as such"
    assert worker_process._single_argument(()) == []


@pytest.mark.parametrize(
    ("failures", "stopped"),
    [
        ([WeightsUnavailable("no route"), DeviceOutOfMemory("none free")], False),
        (
            [WeightsUnavailable("no route"), because(WeightsUnavailable("none"), FileNotFoundError(2, "x"))],
            True,
        ),
        ([NetworkIncompatible("no network")], True),
    ],
    ids=["away", "no file", "no network"],
)
def test_weights_that_are_only_away_and_memory_that_others_have_are_waited_for(
    failures: list[Exception], stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preloading, "RETRY_S", 0)
    health, seen = Health(), list[object]()

    def warm(row: NetworkRow) -> None:
        seen.append(health.problems("/startup"))
        if failures:
            raise failures.pop(0)

    model_cache: Any = SimpleNamespace(warm_up=warm)
    settings = Settings(preload=("vgg16", "resnet50"))
    if stopped:
        with pytest.raises(InvalidSettings, match="GRADCAM_PRELOAD: no"):
            preloading.preload(settings, model_cache, health)
        return
    preloading.preload(settings, model_cache, health)
    both, last = ({"networks": f"not loaded yet: {names}"} for names in ("vgg16, resnet50", "resnet50"))
    assert seen == [both, both, both, last]
    assert health.problems("/startup") == health.problems("/ready") == {}


@pytest.mark.parametrize(
    ("error", "code"), [(InvalidSettings("wrong"), os.EX_CONFIG), (LedgerUnavailable("away"), 1)]
)
def test_whatever_ends_a_supervised_worker_is_a_line_of_its_log(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(worker_process, "run", fails)
    assert worker_process.run_supervised(Settings(), 1) == code
    assert caplog.messages == [f"worker_failed error={error}"]
