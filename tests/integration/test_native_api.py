"""`/api/v1` through a real server: submit and poll, reading the fleet, switching a policy, and its documentation."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest
import redis

from benchmarks.stack import MODEL, PREFIX, ROOT, Stack, ended, running_stack
from inference.messages import Slot
from scheduling.keys import Keys
from tests.fleet_data import FleetWriter
from tests.integration.gateway_support import Api, code_of
from tests.patience import PATIENCE_S, wait_until

PASSWORD = "gate-keeper-1"
USERS = """
import sys, django
django.setup()
from django.contrib.auth.models import Group, User
for name in ("operator", "viewer"):
    User.objects.create_user(name, password=sys.argv[1]).groups.add(Group.objects.get(name=name))
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack({"alpha": {}, "beta": {}, "few": {"rpm": 1}}) as stack:
        subprocess.run([sys.executable, "-c", USERS, PASSWORD], cwd=ROOT, env=stack.environment, check=True)
        yield stack


def submit(api: Api, tenant: str = "alpha", **fields: object) -> httpx.Response:
    return api.call("POST", "/api/v1/requests", tenant, json={"model": MODEL, "prompt": "ba be", **fields})


@contextmanager
def signed_in(stack: Stack, name: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=PATIENCE_S) as session:
        session.get("/login/")
        token = session.cookies["csrftoken"]
        answer = session.post("/login/", data={"username": name, "password": PASSWORD, "csrfmiddlewaretoken": token})
        assert answer.status_code == 302
        session.headers["X-CSRFToken"] = session.cookies["csrftoken"]
        yield session


def test_an_option_that_a_submitted_request_lacks_is_refused_by_name(api: Api) -> None:
    for name, value in (("n", 2), ("best_of", 3), ("logprobs", 1), ("stream", True)):
        answer = submit(api, "alpha", **{name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_a_request_is_submitted_polled_and_answered(api: Api, stack: Stack) -> None:
    submitted = submit(api, max_tokens=7, priority="high")
    assert submitted.status_code == 202
    assert submitted.headers["x-request-id"]
    path = submitted.headers["location"]
    waiting = api.call("GET", path).json()
    assert (waiting["state"], waiting["queue_position"], waiting["priority"]) == ("queued", 0, "high")
    behind = submit(api, max_tokens=7).json()
    assert api.call("GET", f"/api/v1/requests/{behind['id']}").json()["queue_position"] == 1
    with ended(stack.start_engine()):
        wait_until(lambda: api.call("GET", path).json()["state"] == "finished")
    done = api.call("GET", path).json()
    assert len(done["output"].split()) == 7
    assert done["finish_reason"] == "length"
    assert done["usage"]["completion_tokens"] == 7
    assert done["queue_position"] is None
    wait_until(lambda: api.snapshot().running == 0 and api.snapshot().depth == 0)


def test_a_chat_is_submitted_and_its_text_so_far_shown(api: Api, stack: Stack) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "ba"}], "max_tokens": 1000}
    path = api.call("POST", "/api/v1/requests", json=body).headers["location"]
    with ended(stack.start_engine(tokens_per_step=1, step_s=0.02)):
        wait_until(lambda: api.call("GET", path).json()["output"])
        assert api.call("GET", path).json()["state"] == "running"
        assert api.call("DELETE", path).json()["was"] == "running"
        wait_until(lambda: api.call("GET", path).json()["state"] == "cancelled")
    assert api.call("DELETE", path).json()["was"] == "gone"


def test_a_waiting_request_is_cancelled(api: Api) -> None:
    path = submit(api).headers["location"]
    assert api.call("DELETE", path).json()["was"] == "queued"
    assert api.call("GET", path).json()["state"] == "cancelled"
    assert api.snapshot().depth == 0


def test_another_tenant_s_request_does_not_exist(api: Api) -> None:
    path = submit(api).headers["location"]
    for method in ("GET", "DELETE"):
        response = api.call(method, path, "beta")
        assert (response.status_code, code_of(response)) == (404, "request_not_found")
    api.call("DELETE", path)


