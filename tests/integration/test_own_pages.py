"""The pages over what only the control plane knows: tenants' offline work, and one's own tokens."""

import re
from datetime import timedelta

import pytest
import redis
from django.utils import timezone

from controlplane.config import Config
from controlplane.models import Batch, BatchLine, OperatorToken
from controlplane.tokens import find_token
from scheduling.keys import Keys
from scheduling.models import OperatorAction
from tests.integration.test_dashboard_pages import get_json, signed_in

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def system(store: redis.Redis, keys: Keys, installation: Config) -> None:
    """Pages read models and feed from a store."""


def make_batch(name: str, status: Batch.Status, tenant: str = "nightly", done: int = 3) -> Batch:
    batch = Batch.objects.create(
        id=f"batch_{name}", tenant=tenant, endpoint="/v1/completions", input_file_id="file-1", status=status,
        num_total=5, num_completed=5, moments={status: 1_700_000_000}, expires_at=timezone.now() + timedelta(days=1),
    )  # fmt: skip
    states = ["completed"] * done + ["failed", "submitted"]
    BatchLine.objects.bulk_create(
        BatchLine(batch=batch, number=number, custom_id=str(number), body="{}", state=state)
        for number, state in enumerate(states, 1)
        if status == Batch.Status.IN_PROGRESS
    )
    return batch


def test_offline_work_shows_how_far_it_is_what_goes_on_first() -> None:
    make_batch("old", Batch.Status.IN_PROGRESS)
    make_batch("new", Batch.Status.COMPLETED)
    make_batch("other", Batch.Status.FAILED, tenant="research")
    page = signed_in().get("/offline/").content.decode()
    assert re.findall(r'title="batch_(\w+)"', page) == ["old", "other", "new"]
    assert "1 failed, 1 under way" in page
    assert 'value="4"' in page
    assert "Cancel…" not in page, "a viewer only looks"
    assert signed_in("operator").get("/offline/").content.decode().count("Cancel…") == 1
    filtered = signed_in().get("/offline/", {"tenant": "research", "status": "odd\0"}).content.decode()
    assert re.findall(r'title="batch_(\w+)"', filtered) == ["other"]
    assert "Choose one of validating" in filtered
    first, *_ = get_json(signed_in(), "operator/batches", tenant="nightly")
    assert (first["completed"], first["failed"], first["submitted"], first["total"]) == (3, 1, 1, 5)
    assert get_json(signed_in(), "operator/batches/batch_new")["ended_at"] == "2023-11-14T22:13:20Z"
    assert signed_in().get("/api/v1/operator/batches/none").status_code == 404


def test_offline_work_is_read_on_from_the_last_batch() -> None:
    for name, status in (("a", "in_progress"), ("b", "completed"), ("c", "in_progress"), ("d", "completed")):
        make_batch(name, Batch.Status(status))
    found: list[str] = []
    while works := get_json(signed_in(), "operator/batches", limit=1, after=found[-1] if found else ""):
        found.append(works[0]["id"])
    assert found == ["batch_c", "batch_a", "batch_d", "batch_b"]
    assert get_json(signed_in(), "operator/batches", after="batch_none") == []
    page = signed_in().get("/offline/", {"after": "batch_a"}).content.decode()
    assert re.findall(r'title="batch_(\w+)"', page) == ["d", "b"]
    assert "← Newest" in page
    assert "There are no older batches" in signed_in().get("/offline/", {"after": "batch_b"}).content.decode()


def test_an_operator_cancels_a_tenant_s_batch_with_a_reason_and_a_viewer_does_not() -> None:
    for number in range(2):
        make_batch(str(number), Batch.Status.IN_PROGRESS)
    make_batch("done", Batch.Status.COMPLETED)
    viewer, operator = signed_in(), signed_in("operator")
    assert viewer.post("/offline/batch_0/cancel/", {"reason": "x"}).status_code == 403
    assert operator.post("/offline/batch_0/cancel/", {}).status_code == 400
    assert operator.post("/offline/batch_9/cancel/", {"reason": "x"}).status_code == 404
    assert operator.post("/offline/batch_done/cancel/", {"reason": "x"}).status_code == 409
    assert operator.post("/offline/batch_0/cancel/", {"reason": "too much"}).status_code == 200
    url, body = "/api/v1/operator/batches/batch_1/cancel", {"reason": "by a script"}
    assert viewer.post(url, body, content_type="application/json").status_code == 403
    assert operator.post(url, body, content_type="application/json").json()["status"] == "cancelling"
    again = operator.post("/api/v1/operator/batches/batch_done/cancel", body, content_type="application/json")
    assert again.json()["error"]["code"] == "batch_ended"
    assert set(Batch.objects.values_list("status", flat=True)) == {"cancelling", "completed"}
    trail = OperatorAction.objects.order_by("id").values_list("action", "target", "reason", "before", "after")
    states = ({"status": "in_progress"}, {"status": "cancelling", "tenant": "nightly"})
    assert list(trail) == [
        ("batch.cancel", "batch_0", "too much", *states),
        ("batch.cancel", "batch_1", "by a script", *states),
    ]


def test_a_token_made_on_its_page_is_shown_once_and_revoked_there() -> None:
    client = signed_in()
    assert client.post("/tokens/make/", {"name": " ", "days": "30"}).json()["error"] == "Say what the token is for."
    assert client.post("/tokens/make/", {"name": "x", "days": "31"}).status_code == 400
    made = client.post("/tokens/make/", {"name": "night job", "days": "30"}).json()
    token = find_token(made["token"])
    assert token is not None
    assert token.user.get_username() == "viewer"
    page = client.get("/tokens/").content.decode()
    assert "night job" in page
    assert made["token"] not in page
    token = OperatorToken.objects.get()
    assert signed_in("operator").post(f"/tokens/{token.pk}/revoke/", {"reason": "x"}).status_code == 404
    assert client.post(f"/tokens/{token.pk}/revoke/", {}).status_code == 400
    assert client.post(f"/tokens/{token.pk}/revoke/", {"reason": "done with it"}).status_code == 200
    assert find_token(made["token"]) is None
    assert ">revoked<" in client.get("/tokens/").content.decode()
    assert made["token"] not in str(list(OperatorAction.objects.values()))
