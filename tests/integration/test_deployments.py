"""Deployments as operators keep them and engines read them: sizing, triggers and SLAs, checked when stored."""

from typing import Any

import msgspec
import pytest
import redis
from django.core.exceptions import ValidationError

from inference.directory import load_directory, publish_deployments
from inference.messages import DeploymentSpec, LatencyTarget
from inference.models import ModelDeployment
from inference.services import save_deployment
from scheduling.keys import Keys
from scheduling.models import ServiceLevel, Tenant

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("installation")]


def test_engines_read_how_batches_form_and_what_the_slas_promise(store: redis.Redis, keys: Keys) -> None:
    deployment = ModelDeployment(name="m", path="/m")
    trigger = {"any": [{"urgent": 1}, {"size": 8}]}
    changes = {"sizing": "latency_first", "sizing_params": {"largest": 32}, "triggers": trigger}
    save_deployment(deployment=deployment, changes={**changes, "prefix_cache": "per_tenant", "max_batch_size": 8})
    ServiceLevel.objects.create(tenant=Tenant.objects.create(name="acme"), priority=1, ttft_ms=200)
    ServiceLevel.objects.create(priority=3, ttft_ms=500, e2e_ms=9000)
    publish_deployments(store, keys, load_directory())
    packed: Any = store.hget(keys.deployments, "m")
    spec = msgspec.json.decode(packed, type=DeploymentSpec)
    assert (spec.sizing, spec.sizing_params, spec.triggers) == ("latency_first", {"largest": 32}, trigger)
    assert (spec.prefix_cache, spec.long_prefill_threshold) == ("per_tenant", 512)
    promised = [LatencyTarget("", 3, 0.5, 9.0), LatencyTarget("acme", 1, 0.2, None)]
    assert sorted(spec.targets, key=lambda target: target.tenant) == promised


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sizing": "largest"}, "sizing"),
        ({"sizing": "balanced", "sizing_params": {"gain": 99}}, "sizing_params"),
        ({"sizing_params": ["initial"]}, "sizing_params"),
        ({"triggers": {"sometimes": 1}}, "triggers"),
        ({"triggers": "size"}, "triggers"),
        ({"prefix_cache": "sometimes"}, "prefix_cache"),
    ],
)
def test_what_no_engine_could_use_is_not_stored(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        save_deployment(deployment=ModelDeployment(name="m", path="/m"), changes=changes)
    assert field in refusal.value.message_dict
    assert not ModelDeployment.objects.exists()
