"""Traces and logs of a real worker: a collector of ours, and what the process writes to standard error."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

pytestmark = [pytest.mark.live]

WAIT_S = 90
BELOW = {"claim", "fetch", "decode", "load", "explain", "render", "upload", "write", "webhook"}


@dataclass
class Collector:
    """An OTLP/HTTP receiver that keeps what it was sent: (service, span)."""

    endpoint: str
    received: list[tuple[str, Span]] = field(default_factory=list)

    def of(self, trace_id: bytes) -> dict[str, tuple[str, Span]]:
        """Name -> (service, span) of one trace."""
        found = [(service, one) for service, one in self.received if one.trace_id == trace_id]
        return {one.name.removeprefix("gradcam."): (service, one) for service, one in found}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            body = self.rfile.read(int(self.headers["content-length"]))
            for some in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {one.key: one.value.string_value for one in some.resource.attributes}
                for scope in some.scope_spans:
                    there.received += [(named["service.name"], one) for one in scope.spans]
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        there = Collector(f"http://127.0.0.1:{listener.server_port}")
        threading.Thread(target=listener.serve_forever, args=[0.05], daemon=True).start()
        yield there
        listener.shutdown()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("job_processes", [0, 2])
def test_a_job_is_one_trace_and_its_lines_are_objects_that_name_it(
    job_processes: int, make_stage: Any, collector: Collector, public_server: Any, answer: Any, photos: Any
) -> None:
    name = f"traced-{job_processes}"
    stage = make_stage(name, traces=collector.endpoint, log_format="json", job_processes=job_processes)
    photo = (photos / "coffee.jpg").read_bytes()
    image = public_server.url(f"/{name}.jpg", answer(200, photo))
    hook = {"url": public_server.url(f"/{name}", answer(204))}
    fields = {"network": "efficientnet_lite0", "target": {"top_n": 1}, "webhooks": [hook]}
    with stage.worker("worker", tiny=True):
        with stage.client as client:
            job_id = client.submit(image=image, **fields)
            lost = client.submit(image="s3://photos/none.jpg", **fields)
            document = client.wait(job_id, WAIT_S)
            assert client.wait(lost, WAIT_S).status == "failed"
        wait_for(lambda: sum(path == f"/{name}" for path, _ in public_server.received) == 2)
        assert document.status == "succeeded", document.error
        trace_id = bytes.fromhex((document.traceparent or "")[3:35])
        wait_for(lambda: collector.of(trace_id).keys() >= BELOW | {"submit", "queue", "job"})

    spans = collector.of(trace_id)
    ids = {name: one.span_id for name, (_, one) in spans.items()}
    above = {name: one.parent_span_id for name, (_, one) in spans.items()}
    assert above["submit"] == b""
    assert above["queue"] == above["job"] == ids["submit"]
    assert {above[name] for name in BELOW} == {ids["job"]}
    services = {name: service for name, (service, _) in spans.items()}
    assert services == {**dict.fromkeys(spans, "gradcam-worker"), "submit": "gradcam-client"}
    batches = [(service, link.span_id) for service, one in collector.received for link in one.links]
    computing = "gradcam-engine" if job_processes else "gradcam-worker"
    assert [service for service, span_id in batches if span_id == ids["explain"]] == [computing]

    sent = dict(zip([path for path, _ in public_server.received], public_server.headers, strict=True))
    assert "traceparent" not in sent[f"/{name}.jpg"], "who keeps images is a stranger"
    heard = [
        headers["traceparent"]
        for (path, body), headers in zip(public_server.received, public_server.headers, strict=True)
        if path == f"/{name}" and json.loads(body)["data"]["id"] == job_id
    ]
    assert [one[3:52] for one in heard] == [f"{trace_id.hex()}-{ids['webhook'].hex()}"]

    lines = [json.loads(line) for line in stage.log("worker").splitlines()]
    assert {one["logger"] for one in lines} >= {"gradcam", "gradcam.supervisor"}
    (last,) = [one for one in lines if one.get("job_id") == job_id and "succeeded" in one["message"]]
    assert (last["attempt"], last["trace_id"]) == (1, trace_id.hex())
    assert document.worker is not None
    assert last["worker"] == document.worker.id
