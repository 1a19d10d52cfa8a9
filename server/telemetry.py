"""Traces of requests and jobs by OpenTelemetry, if asked to; where they go is said by its own variables. No torch.

Without the setting nothing of it is loaded and a request pays for an `if`. A span holds method, route and status, of a job its
id and kind: nothing that anybody typed.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sae_core.errors import UsageError
from server.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_tracer: "Tracer | None" = None


def begin(settings: Settings, process: str) -> Callable[[], None]:
    """Begin to trace, where the settings say so; what is called at the end sends the rest."""
    global _tracer
    if not settings.telemetry:
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            "HEADSCOPE_TELEMETRY needs OpenTelemetry: pip install 'headscope[telemetry]'.", field="telemetry"
        ) from error
    described = {"service.name": f"headscope-{process}", "service.version": version("headscope")}
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, where they are set, say more.
    provider = TracerProvider(resource=Resource.create(described))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = provider.get_tracer("headscope", version("headscope"))

    def end() -> None:
        global _tracer
        _tracer = None
        provider.shutdown()

    return end


@contextmanager
def request(scope: MutableMapping[str, Any]) -> Iterator[Callable[[str, int], None]]:
    """A span of an ASGI request, below that of whoever asks; what is given tells it the route and the status."""
    if _tracer is None:
        yield lambda _route, _status: None
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind, Status, StatusCode

    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    above = extract({name: headers[name] for name in ("traceparent", "tracestate") if name in headers})
    with _tracer.start_as_current_span(scope["method"], above, kind=SpanKind.SERVER) as span:

        def told(route: str, status: int) -> None:
            span.update_name(f"{scope['method']} {route}")
            span.set_attributes(
                {"http.request.method": scope["method"], "http.route": route, "http.response.status_code": status}
            )  # fmt: skip
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))

        yield told


@contextmanager
def job(job_id: str, kind: str) -> Iterator[None]:
    """A span of an attempt at a job."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(kind, attributes={"headscope.job": job_id}, record_exception=False):
        yield


def onward() -> dict[str, str]:
    """Headers that carry the present span to another process."""
    if _tracer is None:
        return {}
    from opentelemetry.propagate import inject

    carried: dict[str, str] = {}
    inject(carried)
    return carried
