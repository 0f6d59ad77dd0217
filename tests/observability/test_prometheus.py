"""What is counted, under which names, and that every part of a worker tells it."""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gradcam_worker import __version__
from gradcam_worker.delivery.dispatcher import OutboxDispatcher
from gradcam_worker.errors import (
    AttemptFenced,
    EndpointGone,
    GradcamError,
    LedgerUnavailable,
    StatusUnavailable,
    StorageUnavailable,
    WeightsUnavailable,
)
from gradcam_worker.execution.handler import Disposition, JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.network import GRADCAM
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.reaper import Reaper
from gradcam_worker.ledger.redis import stats
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability import gpu, prometheus
from gradcam_worker.observability.definitions import BY_NAME, CODES, MAX_NETWORKS, MAX_TENANTS, METRICS, OTHER
from gradcam_worker.observability.events import EndedJob, Observer
from gradcam_worker.observability.gpu import DeviceUse
from gradcam_worker.observability.prometheus import HostMetrics, Metrics, ProcessScrape
from gradcam_worker.observability.queue_depths import QueueDepths, TenantUse
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.schemas.work import ROUTES
from gradcam_worker.settings import Settings
from gradcam_worker.storage.stores import Stores
from gradcam_worker.testing import MemoryLedger, MemoryStore, TinyNetwork, fake_services

