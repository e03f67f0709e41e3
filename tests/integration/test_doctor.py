"""`manage.py doctor`: it names what is wrong with a deployment, and what mends it."""

import json
import subprocess
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import redis
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from msgspec.structs import replace
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from controlplane import doctor
from controlplane.config import Config
from controlplane.doctor import Finding, Level
from inference.messages import Telemetry
from inference.models import ModelDeployment
from scheduling.keys import Keys
from tests.conftest import _server_binary
from tests.fleet_data import FleetWriter
from tests.integration.engines import make_tiny_checkpoint

pytestmark = pytest.mark.django_db(transaction=True)


def levels(findings: Iterable[Finding]) -> dict[str, Level]:
    found = list(findings)
    assert all(bool(finding.mend) is (finding.level != "ok") for finding in found)
    assert all(finding.detail.endswith(".") or finding.level == "fail" for finding in found)
    return {finding.name: finding.level for finding in found}


def make_config(**fields: Any) -> Config:
    return Config.model_construct(**fields)


def test_a_redis_that_forgets_or_evicts_is_named(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    command = [_server_binary(), "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)]
    command += ["--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"]
    config = make_config(redis_url=f"unix://{socket}")
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis.from_url(config.redis_url, retry=Retry(ConstantBackoff(0.05), 100)) as client:
            client.ping()
            before = levels(doctor.check_redis(config))
            client.config_set("appendonly", "yes")
            client.config_set("maxmemory-policy", "noeviction")
            after = levels(doctor.check_redis(config))
    finally:
        server.kill()
        server.wait(10)
    assert before == {"redis": "ok", "redis persistence": "warn", "redis memory": "fail"}
    assert after == {"redis": "ok", "redis persistence": "ok", "redis memory": "ok"}
    assert levels(doctor.check_redis(config)) == {"redis": "fail"}


def test_secrets_that_others_can_read_or_guess_are_named(tmp_path: Path) -> None:
    key = tmp_path / "secret_key"
    key.write_text("x")
    key.chmod(0o644)
    assert levels(doctor.check_secrets(make_config(var=tmp_path))) == {"secrets": "fail"}
    key.chmod(0o600)
    assert levels(doctor.check_secrets(make_config(var=tmp_path))) == {"secrets": "ok"}
    assert levels(doctor.check_secrets(make_config(var=tmp_path, secret_key="short"))) == {"secrets": "fail"}
    assert levels(doctor.check_secrets(make_config(var=tmp_path, database_url="postgres://x"))) == {"secrets": "warn"}
    open_host = make_config(var=tmp_path, host="0.0.0.0")
    assert levels(doctor.check_secrets(open_host)) == {"secrets": "ok", "exposure": "warn"}
    behind_proxy = make_config(var=tmp_path, host="0.0.0.0", trusted_origins=["https://a.example"])
    assert levels(doctor.check_secrets(behind_proxy)) == {"secrets": "ok"}


def test_clocks_that_differ_and_workers_that_lack_are_named(store: redis.Redis, keys: Keys, redis_url: str) -> None:
    config = make_config(redis_url=redis_url, key_prefix=keys.prefix)
    fleet = FleetWriter(store, keys)
    fleet.deploy()
    assert levels(doctor.check_clocks(config, store)) == {"clocks": "ok"}
    store.zadd(keys.webs, {"offline-1": 2e10})  # the ops process's gateway, which is no web process
    assert levels(doctor.check_workers(config, store)) == {"web": "fail", "ops": "fail", fleet.model: "warn"}
    status = fleet.status()
    fleet.publish(status)
    assert levels(doctor.check_workers(config, store))[fleet.model] == "ok"
    fleet.publish(replace(status, state="failed", detail="GPU lost.", time_s=status.time_s - 60))
    (lost,) = (f for f in doctor.check_workers(config, store) if f.name == fleet.model)
    assert (lost.level, "GPU lost." in lost.detail) == ("fail", True)
    assert levels(doctor.check_clocks(config, store)) == {"clocks": "fail"}
    silent = Telemetry(source="nvml", device="A1", stale_s=40.0)
    fleet.publish(replace(status, telemetry=silent))
    assert levels(doctor.check_workers(config, store))[status.replica] == "warn"


def test_a_checkpoint_that_is_torn_or_elsewhere_is_named(tmp_path: Path) -> None:
    assert levels(doctor.check_checkpoints(make_config())) == {"models": "fail"}
    folder = make_tiny_checkpoint(tmp_path / "tiny")
    ModelDeployment.objects.create(name="tiny", path=str(folder))
    ModelDeployment.objects.create(name="away", path="/nowhere/model")
    assert levels(doctor.check_checkpoints(make_config())) == {"tiny": "ok", "away": "fail"}
    assert levels(doctor.check_checkpoints(make_config(model="tiny"))) == {"tiny": "ok", "away": "warn"}
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert levels(doctor.check_checkpoints(make_config()))["tiny"] == "fail"


def test_the_database_accounts_disk_and_versions_are_looked_at(tmp_path: Path) -> None:
    assert levels(doctor.check_database(make_config())) == {"database": "ok"}
    assert levels(doctor.check_accounts()) == {"accounts": "warn"}
    User.objects.create_superuser("root", password="x")
    assert levels(doctor.check_accounts()) == {"accounts": "ok"}
    assert levels(doctor.check_disk(make_config(var=tmp_path)))["disk"] == "ok"
    assert "versions" in levels(doctor.check_versions())


def test_the_command_shows_all_of_it_and_fails_where_something_does(installation: Config) -> None:
    out = StringIO()
    with pytest.raises(CommandError, match="checks failed"):
        call_command("doctor", stdout=out)
    assert "FAIL  web: No web process lives." in out.getvalue()
    out = StringIO()
    with pytest.raises(CommandError):
        call_command("doctor", "--json", stdout=out)
    assert {"name", "level", "detail", "mend"} == json.loads(out.getvalue())[0].keys()
