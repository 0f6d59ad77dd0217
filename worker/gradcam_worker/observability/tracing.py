"""Traces, from `submit` to the webhook's delivery: the only module that uses OpenTelemetry. Off by default.

    caller's span -> submit -> queue
                            -> job (an attempt) -> claim, fetch, decode, load, explain, render, upload, write
                                                -> webhook
    batch: a trace of its own, with links to the `explain` of each job in it

They are connected by the W3C `traceparent` in the job, and later in its status document. `Traces.start_span`
starts the outermost span of a thread's work; below it, `span` and `annotate` find the current span in the
context. Without a current span they do nothing, and OpenTelemetry is not imported.
"""

import atexit
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from typing import Any, Literal

from gradcam_worker import __version__, extras
from gradcam_worker.errors import GradcamError, InvalidSettings
from gradcam_worker.text import urls
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

DEFAULT_PATH = "/v1/traces"  # of OTLP/HTTP, for an endpoint without a path
EXPORT_TIMEOUT_S = 2.0  # for a batch of spans, including retries
SHUTDOWN_TIMEOUT_S = 2.0  # for the spans that are left; a batch that is being sent may add EXPORT_TIMEOUT_S
MAX_QUEUED_SPANS = 2048  # beyond that the oldest are dropped
MAX_ERROR_LENGTH = 200  # characters of an error's message
TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Kind = Literal["INTERNAL", "PRODUCER", "CONSUMER", "CLIENT"]
Attribute = str | int | float | bool
LinkTarget = tuple[Any, Any]  # a tracer, and the context of a span

_tracer: ContextVar[Any] = ContextVar("gradcam_tracer", default=None)  # of the outermost span of this context


class Traces:
    """Starts the outermost spans of a process; does nothing without a tracer."""

    def __init__(self, tracer: Any = None) -> None:
        """`tracer` is an OpenTelemetry tracer, or None."""
        self._tracer = tracer

    @contextmanager
    def start_span(
        self,
        name: str,
        traceparent: str | None = None,
        *,
        kind: Kind = "INTERNAL",
        since: datetime | None = None,
        **attributes: Attribute | None,
    ) -> Iterator[None]:
        """Record a span for the block, within which this module's functions record theirs.

        They also do in the threads of a `ContextThreadPool`.

        Args:
            name: Without the prefix `gradcam.`.
            traceparent: The parent. None: the current span, if any, else a new trace.
            kind: OpenTelemetry's kind of a span.
            since: When it started; None: now.
            **attributes: Recorded with the prefix `gradcam.`; those that are None are left out.
        """
        if self._tracer is None:
            yield
            return
        token = _tracer.set(self._tracer)
        try:
            with _span(self._tracer, name, attributes, kind, _context_of(traceparent), since):
                yield
        finally:
            _tracer.reset(token)

    def link_target(self, traceparent: str | None) -> LinkTarget | None:
        """Return a span of another process as a target for the links of `record_batch`.

        Args:
            traceparent: Of the span; None: there is none.
        """
        match = TRACEPARENT.fullmatch(traceparent or "")
        if self._tracer is None or not match:
            return None
        from opentelemetry.trace import SpanContext, TraceFlags

        _, trace, span_id, flags = (int(part, 16) for part in match[0].split("-"))
        return self._tracer, SpanContext(trace, span_id, is_remote=True, trace_flags=TraceFlags(flags))


NO_TRACES = Traces()


@cache  # one queue and one thread for each endpoint, however many clients a process creates
def connect(endpoint: str, service: str, instance: str = "") -> Traces:
    """Return traces that send spans to an OTLP/HTTP endpoint, in a background thread.

    A collector that cannot be reached is logged once and affects no job.

    Args:
        endpoint: As GRADCAM_TRACES; empty: no traces.
        service: The attribute service.name.
        instance: The attribute service.instance.id.

    Raises:
        InvalidSettings: The extra otel is not installed.
    """
    if not endpoint:
        return NO_TRACES
    url, shown = _export_url(endpoint)
    with extras.required("GRADCAM_TRACES", raises=InvalidSettings):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    resource = {"service.name": service, "service.version": __version__}
    resource |= {"service.instance.id": instance} if instance else {}
    exporter: Any = _SafeExporter(OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S), shown)
    provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, MAX_QUEUED_SPANS, schedule_delay_millis=1000))

    def shut_down() -> None:
        exporter.limit_remaining_time()
        provider.shutdown()

    atexit.register(shut_down)
    return Traces(provider.get_tracer("gradcam", __version__))


def _export_url(endpoint: str) -> tuple[str, str]:
    """The URL that spans are posted to, and the server's for log lines, without user and password."""
    url = urls.parse(endpoint)
    path = url.path if url else ""
    shown = f"{url.scheme}://{url.host_port}" if url else "..."
    return (endpoint if path.strip("/") else endpoint.rstrip("/") + DEFAULT_PATH), shown


def span(name: str, **attributes: Attribute | None) -> AbstractContextManager[None]:
    """Record a span for the block, below the current one. For the arguments see `Traces.start_span`."""
    tracer = _tracer.get()
    return nullcontext() if tracer is None else _span(tracer, name, attributes)