UNITS = ("_seconds", "_bytes", "_ratio")
ROW = CATALOG[TinyNetwork.facts.name]
IMAGE = cv2.imencode(".png", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()
ME = WorkerRef(id="me", device="cpu")


def read(counted: Metrics) -> dict[str, float]:
    """`name{label=value,...}` -> value, of all that is not at zero."""
    found = {}
    for family in text_string_to_metric_families(counted.scrape().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if value)
            if sample.value and sample.name.startswith("gradcam_"):
                found[sample.name.removeprefix("gradcam_") + (f"{{{labels}}}" if labels else "")] = (
                    sample.value
                )
    return found


def all_codes(root: type[GradcamError] = GradcamError) -> set[str]:
    return {root.code}.union(*map(all_codes, root.__subclasses__()))


def test_names_kinds_and_help_keep_to_prometheus_conventions() -> None:
    assert len(BY_NAME) == len(METRICS)
    for one in METRICS:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", one.name), one.name
        assert not one.help[0].islower()
        assert one.help.endswith((".", ")"))
        assert (one.kind == "counter") == one.name.endswith("_total"), one.name
        named = one.name.removesuffix("_total")
        assert not re.search(r"_(ms|milliseconds|minutes|mb|percent|count|sum|bucket|s)$", named), one.name
        for unit in UNITS:
            assert unit not in named or named.endswith(unit), "the unit comes last"
        assert (one.kind == "histogram") == bool(one.buckets)
        assert list(one.buckets) == sorted(set(one.buckets))
        assert all(re.fullmatch(r"[a-z]+", label) for label in one.labels)


def test_labels_have_few_values_and_codes_are_those_of_the_errors_tree() -> None:
    assert {label for one in METRICS for label in one.labels} == {
        *("state", "code", "outcome", "reason", "stage", "version", "priority", "check"),
        *("operation", "status"),
        *("network", "tenant"),
    }
    assert set(CODES) - {"", OTHER} <= all_codes()
    assert {"timeout", "worker_lost", "internal", "image_not_found"} < set(CODES)
    counted = Metrics()
    counted.job_finished("failed", "a code of tomorrow")
    assert read(counted)["jobs_total{code=other,state=failed}"] == 1
    assert len(counted.scrape().splitlines()) < 500, "what a scrape costs is what it holds"


def test_all_of_a_process_is_there_at_zero_before_anything_has_happened() -> None:
    families = {one.name for one in text_string_to_metric_families(Metrics().scrape().decode())}
    expected = {
        f"gradcam_{one.name.removesuffix('_total')}"
        for one in METRICS
        if one.source == "process" and "worker" in one.roles
    }
    assert expected <= families
    assert not any(one.endswith("_created") for one in families)
    text = Metrics().scrape().decode()
    assert 'gradcam_jobs_total{code="timeout",state="failed"} 0.0' in text
    assert 'code="timeout",state="succeeded"' not in text, "what never happens is no series"


def test_everything_that_can_be_told_is_counted() -> None:
    tellings = {name for name in vars(Observer) if not name.startswith("_")}
    assert tellings <= set(vars(Metrics))


@dataclass
class Shop:
    """A desk that is counted, with doubles all around it."""

    images: dict[str, bytes | Exception] = field(default_factory=lambda: {"s3://in/a.png": IMAGE})

    def __post_init__(self) -> None:
        self.counted, self.store, self.now = Metrics(), MemoryStore(), [time.time()]
        self.ledger = MemoryLedger(clock=lambda: self.now[0])
        self.ledger.observer = self.counted
        self.leases = LeaseManager(self.ledger, ME.id, 15, observer=self.counted)
        self.model_cache = ModelCache(lambda _: TinyNetwork(), observer=self.counted)
        self.breaker = CircuitBreaker(lambda: None)
        around = fake_services(self.images, store=self.store, inference=self.model_cache)
        self.handler = JobHandler(
            Settings(), self.ledger, around, ME, self.leases, self.breaker, observer=self.counted
        )

    def job(self, **changes: Any) -> Job:
        fields = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
        return Job.parse({**fields, **changes})

    def handle(self, job: Job) -> Disposition:
        return self.handler.handle(job.model_dump(mode="json"), job.id)

    def claim(self, job: Job) -> Any:
        return self.ledger.claim(self.ledger.submit(job), ME).document


@pytest.fixture
def shop() -> Shop:
    return Shop()


def test_jobs_are_counted_by_how_they_end_and_messages_by_what_becomes_of_them(shop: Shop) -> None:
    good = shop.job()
    assert [shop.handle(good), shop.handle(good)] == [Disposition.FINISHED, Disposition.DROP]
    shop.handle(shop.job(image="s3://in/none.png"))
    shop.images["s3://in/a.png"] = StorageUnavailable("it is down")
    assert shop.handle(shop.job(max_attempts=2)) == Disposition.RETRY
    shop.handler.handle("no job", new_id())
    shop.breaker._probe = lambda: 1 / 0
    shop.breaker.probe()
    with pytest.raises(GradcamError):
        shop.handle(shop.job())
    found = read(shop.counted)
    assert found["jobs_total{state=succeeded}"] == 1
    assert found["jobs_total{code=image_not_found,state=failed}"] == 1
    assert found["jobs_total{code=invalid_job,state=failed}"] == 1
    ends = {
        end: found[f"job_attempts_total{{outcome={end}}}"] for end in ("done", "later", "dropped", "returned")
    }
    assert ends == {"done": 3, "later": 1, "dropped": 1, "returned": 1}
    assert found["messages_dropped_total"] == 1
    assert found["network_jobs_total{network=efficientnet_lite0,state=succeeded}"] == 1
    assert found["network_jobs_total{network=efficientnet_lite0,state=failed}"] == 1
    assert found["job_seconds_count{network=efficientnet_lite0,priority=normal}"] == 2
    assert found["network_device_seconds_total{network=efficientnet_lite0}"] > 0
    assert found["job_stage_seconds_count{stage=fetch}"] == 3
    assert found["job_stage_seconds_count{stage=upload}"] == 1
    assert found["job_stage_seconds_count{stage=queue}"] == 3
    assert found["batch_images_sum"] == found["batch_images_count"] == 1
    assert found["network_loads_total{outcome=loaded}"] == found["network_load_seconds_count"] == 1
    assert "jobs_in_flight" not in found


def test_networks_with_series_of_their_own_are_known_and_few(shop: Shop) -> None:
    shop.handle(shop.job(network="no-such-network"))
    assert read(shop.counted)["network_jobs_total{network=(others),state=failed}"] == 1
    counted = Metrics()
    for number in [*range(MAX_NETWORKS + 5), 0]:
        counted.job_ended(EndedJob(f"own-{number}", "high", "succeeded", 3, 0.5))
    found = read(counted)
    names = {name for name in found if name.startswith("network_jobs_total")}
    assert len(names) == MAX_NETWORKS + 1
    assert found["network_jobs_total{network=(others),state=succeeded}"] == 5
    assert found["network_jobs_total{network=own-0,state=succeeded}"] == 2
    assert found["job_seconds_bucket{le=5.0,network=own-1,priority=high}"] == 1


def test_a_canceled_job_has_no_time_to_its_end() -> None:
    counted = Metrics()
    counted.job_ended(EndedJob("own", "high", "canceled", 3, 0))
    assert {*read(counted)} - {f"build_info{{version={__version__}}}", "worker_starts_total"} == {
        "network_jobs_total{network=own,state=canceled}"
    }


def test_tenants_with_series_of_their_own_are_those_with_most_jobs_today() -> None:
    uses = {f"t{number:02}": TenantUse(1, number, 0.5) for number in range(MAX_TENANTS + 3)}
    counted, none = Metrics(), dict.fromkeys(ROUTES, 0)
    counted.set_ledger_gauges(lambda: QueueDepths(none, none, 0, 0, 0, 0, 0, 0, uses))
    found = read(counted)
    assert found["tenant_today_jobs{tenant=t22}"] == 22
    assert found["tenant_today_jobs{tenant=(others)}"] == 0 + 1 + 2
    assert found["tenant_queue_jobs{tenant=(others)}"] == 3
    assert found["tenant_today_device_seconds{tenant=t03}"] == 0.5
    assert "tenant_today_jobs{tenant=t02}" not in found


def test_what_tenants_use_is_read_from_the_ledger(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings)

    def submit(tenant: str) -> Any:
        made = Job.parse({**job.model_dump(mode="json"), "id": new_id()})
        return ledger.submit(made, tenant=Tenant(tenant))

    running = ledger.claim(submit("acme"), ME).document
    ledger.finish(running, status="succeeded", metrics={"device_s": 0.25})
    submit("acme")
    submit("acme")
    submit("zoo")
    ledger.server.redis.hset(f"{ledger.server.prefix}tenants", "idle", "{}")
    assert stats.read_depths(ledger.server, settings.lease_s).tenants == {
        "acme": TenantUse(2, 1, 0.25),
        "idle": TenantUse(0, 0, 0),
        "zoo": TenantUse(1, 0, 0),
    }


def test_a_job_is_in_flight_while_it_is_run(shop: Shop) -> None:
    seen: dict[str, float] = {}

    def load(_: object) -> Any:
        seen.update(read(shop.counted))
        message = "not to be had"
        raise WeightsUnavailable(message)

    shop.model_cache._load = load
    assert shop.handle(shop.job()) == Disposition.RETRY
    assert seen["jobs_in_flight"] == 1
    found = read(shop.counted)
    assert "jobs_in_flight" not in found
    assert found["network_loads_total{outcome=failed}"] == 1
    assert "network_load_seconds_count" not in found


def test_leases_are_counted_where_they_are_renewed_and_where_they_are_lost(shop: Shop) -> None:
    first, second = (shop.claim(shop.job()) for _ in range(2))

    def overtaken() -> None:
        with shop.leases.hold(first, deadline := Deadline(60)):
            with shop.leases.hold(second, Deadline(60)):
                shop.leases.renew()
            shop.now[0] += 20
            assert shop.ledger.expire_lease(first.id)
            shop.leases.renew()
            deadline.check("explain")

    with pytest.raises(AttemptFenced):
        overtaken()
    found = read(shop.counted)
    assert found["lease_renewals_total"] == 2
    assert found["leases_lost_total"] == 1
    third = shop.claim(shop.job())

    def handed_back() -> None:
        with shop.leases.hold(third, deadline := Deadline(60)):
            shop.leases.release_all()
            deadline.check("explain")

    with pytest.raises(AttemptFenced):
        handed_back()
    assert read(shop.counted)["leases_lost_total"] == 1, "what was handed back is not lost"


def test_what_the_reaper_puts_right_is_counted_once(shop: Shop) -> None:
    lost, ended = shop.claim(shop.job()), shop.claim(shop.job(max_attempts=1))
    due = shop.claim(shop.job())
    shop.ledger.postpone(due, delay_s=1)
    silent = shop.ledger.submit(shop.job())
    soon = datetime.now(UTC) + timedelta(seconds=30)
    shop.ledger.submit(shop.job(expires_at=soon.isoformat()))
    shop.now[0] += 60
    rung: list[str] = []
    reaper = Reaper(
        shop.ledger, "me", lambda job_id, _: rung.append(job_id), lambda _: 0,
        lease_s=0, lost_after_s=20, observer=shop.counted,
    )  # fmt: skip
    reaper._answered_s = time.monotonic()
    reaper.run_round()
    assert {lost.id, due.id, silent.id} <= set(rung)
    found = read(shop.counted)
    assert found["jobs_reaped_total{reason=lost}"] == 2, "also where it was the last attempt"
    assert found["jobs_reaped_total{reason=due}"] == 1
    assert found["jobs_reaped_total{reason=expired}"] == 1
    assert found["messages_republished_total"] == 1
    error = shop.ledger.read(ended.id).error
    assert error
    assert found[f"jobs_total{{code={error.code},state=failed}}"] == 1
    assert found["jobs_total{code=expired,state=expired}"] == 1


def test_deliveries_are_counted_by_how_they_end(shop: Shop) -> None:
    answers: dict[str, Exception | None] = {
        "http://a/well": None,
        "http://a/busy": StatusUnavailable("busy"),
        "http://a/gone": EndpointGone("gone"),
    }

    def send(delivery: Any, _: object) -> None:
        if error := answers[delivery.webhook.url]:
            raise error

    dispatcher = OutboxDispatcher(
        shop.ledger.outbox, send, {}, threads=1, give_up_s=99, observer=shop.counted
    )
    for url in answers:
        shop.ledger.submit(shop.job(webhooks=[{"url": url, "events": ["job.queued"]}]))
    dispatcher.run_round()
    found = read(shop.counted)
    outcomes = {
        one: found[f"events_delivered_total{{outcome={one}}}"] for one in ("delivered", "failed", "parked")
    }
    assert outcomes == {"delivered": 1, "failed": 1, "parked": 1}


def test_a_pass_of_a_shard_counts_its_images_and_the_warm_up_counts_nothing() -> None:
    counted = Metrics()
    model_cache = ModelCache(lambda _: TinyNetwork(), max_batch=0, observer=counted)
    network = model_cache.load(ROW)
    assert "batch_images_count" not in read(counted)
    model_cache.infer_many(network, np.zeros((6, 16, 16, 3), np.uint8), (-1,), GRADCAM, Deadline(60))
    found = read(counted)
    while "batch_images_count" not in found:  # it is told when whoever waited has been let go
        found = read(counted)
    assert (found["batch_images_count"], found["batch_images_sum"]) == (1, 6)
    assert model_cache.count == 1


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_bytes_are_counted_as_they_are_stored(where: str, tmp_path: Any, s3_settings: Any) -> None:
    from gradcam_worker.storage.s3 import S3

    output = f"file://{tmp_path}/out" if where == "folder" else "s3://results/counted"
    settings, counted = Settings(output=output, **s3_settings), Metrics()
    store = Stores(settings, S3(settings), counted).open()
    store.put_many([("a.txt", b"12345", "text/plain"), ("b.txt", b"12", "text/plain")], Deadline(60))
    assert read(counted)["artifact_bytes_total"] == 7


def test_the_ledgers_gauges_are_what_waits_there(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings)

    def submit(**changes: Any) -> Any:
        return ledger.submit(Job.parse({**job.model_dump(mode="json"), "id": new_id(), **changes}))

    submit(priority="high")
    submit(priority="bulk")
    submit(priority="bulk")
    ledger.claim(submit(), ME)
    retrying = ledger.claim(submit(), ME).document
    ledger.postpone(retrying, delay_s=60)
    ledger.finish(ledger.claim(submit(), ME).document, status="failed")
    submit(webhooks=[{"url": "http://a/x", "events": ["job.queued"]}])
    ledger.renew_leases("me", "well", {})
    time.sleep(0.05)
    found = stats.read_depths(ledger.server, settings.lease_s)
    assert found.queued == {"high": 1, "normal": 1, "low": 0, "bulk": 2, "shard": 0}
    assert {route for route, seconds in found.oldest_s.items() if 0.05 <= seconds < 60} == {
        "high",
        "normal",
        "bulk",
    }
    assert found.oldest_s["low"] == 0
    assert (found.retrying, found.running, found.dead, found.workers, found.events) == (1, 1, 1, 1, 1)
    assert 0.05 <= found.oldest_event_s < 60
    counted = Metrics()
    counted.set_ledger_gauges(lambda: found)
    shown = read(counted)
    assert shown["queue_jobs{priority=bulk}"] == 2
    assert shown["queue_oldest_seconds{priority=high}"] == found.oldest_s["high"]
    families = {one.name for one in text_string_to_metric_families(counted.scrape().decode())}
    assert {f"gradcam_{one.name}" for one in METRICS if one.source == "ledger"} <= families


def test_an_empty_ledger_is_all_zeros(settings: Settings) -> None:
    found = stats.read_depths(RedisLedger(settings).server, settings.lease_s)
    assert (found.events, found.oldest_event_s, found.workers, sum(found.queued.values())) == (0, 0, 0, 0)
    assert set(found.oldest_s.values()) == {0}


def test_the_ledger_is_asked_once_in_a_while_and_its_gauges_are_absent_while_it_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    def ask() -> Any:
        asked.append(1)
        message = "away"
        raise LedgerUnavailable(message)

    counted = Metrics()
    counted.set_ledger_gauges(ask)
    for _ in range(3):
        assert b"gradcam_queue_jobs" not in counted.scrape()
    assert len(asked) == 1
    monkeypatch.setattr(prometheus, "LEDGER_CACHE_S", -1)
    counted.scrape()
    assert len(asked) == 2


def test_one_scrape_at_most_waits_for_whoever_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, over, counted = threading.Event(), threading.Event(), Metrics()

    def ask() -> Any:
        asked.set()
        over.wait(30)
        raise LedgerUnavailable

    counted.set_ledger_gauges(ask)
    counted.set_device_gauges(lambda: DeviceUse(memory_bytes=7))
    monkeypatch.setattr(prometheus, "LOCK_TIMEOUT_S", 0.05)
    hangs = threading.Thread(target=counted.scrape, daemon=True)
    hangs.start()
    assert asked.wait(30)
    said = counted.scrape()
    assert hangs.is_alive(), "this one has not waited for it"
    assert b"gradcam_queue_jobs" not in said
    assert b"gradcam_device_memory_bytes 7.0" in said
    over.set()
    hangs.join()


class Driver(SimpleNamespace):
    """pynvml, as far as it is used, on a machine with one GPU."""

    class NVMLError(Exception):
        """What its functions raise."""

    def __init__(self, *, tells: bool = True, there: bool = True) -> None:
        self.tells, self.there = tells, there
        self.asked_for: str | int = ""

    def nvmlInit(self) -> None:  # noqa: N802  # the names are the library's
        if not self.there:
            raise self.NVMLError

    def by(self, name: str | int) -> str:
        self.asked_for = name
        return "handle"

    nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByIndex = by  # noqa: N815

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=123)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        if not self.tells:
            raise self.NVMLError
        return SimpleNamespace(gpu=50)