def test_bad_requests_have_the_same_errors_as_v1(api: Api) -> None:
    response = submit(api, foo=1)
    assert (response.status_code, code_of(response)) == (400, "unknown_parameter")
    response = submit(api, stream=True)
    assert (response.status_code, code_of(response)) == (400, "invalid_value")
    response = api.call("POST", "/api/v1/requests", None, json={})
    assert (response.status_code, code_of(response)) == (401, "invalid_api_key")
    response = api.call("POST", "/api/v1/requests", content=b"[]")
    assert (response.status_code, code_of(response)) == (400, "invalid_type")
    response = api.call("POST", "/api/v1/requests", content=b'{"model": "\xff"}')
    assert (response.status_code, code_of(response)) == (400, "invalid_json")
    response = api.call("GET", "/api/v1/nothing")
    assert (response.status_code, code_of(response)) == (404, "unknown_url")
    assert submit(api, "few").status_code == 202
    response = submit(api, "few")
    assert (response.status_code, code_of(response)) == (429, "requests_per_minute_exceeded")
    assert response.headers["retry-after"]


@pytest.mark.parametrize("path", ["/api/v1/requests", "/login/", "/admin/login/"])
def test_a_body_over_the_bound_is_refused_whoever_sends_it(api: Api, path: str) -> None:
    response = api.call("POST", path, None, content=b"a" * 3_000_000)
    assert (response.status_code, code_of(response)) == (413, "request_too_large")
    chunks = (b"a" * 100_000 for _ in range(30))
    response = api.call("POST", path, None, content=chunks)
    assert (response.status_code, code_of(response)) == (413, "request_too_large")


def test_queues_replicas_and_policies_are_read(api: Api, stack: Stack) -> None:
    with ended(stack.start_engine()):
        wait_until(lambda: api.call("GET", "/api/v1/replicas").json())
    (queue,) = api.call("GET", "/api/v1/queues").json()
    assert (queue["model"], queue["backpressure"]) == (MODEL, "none")
    assert queue["by_tenant"].keys() == {"alpha"}
    policies = api.call("GET", "/api/v1/policies").json()
    assert {"fifo", "priority", "fair"} <= {kind["name"] for kind in policies["kinds"]}
    assert all(kind["guarantee"] for kind in policies["kinds"])
    for kind in policies["kinds"]:
        assert api.call("GET", f"/api/v1/policies/{kind['name']}").json() == kind
        for parameter in kind["parameters"].values():
            assert parameter["description"]
            if parameter["type"] == "number":
                assert parameter["minimum"] <= parameter["default"] <= parameter["maximum"]
            else:
                assert parameter["default"] in parameter["choices"]
    assert code_of(api.call("GET", "/api/v1/policies/none")) == "policy_not_found"
    sizings = {kind["name"]: kind for kind in api.call("GET", "/api/v1/sizings").json()}
    assert sizings["fixed"]["parameters"]["initial"]["type"] == "number"


def test_a_viewer_sees_all_of_a_replica_and_a_tenant_its_own_requests(
    api: Api, stack: Stack, live: redis.Redis
) -> None:
    writer = FleetWriter(live, Keys(prefix=PREFIX), MODEL)
    runs = [Slot(f"req-{tenant}", tenant, 3, 10, 5, 64) for tenant in ("alpha", "few")]
    status = msgspec.structs.replace(
        writer.status("gpu-seen", slots=runs), sizing="balanced", sizing_params={"gain": 0.5}, restarts={"hung": 1}
    )

    def find(answer: httpx.Response) -> Any:
        return next((one for one in answer.json() if one["replica"] == "gpu-seen"), None)

    with signed_in(stack, "viewer") as viewer:
        try:
            writer.publish(status)
            seen = wait_until(lambda: find(viewer.get("/api/v1/replicas")))
            own = find(api.call("GET", "/api/v1/replicas"))
        finally:
            live.delete(writer.keys.replica("gpu-seen"))
            live.zrem(writer.keys.replicas, "gpu-seen")
    assert [slot["tenant"] for slot in seen["slots"]] == ["alpha", "few"]
    assert (seen["telemetry"]["utilization_percent"], seen["telemetry"]["power_w"]) == (87.5, None)
    assert (seen["sizing"], seen["sizing_params"], seen["restarts"]) == ("balanced", {"gain": 0.5}, {"hung": 1})
    assert [slot["tenant"] for slot in own["slots"]] == ["alpha"]
    assert (own["batch_size"], own["telemetry"]) == (2, None)


