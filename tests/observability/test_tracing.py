"""Spans of jobs that run in memory; the real thing is in tests/live/test_traces.py."""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.delivery.dispatcher import OutboxDispatcher
from gradcam_worker.errors import ImageFetchFailed, InvalidSettings, StatusUnavailable
from gradcam_worker.execution.handler import JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.observability import logs, tracing
from gradcam_worker.observability.tracing import Traces
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, RecordingPublisher, fake_services

IMAGE = cv2.imencode(".png", np.full((20, 20, 3), (0, 0, 255), np.uint8))[1].tobytes()
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
FIELDS = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}


@dataclass
class Office:
    """A client, a desk and a courier, in memory, whose spans are kept."""

    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)
    sampler: Sampler | None = None
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    published: RecordingPublisher = field(default_factory=RecordingPublisher)
    images: dict[str, bytes | Exception] = field(default_factory=lambda: {"s3://in/a.png": IMAGE})

    def __post_init__(self) -> None:
        provider = TracerProvider(sampler=self.sampler)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")
        self.client = GradcamClient(settings=Settings(), ledger=self.ledger, publish=self.published)
        self.client.calls._traces = self.traces = Traces(self.tracer)

    def handle(self, payload: Any, kind: Any = Job) -> StatusDocument:
        me = WorkerRef(id="w", device="cpu")
        around, leases = fake_services(self.images), LeaseManager(self.ledger, "w", 15)
        breaker = CircuitBreaker(lambda: None)
        handler = JobHandler(
            Settings(), self.ledger, around, me, leases, breaker, traces=self.traces, admits=lambda _: True
        )
        handler.handle(payload, payload["id"], kind=kind)
        return self.ledger.read(payload["id"])

    def run(self, **changes: Any) -> StatusDocument:
        """Submit a job, and run it."""
        job_id = self.client.submit(**{**FIELDS, **changes})
        return self.handle(self.published.jobs[-1].model_dump(mode="json") | {"id": job_id})

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        """The last of each name."""
        return {one.name.removeprefix("gradcam."): one for one in self.exporter.get_finished_spans()}

    def parents(self) -> dict[str, str]:
        """Which span is whose child: by names; CALLER by its id."""
        names = {one.context.span_id: name for name, one in self.spans.items() if one.context}
        found = {}
        for name, one in self.spans.items():
            above = one.parent.span_id if one.parent else 0
            found[name] = names.get(above, f"{above:016x}" if above else "")
        return found


@pytest.fixture
def office() -> Office:
    return Office()


def trace_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"{span.context.trace_id:032x}"


def lasted_s(span: ReadableSpan) -> float:
    return ((span.end_time or 0) - (span.start_time or 0)) / 1e9


STAGES = ("fetch", "decode", "load", "explain", "render", "upload", "write")


def test_a_job_is_one_trace_from_submit_to_its_last_word(office: Office) -> None:
    document = office.run()
    assert document.status == "succeeded"
    stages = {"claim": "job", **dict.fromkeys(STAGES, "job")}
    assert office.parents() == {"submit": "", "queue": "submit", "job": "submit", **stages, "batch": ""}
    (of_all,) = {trace_of(one) for name, one in office.spans.items() if name != "batch"}
    assert tracing.trace_id(document.traceparent) == of_all, "where the document says it is to be found"
    facts = office.spans["job"].attributes or {}
    assert (facts["gradcam.job_id"], facts["gradcam.attempt"]) == (document.id, 1)
    assert (facts["gradcam.status"], facts["gradcam.worker"]) == ("succeeded", "w")
    assert (office.spans["explain"].attributes or {})["gradcam.batch_size"] == 1


def test_each_span_is_on_the_page_of_telemetry(office: Office) -> None:
    with deliveries(office, Heard(), metrics=["deletion"]):
        pass
    page = (
        (Path(__file__).parents[2] / "docs" / "how-to" / "telemetry.md").read_text().partition("## Traces")[2]
    )
    assert set(re.findall(r"`gradcam\.([a-z]+)`", page)) == office.spans.keys()


def test_the_spans_of_a_job_follow_each_other_and_leave_no_time_out(office: Office) -> None:
    office.run()
    spans = [office.spans[name] for name in ("queue", "claim", *STAGES)]
    starts = [one.start_time or 0 for one in spans]
    assert starts == sorted(starts)
    assert all(lasted_s(one) >= 0 for one in spans)
    assert office.spans["claim"].start_time == office.spans["queue"].end_time


def test_a_batch_is_linked_to_the_jobs_in_it_and_is_no_ones_child(office: Office) -> None:
    document = office.run()
    batch, explain = office.spans["batch"], office.spans["explain"]
    assert trace_of(batch) != trace_of(explain)
    assert [one.context for one in batch.links] == [explain.context]
    took_s = document.metrics["explain_s"]
    assert lasted_s(batch) == pytest.approx(took_s, abs=1e-3)