def test_a_gpu_is_told_of_by_its_driver_and_none_is_absent() -> None:
    driver, counted = Driver(), Metrics()
    use = gpu.usage_reader("GPU-1234", driver)
    assert use
    assert (driver.asked_for, use()) == ("GPU-1234", DeviceUse(123, 0.5))
    counted.set_device_gauges(use)
    found = read(counted)
    assert (found["device_memory_bytes"], found["device_utilization_ratio"]) == (123, 0.5)
    part: Callable[[], DeviceUse] | None = gpu.usage_reader("0", Driver(tells=False))
    assert part
    assert part() == DeviceUse(123, None), "a part of a GPU does not say how busy it is"
    assert gpu.usage_reader("0", Driver(there=False)) is None
    without = Metrics()
    assert b"gradcam_device" not in without.scrape()


def no_ledger() -> QueueDepths:
    raise LedgerUnavailable


def scraped(process: str, text: bytes | None, starts: int = 1) -> ProcessScrape:
    return ProcessScrape(process, process.startswith("engine"), starts, text)


def samples(text: bytes, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """Labels -> value, of all samples of this name."""
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == f"gradcam_{name}"
    }


def test_metrics_of_several_processes_are_told_apart_by_the_process() -> None:
    engine, first, second = Metrics(role="engine"), Metrics(role="jobs"), Metrics(role="jobs")
    engine.batch_computed(5, 0.1)
    for counted, size in ((first, 3), (second, 4)):
        counted.artifact_written(size)
        counted.stages_measured({"fetch_s": size})
    host = HostMetrics(no_ledger)
    text = host.render(
        [
            scraped("engine-0", engine.scrape(), 4),
            scraped("jobs-0-1", first.scrape()),
            scraped("jobs-0-2", second.scrape(), 2),
        ],
        host.ledger_gauges(),
    )
    assert samples(text, "artifact_bytes_total") == {
        (("process", "jobs-0-1"),): 3,
        (("process", "jobs-0-2"),): 4,
    }
    fetched = samples(text, "job_stage_seconds_sum")
    assert fetched[("process", "jobs-0-2"), ("stage", "fetch")] == 4
    assert samples(text, "batch_images_sum") == {(("process", "engine-0"),): 5}
    assert samples(text, "engine_restarts_total") == {(("process", "engine-0"),): 3}
    assert samples(text, "worker_starts_total")[(("process", "jobs-0-2"),)] == 2
    assert set(samples(text, "process_up").values()) == {1}
    assert {dict(labels)["process"] for labels in samples(text, "build_info")} == {
        *("engine-0", "jobs-0-1", "jobs-0-2", "supervisor")
    }
    lines = text.decode().splitlines()
    kinds = [line for line in lines if line.startswith("# TYPE")]
    assert len(kinds) == len({line.split()[2] for line in kinds}), "each metric is declared once"
    assert not [line for line in lines if line.startswith("gradcam_") and 'process="' not in line]