def record_past_span(name: str, started: datetime, ended: datetime, traceparent: str | None = None) -> None:
    """Record a span that is over already.

    Args:
        name: Without the prefix `gradcam.`.
        started: When it started.
        ended: When it ended. If it is earlier, because another machine's clock set it, `started` counts.
        traceparent: The parent; None: the current span.
    """
    tracer = _tracer.get()
    if tracer is not None:
        with suppress(Exception):  # an operator's sampler may fail
            started_ns = _ns(started)
            past = tracer.start_span(f"gradcam.{name}", _context_of(traceparent), start_time=started_ns)
            past.end(max(started_ns, _ns(ended)))


def annotate(error: Exception | None = None, **attributes: Attribute | None) -> None:
    """Add attributes to the current span; with `error`, mark it as failed without raising."""
    if _tracer.get() is not None:
        from opentelemetry.trace import get_current_span

        with suppress(Exception):
            current = get_current_span()
            current.set_attributes(_prefixed(attributes))
            if error is not None:
                _set_error(current, error)


def current_traceparent() -> str | None:
    """Return the `traceparent` of the current span, if any: ours, or one of an app with OpenTelemetry."""
    get_current_span = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if get_current_span is None:  # not imported, so no span was started in this process
        return None
    context = get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def propagation_headers() -> dict[str, str]:
    """Return the HTTP headers that carry our current span to a receiver; empty without one."""
    traceparent = current_traceparent() if _tracer.get() is not None else None
    return {"traceparent": traceparent} if traceparent else {}


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace id, 32 hexadecimal digits; None for a `traceparent` that is not valid."""
    match = TRACEPARENT.fullmatch(traceparent or "")
    return match[1] if match else None


def link_target() -> LinkTarget | None:
    """Return the current span as a target for the links of `record_batch`; None without one."""
    tracer = _tracer.get()
    if tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    return tracer, get_current_span().get_span_context()


def record_batch(targets: Iterable[LinkTarget | None], started_s: float, duration_s: float) -> None:
    """Record the span of a batch: a trace of its own, linked to the spans of the jobs in it.

    Args:
        targets: The `link_target` of each job.
        started_s: By `time.monotonic`.
        duration_s: Seconds.
    """
    linked = [target for target in targets if target]
    if linked:
        with suppress(Exception):  # nothing here may end the device's thread
            from opentelemetry.context import Context
            from opentelemetry.trace import Link

            tracer, links = linked[0][0], [Link(context) for _, context in linked]
            started_ns = time.time_ns() - int((time.monotonic() - started_s) * 1e9)
            batch = tracer.start_span(
                "gradcam.batch",
                Context(),
                links=links,
                attributes={"gradcam.batch.requests": len(linked)},
                start_time=started_ns,
            )
            batch.end(started_ns + int(duration_s * 1e9))


@contextmanager
def _span(
    tracer: Any,
    name: str,
    attributes: Mapping[str, Attribute | None],
    kind: Kind = "INTERNAL",
    context: Any = None,
    since: datetime | None = None,
) -> Iterator[None]:
    from opentelemetry.trace import INVALID_SPAN, SpanKind, use_span

    current: Any = INVALID_SPAN
    with suppress(Exception):  # an operator's sampler may fail
        current = tracer.start_span(
            f"gradcam.{name}",
            context,
            kind=SpanKind[kind],
            attributes=_prefixed(attributes),
            start_time=_ns(since) if since else None,
        )
    with use_span(current, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except Exception as error:
            _set_error(current, error)
            raise


def _set_error(span: Any, error: Exception) -> None:
    """Mark a span as failed, with the type of its error, and the message of ours: others may hold secrets."""
    from opentelemetry.trace import StatusCode

    kind, message = type(error).__name__, None
    if isinstance(error, GradcamError):
        kind, message = error.code, str(error)[:MAX_ERROR_LENGTH]
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, message)


def _context_of(traceparent: str | None) -> Any:
    """OpenTelemetry's context for a `traceparent`; None, which means the current one, if it is not valid."""
    if not trace_id(traceparent):
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent or ""}, Context())


def _prefixed(attributes: Mapping[str, Attribute | None]) -> dict[str, Attribute]:
    return {f"gradcam.{name}": value for name, value in attributes.items() if value is not None}


def _ns(moment: datetime) -> int:
    return int(moment.timestamp() * 1e9)


class _SafeExporter:
    """An exporter that raises nothing and logs once that the collector is unreachable."""

    def __init__(self, exporter: Any, shown: str) -> None:
        self._exporter, self._shown = exporter, shown
        self._reachable, self._deadline_s = True, float("inf")

    def export(self, spans: Any) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        result: Any = SpanExportResult.FAILURE
        if time.monotonic() < self._deadline_s:
            with suppress(Exception):
                result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS and self._reachable:
            log.warning("traces_dropped", collector=self._shown, reason="the collector cannot be reached")
        self._reachable = result is SpanExportResult.SUCCESS
        return result

    def limit_remaining_time(self) -> None:
        """Drop spans that are not sent within SHUTDOWN_TIMEOUT_S, because the process ends."""
        self._deadline_s = time.monotonic() + SHUTDOWN_TIMEOUT_S

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))
