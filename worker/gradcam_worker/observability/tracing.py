"""Traces, from `submit` to the webhook's delivery: the one door to OpenTelemetry, shut by default.

    caller's span -> submit -> queue
                            -> job (an attempt) -> claim, fetch, decode, load, explain, render, upload, write
                                                -> webhook
    batch: a trace of its own, with links to the `explain` of each job in it

What joins them is the W3C `traceparent` that the job carries, and its document after it. `Traces` begins a
span at the top of a thread's work; below it `span` and `note` find it by the context. Where there is none
they do nothing, and nothing of OpenTelemetry is imported.
"""

import atexit
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from datetime import datetime
from functools import cache
from typing import Any, Literal

from gradcam_worker import __version__
from gradcam_worker.errors import GradcamError, InvalidSettings
from gradcam_worker.text import urls

log = logging.getLogger("gradcam")

PATH = "/v1/traces"  # of OTLP/HTTP, where an address names none
EXPORT_S = 2.0  # that a collector has to take a batch of spans, all tries together
LAST_S = 2.0  # at the end of the process, for what has not been sent; one more batch may be under way
WAITING = 2048  # spans that wait to be sent; beyond that the oldest are dropped
LONGEST = 200  # characters of what an error says
TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Kind = Literal["INTERNAL", "PRODUCER", "CONSUMER", "CLIENT"]
Fact = str | int | float | bool
Asker = tuple[Any, Any]  # a tracer, and the context of the span that waits

_tracer: ContextVar[Any] = ContextVar("gradcam_tracer", default=None)  # of whatever this context works for


class Traces:
    """Where spans go: nowhere, without a tracer."""

    def __init__(self, tracer: Any = None) -> None:
        """`tracer` is OpenTelemetry's."""
        self._tracer = tracer

    @contextmanager
    def joined(
        self,
        name: str,
        traceparent: str | None = None,
        *,
        kind: Kind = "INTERNAL",
        since: datetime | None = None,
        **facts: Fact | None,
    ) -> Iterator[None]:
        """A span for the block, in the trace of `traceparent`; without it, of the current span, or a new one.

        Within it the functions of this module are at work, in the pools of this job, too.
        """
        if self._tracer is None:
            yield
            return
        token = _tracer.set(self._tracer)
        try:
            with _span(self._tracer, name, facts, kind, _remote(traceparent), since):
                yield
        finally:
            _tracer.reset(token)


OFF = Traces()


@cache  # a process has one queue and one thread for each endpoint, however many clients it makes
def to(endpoint: str, service: str, instance: str = "") -> Traces:
    """Send spans to an OTLP/HTTP endpoint, in the background; nowhere, where it is empty.

    Whatever goes wrong there is said once and touches no job. Raises InvalidSettings without the extra.
    """
    if not endpoint:
        return OFF
    where, shown = _address(checked(endpoint))
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        message = "GRADCAM_TRACES needs the extra otel: pip install 'gradcam-worker[otel]'."
        raise InvalidSettings(message) from error
    names = {"service.name": service, "service.version": __version__}
    names |= {"service.instance.id": instance} if instance else {}
    exporter: Any = _Quiet(OTLPSpanExporter(endpoint=where, timeout=EXPORT_S), shown)
    provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, WAITING, schedule_delay_millis=1000))

    def end() -> None:
        exporter.hurry()
        provider.shutdown()

    atexit.register(end)
    return Traces(provider.get_tracer("gradcam", __version__))


def checked(endpoint: str) -> str:
    """The endpoint as it is, or empty. Raises ValueError where it is no address of OTLP/HTTP."""
    found = urls.parse(endpoint)
    fits = found and found.scheme in {"http", "https"} and found.host and found.port != 0
    if endpoint and not (fits and found and found.fragment is None):
        message = f"it must be the address of an OTLP/HTTP collector, as http://collector:4318: {urls.ENCODE}"
        raise ValueError(message)
    return endpoint


def _address(endpoint: str) -> tuple[str, str]:
    """Where to post, and how that is shown: without user and password."""
    found = urls.parse(endpoint)
    path = found.path if found else ""
    shown = f"{found.scheme}://{found.place}" if found else "..."
    return (endpoint if path.strip("/") else endpoint.rstrip("/") + PATH), shown


def span(name: str, **facts: Fact | None) -> AbstractContextManager[None]:
    """A span for the block, below the current one."""
    tracer = _tracer.get()
    return nullcontext() if tracer is None else _span(tracer, name, facts)