@pytest.mark.parametrize("text", [None, b"\xff", b'gradcam_ready{process="', b"{}{}", b"gradcam_ready x"])
def test_a_process_that_answers_nothing_or_no_metrics_is_down_and_the_others_are_shown(
    text: bytes | None,
) -> None:
    well = Metrics(role="jobs")
    well.artifact_written(3)
    found = HostMetrics(no_ledger).render(
        [scraped("engine-0", text, 2), scraped("jobs-0-1", well.scrape())], []
    )
    assert samples(found, "process_up") == {(("process", "engine-0"),): 0, (("process", "jobs-0-1"),): 1}
    assert samples(found, "worker_starts_total")[(("process", "engine-0"),)] == 2
    assert samples(found, "artifact_bytes_total") == {(("process", "jobs-0-1"),): 3}
    assert (("process", "engine-0"),) not in samples(found, "ready")


def test_an_answer_that_breaks_off_anywhere_does_no_harm() -> None:
    whole = b'# TYPE gradcam_ready gauge\ngradcam_ready{a="\\"x\\\\",b="y"} 1.0 17\n'
    for length in range(len(whole)):
        text = HostMetrics(no_ledger).render([scraped("jobs-0-1", whole[:length])], [])
        assert len(samples(text, "process_up")) == 1