def test_an_operator_switches_the_policy_and_a_viewer_may_not(api: Api, stack: Stack) -> None:
    path = f"/api/v1/models/{MODEL}/policy"
    body = {"name": "fair", "reason": "share by weight"}
    response = api.call("POST", path, json=body)
    assert (response.status_code, code_of(response)) == (403, "operator_required")
    assert api.call("POST", path, None, json=body).status_code in (401, 403)
    with signed_in(stack, "viewer") as viewer:
        assert viewer.get("/api/v1/policies").status_code == 200
        response = viewer.post(path, json=body)
        assert (response.status_code, code_of(response)) == (403, "permission_denied")
    with signed_in(stack, "operator") as operator:
        revision = operator.post(path, json=body)
        assert revision.status_code == 200
        assert revision.json()["state"] == "applied"
        wait_until(lambda: operator.get("/api/v1/policies").json()["active"][0]["name"] == "fair")
        response = operator.post(path, json={"name": "none", "reason": "x"})
        assert (response.status_code, code_of(response)) == (400, "invalid_policy")
        for params, param in (
            ({"aging_rate": 1}, "params.aging_rate"),
            ({"weight_high": -1}, "params.weight_high"),
            ({"weight_high": "much"}, "params.weight_high"),
        ):
            response = operator.post(path, json={"name": "wrr", "params": params, "reason": "x"})
            assert (response.status_code, code_of(response)) == (400, "invalid_policy"), params
            assert response.json()["error"]["param"] == param
        response = operator.post(path, json={"name": "fifo"})
        assert (response.status_code, code_of(response)) == (400, "invalid_value")
        del operator.headers["X-CSRFToken"]
        response = operator.post(path, json=body)
        assert (response.status_code, code_of(response)) == (403, "csrf_failed")
    with ended(stack.start_engine()):
        assert api.complete().status_code == 200


def test_a_command_to_a_replica_is_for_operators_and_whole_or_refused_by_name(stack: Stack) -> None:
    path, body = "/api/v1/replicas/gpu-9/control", {"command": "set_mode", "mode": "static", "reason": "try it"}
    with signed_in(stack, "viewer") as viewer:
        response = viewer.post(path, json=body)
        assert (response.status_code, code_of(response)) == (403, "permission_denied")
    with signed_in(stack, "operator") as operator:
        for fields, param in (
            ({"mode": "warp"}, "body.mode"),
            ({"mode": None}, "mode"),
            ({"max_batch_size": 4}, "max_batch_size"),
            ({"command": "set_batch_size", "mode": None}, "max_batch_size"),
            ({"command": "set_batch_size", "mode": None, "max_batch_size": 0}, "body.max_batch_size"),
            ({"command": "pause"}, "mode"),
            ({"command": "stop", "mode": None}, "body.command"),
            ({"reason": ""}, "body.reason"),
            ({"params": {"initial": 4}}, "params"),
            ({"command": "sizing", "mode": None}, "sizing"),
        ):
            response = operator.post(path, json=body | fields)
            assert (response.status_code, code_of(response)) == (400, "invalid_value"), fields
            assert response.json()["error"]["param"].endswith(param)
        sizing = {"command": "sizing", "mode": None, "sizing": "latency_first"}
        for fields, param in (({"sizing": "none"}, "sizing"), ({"params": {"initial": 0}}, "params")):
            response = operator.post(path, json=body | sizing | fields)
            assert (response.status_code, code_of(response)) == (400, "invalid_sizing"), fields
            assert response.json()["error"]["param"] == param
        changes: list[dict[str, object]] = [{}, {**sizing}, {**sizing, "params": {"initial": 4}}]
        for change in changes:
            response = operator.post(path, json=body | change)
            assert (response.status_code, code_of(response)) == (404, "replica_not_found")
        del operator.headers["X-CSRFToken"]
        response = operator.post(path, json=body)
        assert (response.status_code, code_of(response)) == (403, "csrf_failed")


def test_the_documentation_works_without_the_outside_world(api: Api) -> None:
    page = api.call("GET", "/api/docs", None)
    assert page.status_code == 200
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert links
    for link in links:
        assert link.startswith("/static/")
        assert api.call("GET", link, None).status_code == 200
    schema = api.call("GET", "/api/openapi.json", None).json()
    assert "CompletionBody" in schema["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/([^"]*)"', api.call("GET", "/api/openapi.json", None).text))
    assert references <= schema["components"]["schemas"].keys()