def past(name: str, begun: datetime, ended: datetime, traceparent: str | None = None) -> None:
    """A span of something that is over already, below the current one or that of `traceparent`.

    Two clocks may have told these times: it ends no earlier than it begins.
    """
    tracer = _tracer.get()
    if tracer is not None:
        with suppress(Exception):  # it may be an operator's own sampler that fails
            begun_ns = _ns(begun)
            over = tracer.start_span(f"gradcam.{name}", _remote(traceparent), start_time=begun_ns)
            over.end(max(begun_ns, _ns(ended)))


def note(error: Exception | None = None, **facts: Fact | None) -> None:
    """Facts about the current span; `error`, where it came to a bad end without raising it."""
    if _tracer.get() is not None:
        from opentelemetry.trace import get_current_span

        with suppress(Exception):
            current = get_current_span()
            current.set_attributes(_attributes(facts))
            if error is not None:
                _failed(current, error)


def here() -> str | None:
    """The `traceparent` of the current span, where there is one: ours, or an app's with OpenTelemetry."""
    ask = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if ask is None:  # nobody in this process has begun one
        return None
    found = ask().get_span_context()
    if not found.is_valid:
        return None
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def headers() -> dict[str, str]:
    """What tells an HTTP receiver of the current span of ours."""
    traceparent = here() if _tracer.get() is not None else None
    return {"traceparent": traceparent} if traceparent else {}


def trace_id(traceparent: str | None) -> str | None:
    """The id of a trace, 32 hexadecimal digits."""
    found = TRACEPARENT.fullmatch(traceparent or "")
    return found[1] if found else None


def asker() -> Asker | None:
    """Who waits for a batch."""
    tracer = _tracer.get()
    if tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    return tracer, get_current_span().get_span_context()


def batch(askers: Iterable[Asker | None], begun_s: float, took_s: float) -> None:
    """A pass over pictures of several jobs, whose spans it is linked to: it is no one's child.

    `begun_s` as `time.monotonic` has it.
    """
    known = [one for one in askers if one]
    if known:
        with suppress(Exception):  # the thread of the device must not end by this
            from opentelemetry.context import Context
            from opentelemetry.trace import Link

            links, facts = [Link(context) for _, context in known], {"gradcam.batch.requests": len(known)}
            begun_ns = time.time_ns() - int((time.monotonic() - begun_s) * 1e9)
            tracer = known[0][0]
            one = tracer.start_span(
                "gradcam.batch", Context(), links=links, attributes=facts, start_time=begun_ns
            )
            one.end(begun_ns + int(took_s * 1e9))


@contextmanager
def _span(
    tracer: Any,
    name: str,
    facts: Mapping[str, Fact | None],
    kind: Kind = "INTERNAL",
    context: Any = None,
    since: datetime | None = None,
) -> Iterator[None]:
    from opentelemetry.trace import INVALID_SPAN, SpanKind, use_span

    begun: Any = INVALID_SPAN
    with suppress(Exception):  # an operator's own sampler, say
        begun = tracer.start_span(
            f"gradcam.{name}",
            context,
            kind=SpanKind[kind],
            attributes=_attributes(facts),
            start_time=_ns(since) if since else None,
        )
    with use_span(begun, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except Exception as error:
            _failed(begun, error)
            raise


def _failed(span: Any, error: Exception) -> None:
    """What our errors say is fit to be read by others; of any other there is the name of its type."""
    from opentelemetry.trace import StatusCode

    kind, said = type(error).__name__, None
    if isinstance(error, GradcamError):
        kind, said = error.code, str(error)[:LONGEST]
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, said)


def _remote(traceparent: str | None) -> Any:
    """The context that a `traceparent` stands for; None, the current one, where it stands for none."""
    if not trace_id(traceparent):
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent or ""}, Context())


def _attributes(facts: Mapping[str, Fact | None]) -> dict[str, Fact]:
    return {f"gradcam.{name}": value for name, value in facts.items() if value is not None}


def _ns(moment: datetime) -> int:
    return int(moment.timestamp() * 1e9)


class _Quiet:
    """An exporter that raises nothing, says once that it does not get through, and can be told to hurry."""

    def __init__(self, exporter: Any, shown: str) -> None:
        self._exporter, self._shown = exporter, shown
        self._reached, self._end_s = True, float("inf")

    def export(self, spans: Any) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        result: Any = SpanExportResult.FAILURE
        if time.monotonic() < self._end_s:
            with suppress(Exception):
                result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS and self._reached:
            log.warning("traces do not reach %s: they are dropped until they do", self._shown)
        self._reached = result is SpanExportResult.SUCCESS
        return result

    def hurry(self) -> None:
        """The process ends."""
        self._end_s = time.monotonic() + LAST_S

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))