def test_no_label_of_a_process_can_pretend_to_be_something_else() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("gradcam_hostile", "Help.", ["name", "process"], registry=registry)
    hostile = ['"} 1\ngradcam_ready{process="engine-0"} 1', "\\", "a\nb", "{},=", "\\n", "ü"]
    for number, name in enumerate(hostile):
        gauge.labels(name, "engine-0").set(number)
    text = HostMetrics(no_ledger).render([scraped("jobs-0-1", generate_latest(registry))], [])
    assert samples(text, "hostile") == {
        (("name", name), ("process", "jobs-0-1")): number for number, name in enumerate(hostile)
    }
    assert not samples(text, "ready")


def test_a_metric_that_another_process_declares_otherwise_is_left_out() -> None:
    gauge = b"# TYPE gradcam_x gauge\ngradcam_x 1\n"
    histogram = b"# TYPE gradcam_x histogram\ngradcam_x_count 2\n"
    text = HostMetrics(no_ledger).render([scraped("jobs-0-1", gauge), scraped("jobs-0-2", histogram)], [])
    assert samples(text, "x") == {(("process", "jobs-0-1"),): 1}
    assert not samples(text, "x_count")


def test_the_ledgers_gauges_are_there_once_for_all_processes() -> None:
    each = dict.fromkeys(ROUTES, 2)
    depths = QueueDepths(each, dict.fromkeys(each, 1.0), 1, 1, 1, 1, 1.0, 5)
    host = HostMetrics(lambda: depths)
    jobs = [scraped(f"jobs-0-{number}", Metrics(role="jobs").scrape()) for number in (1, 2)]
    text = host.render(jobs, host.ledger_gauges())
    assert samples(text, "workers_alive") == {(): 5}
    assert len(samples(text, "queue_jobs")) == len(ROUTES)


def families(text: bytes) -> set[str]:
    return {family.name for family in text_string_to_metric_families(text.decode())}


def test_each_process_shows_its_own_metrics_and_a_host_all_that_a_worker_process_shows() -> None:
    by_role = {role: families(Metrics(role=role).scrape()) for role in ("worker", "engine", "jobs")}
    for one in METRICS:
        for role, shown in by_role.items():
            is_expected = role in one.roles and one.source == "process"
            assert (f"gradcam_{one.name.removesuffix('_total')}" in shown) == is_expected, (one.name, role)
    scrapes = [scraped(f"{role}-0", Metrics(role=role).scrape()) for role in ("engine", "jobs")]
    shown = families(HostMetrics(no_ledger).render(scrapes, []))
    assert by_role["worker"] < shown
    assert {one.removeprefix("gradcam_") for one in shown - by_role["worker"]} == {
        *("engine_requests_resent", "engine_requests_in_flight", "engine_restarts", "process_up"),
        *("pixel_pool_free_bytes", "pixel_pool_wait_seconds"),
    }