def test_a_job_goes_on_in_the_trace_that_it_names(office: Office) -> None:
    document = office.run(traceparent=TRACEPARENT)
    parents = office.parents()
    assert (parents["submit"], parents["job"], parents["queue"]) == (CALLER, CALLER, CALLER)
    assert tracing.trace_id(document.traceparent) == TRACE


def test_a_caller_who_has_a_span_is_followed_though_this_process_makes_none(office: Office) -> None:
    office.client.calls._traces = tracing.NO_TRACES
    with office.tracer.start_as_current_span("request") as request:
        office.run()
        office.client.submit_many([FIELDS])
    mine = f"{request.get_span_context().span_id:016x}"
    assert [(job.traceparent or "")[36:52] for job in office.published.jobs] == [mine, mine]
    assert trace_of(office.spans["job"]) == f"{request.get_span_context().trace_id:032x}"


def test_a_job_without_a_trace_begins_one_in_the_worker_and_stays_in_it(office: Office) -> None:
    office.images["s3://in/a.png"] = ImageFetchFailed("not now")
    job = Job.parse(FIELDS)
    assert office.handle(job.model_dump(mode="json")).status == "retrying"
    first = office.spans["job"]
    assert first.parent is None
    office.images["s3://in/a.png"] = IMAGE
    office.ledger._due[job.id] = 0
    office.ledger.requeue(job.id)
    assert office.handle({"id": job.id}).status == "succeeded"
    assert trace_of(office.spans["job"]) == trace_of(first), "the next attempt, too"


def test_a_failure_is_seen_at_its_stage_and_at_the_job_without_a_stack(office: Office) -> None:
    office.run(image="s3://in/none.png")
    for name in ("fetch", "job"):
        span = office.spans[name]
        assert (span.attributes or {})["error.type"] == "image_not_found"
        assert span.status.status_code is trace.StatusCode.ERROR
        assert not span.events
    assert (office.spans["job"].attributes or {})["gradcam.status"] == "failed"


def test_of_what_nobody_foresaw_a_span_says_no_more_than_the_document_does(office: Office) -> None:
    office.images["s3://in/a.png"] = RuntimeError("surprise")
    document = office.run()
    fetch, job = office.spans["fetch"], office.spans["job"]
    assert ((fetch.attributes or {})["error.type"], fetch.status.description) == ("RuntimeError", None)
    assert (job.attributes or {})["error.type"] == "internal"
    assert document.error is not None
    assert document.error.detail.startswith(str(job.status.description))


def test_who_does_not_sample_is_heeded(office: Office) -> None:
    document = office.run(traceparent=TRACEPARENT[:-2] + "00")
    assert document.status == "succeeded"
    assert not office.spans.keys() - {"batch"}


@pytest.mark.parametrize("said", ["-" * 55, f"00-{'0' * 32}-{CALLER}-01", f"ff-{TRACE}-{CALLER}-01"])
def test_a_traceparent_that_is_none_begins_a_trace(office: Office, said: str) -> None:
    assert office.run(traceparent=said).status == "succeeded"
    assert office.spans["job"].parent is None
    assert tracing.trace_id(said) is None


def test_the_rows_of_a_shard_are_read_and_computed_in_its_own_trace(office: Office) -> None:
    shard = Shard(
        backfill=new_id(),
        index=0,
        key=f"{0:08d}-{'0' * 16}",
        first=0,
        rows=(Row(uri="s3://in/a.png"),),
        network="efficientnet_lite0",
        target=Job.parse(FIELDS).target,
        output="s3://out/b",
    )
    assert office.ledger.submit(shard).traceparent is None
    document = office.handle({"id": shard.id}, Shard)
    assert document.status == "succeeded", document.error
    assert office.spans["batch"].links[0].context == office.spans["explain"].context, "from a pool's thread"
    assert trace_of(office.spans["explain"]) == tracing.trace_id(document.traceparent)


