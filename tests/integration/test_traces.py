"""OpenTelemetry: the client's trace goes on through the web process, the queue and the engine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import redis

from benchmarks.stack import MODEL, PREFIX, ROOT, ended, running_stack
from inference.messages import HistoryEvent, RequestEvent
from inference.traces import FileExporter, open_tracer, trace_event
from scheduling.keys import Keys
from tests.integration.gateway_support import Api
from tests.patience import wait_until

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def read_spans(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def request_events(url: str) -> list[RequestEvent]:
    decode = msgspec.msgpack.Decoder(list[HistoryEvent]).decode
    with redis.Redis.from_url(url) as client:
        entries: Any = client.xrange(Keys(PREFIX).history)
    return [e for _, fields in entries for e in decode(fields[b"m"]) if isinstance(e, RequestEvent)]


def test_a_request_s_spans_in_web_queue_and_engine_are_one_trace(tmp_path: Path) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    web = tmp_path / "web.jsonl"
    with running_stack({"alpha": {}}, PENSTOCK_TRACES=str(web)) as stack, ended(stack.start_engine()):
        headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
        body = {"model": MODEL, "prompt": "ba be", "max_tokens": 5}
        answer = Api(stack).call("POST", "/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        wait_until(lambda: read_spans(web))
        wait_until(lambda: request_events(stack.redis.url))
        (event,) = request_events(stack.redis.url)
    (span,) = read_spans(web)
    assert (span["name"], span["parent_id"]) == ("POST /v1/completions", f"0x{CLIENT}")
    assert span["context"]["trace_id"] == f"0x{TRACE}"
    assert span["attributes"]["http.response.status_code"] == 200

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(FileExporter(tmp_path / "ops.jsonl")))  # type: ignore[arg-type]
    trace_event(provider.get_tracer("test"), event)
    spans = read_spans(tmp_path / "ops.jsonl")
    assert [s["name"] for s in spans] == ["queue", "prefill", "decode"]
    assert {s["context"]["trace_id"] for s in spans} == {f"0x{TRACE}"}
    assert {s["parent_id"] for s in spans} == {span["context"]["span_id"]}
    assert spans[0]["end_time"] == spans[1]["start_time"]
    assert spans[2]["attributes"]["gen_ai.usage.output_tokens"] == 5
    assert spans[2]["attributes"]["penstock.tenant"] == "alpha"


def test_nothing_is_traced_and_no_package_loaded_where_it_is_not_wanted() -> None:
    assert open_tracer("") is None
    code = "import sys, inference.traces as t; t.open_tracer(''); assert 'opentelemetry' not in str(list(sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_endpoint_gets_protobuf() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    posts: list[tuple[str, str]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            posts.append((self.path, self.headers["content-type"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        Thread(target=collector.serve_forever, daemon=True).start()
        tracer = open_tracer(f"http://127.0.0.1:{collector.server_port}/v1/traces")
        assert tracer is not None
        tracer.start_span("x").end()
        wait_until(lambda: posts)
        collector.shutdown()
    assert posts[0] == ("/v1/traces", "application/x-protobuf")