class Failing(Sampler):
    """An operator's own, with a mistake."""

    def should_sample(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError

    def get_description(self) -> str:
        return "failing"


def test_what_fails_in_opentelemetry_touches_no_job() -> None:
    office = Office(sampler=Failing())
    assert office.run().status == "succeeded"
    assert not office.spans


@dataclass
class Heard:
    """What a receiver was sent, and in which context."""

    failure: Exception | None = None
    headers: list[dict[str, str]] = field(default_factory=list)
    bound: list[dict[str, object]] = field(default_factory=list)

    def __call__(self, *_: object) -> None:
        self.headers.append(tracing.propagation_headers())
        self.bound.append({**logs._context_fields.get()})
        if self.failure:
            raise self.failure


@contextmanager
def deliveries(office: Office, heard: Heard, **job: Any) -> Iterator[StatusDocument]:
    """A job with a webhook that has ended; then its parcels are brought."""
    hook = {"url": "http://hook.test/"}
    document = office.run(webhooks=[hook], **job)
    yield document
    OutboxDispatcher(
        office.ledger.outbox, heard, {}, threads=1, give_up_s=60, traces=office.traces
    ).run_round()


def test_the_webhook_is_told_below_its_job_and_hears_of_its_span(office: Office) -> None:
    heard = Heard()
    with deliveries(office, heard) as document:
        pass
    assert office.parents()["webhook"] == "job"
    webhook = office.spans["webhook"]
    assert webhook.context is not None
    trace_id, (headers,) = trace_of(webhook), heard.headers
    assert headers["traceparent"][:52] == f"00-{trace_id}-{webhook.context.span_id:016x}"
    assert heard.bound == [{"job_id": document.id, "attempt": 1, "trace_id": trace_id}]
    assert webhook.kind is trace.SpanKind.CLIENT


def test_a_delivery_in_vain_is_seen(office: Office) -> None:
    with deliveries(office, Heard(StatusUnavailable("busy"))):
        pass
    assert (office.spans["webhook"].attributes or {})["error.type"] == "status_unavailable"


def test_without_traces_a_receiver_gets_no_header_and_the_log_still_names_the_trace(office: Office) -> None:
    office.traces = office.client.calls._traces = tracing.NO_TRACES
    heard = Heard()
    with deliveries(office, heard, traceparent=TRACEPARENT) as document:
        pass
    assert (heard.headers, heard.bound[0]["trace_id"]) == ([{}], TRACE)
    assert document.traceparent == TRACEPARENT
    assert not office.spans


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    program = """
import sys
def loaded():
    return {name for name in sys.modules if name.startswith("opentelemetry")}
import redis
before = loaded()  # where it is installed, redis-py looks at it for metrics of its own
import gradcam_worker.runtime.processes.worker_process, gradcam_worker.runtime.processes.supervisor
import gradcam_worker.operations.doctor
import cv2, numpy
from gradcam_worker.testing import eager_client
image = cv2.imencode(".png", numpy.zeros((32, 32, 3), numpy.uint8))[1].tobytes()
client = eager_client({"s3://in/a.png": image})
print(client.wait(client.submit(image="s3://in/a.png", network="vgg16", target={"top_n": 1})).status)
print(sorted(loaded() - before), before & {"opentelemetry.sdk.trace", "opentelemetry.exporter"})
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["succeeded", "[] set()"]


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [
        ("collector:4318", "'collector:4318' has no scheme"),
        ("grpc://collector:4317", "'grpc://collector:4317' has another scheme than http or https"),
        ("http://", "'http://' names no host"),
        ("http://[::1", "'http://...' has a host that cannot be read"),
        ("http://u:planted@collector:0", "'http://collector:0' has a port that is no number from 1 to 65535"),
        ("http://u:pla#planted@collector", "'http://...' has an @ behind its host"),
    ],
)
def test_a_wrong_endpoint_is_refused_with_the_part_that_is_wrong(endpoint: str, problem: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({"GRADCAM_TRACES": endpoint})
    assert str(caught.value).startswith(f"GRADCAM_TRACES: {problem}")
    assert "it must look like http://collector:4318" in str(caught.value)
    assert "planted" not in str(caught.value)


def test_an_address_without_a_path_gets_that_of_the_standard_and_no_password_is_shown() -> None:
    assert tracing._export_url("http://collector:4318")[0] == "http://collector:4318/v1/traces"
    assert tracing._export_url("https://user:word@collector/otlp/v1/traces") == (
        "https://user:word@collector/otlp/v1/traces",
        "https://collector",
    )


def test_a_collector_that_is_away_is_spoken_of_once_and_again_when_it_was_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from opentelemetry.sdk.trace.export import SpanExportResult

    answers: list[Any] = [SpanExportResult.FAILURE, OSError(), SpanExportResult.SUCCESS, OSError()]

    class Exporter:
        def export(self, spans: Any) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    quiet = tracing._SafeExporter(Exporter(), "http://collector:4318")
    with caplog.at_level(logging.WARNING, "gradcam"):
        results = [quiet.export([]) for _ in range(4)]
    assert [one is SpanExportResult.SUCCESS for one in results] == [False, False, True, False]
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("traces_dropped collector=http://collector:4318 ")


def test_a_process_whose_collector_is_away_ends_soon_and_says_why(free_port: int) -> None:
    program = f"""
from gradcam_worker.observability import tracing
from gradcam_worker.observability.logs import configure_logging
configure_logging("text", "info")
away = tracing.connect("http://127.0.0.1:{free_port}", "test")
for _ in range(3000):  # more than may wait
    with away.start_span("one"):
        pass
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stderr.count(f"traces_dropped collector=http://127.0.0.1:{free_port}") == 1
