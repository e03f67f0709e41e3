"""What `deploy/` holds is valid, names metrics and settings that there are, and leaves workers the time to drain."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import promql_parser
import pytest
import redis
import yaml

from controlplane.config import ROOT, Config
from controlplane.metric_families import FleetReading, render_metrics
from controlplane.probe import probe
from inference.gateway.monitor import FleetStatus
from inference.messages import Histogram, ReplicaStatus, Telemetry
from scheduling.core.answers import QueueSnapshot
from scheduling.keys import Keys
from tests.fleet_data import FleetWriter

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
MODELS_POD = DEPLOY / "kubernetes" / "models" / "pod.yaml"
DEMO_FOLDER = "/var/lib/penstock/models"
SETTINGS = {field.alias or f"PENSTOCK_{name.upper()}" for name, field in Config.model_fields.items()}
DRAIN_RESERVE_S = 10


def read_yaml(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def manifests(kind: str) -> Iterator[dict[str, Any]]:
    yield from (d for path in MANIFESTS for d in read_yaml(path) if d["kind"] == kind)


def workloads() -> list[dict[str, Any]]:
    return [*manifests("Deployment"), *manifests("StatefulSet")]


def exposed() -> set[str]:
    """Every name of a sample in a scrape of a fleet that has all there is."""
    empty = Histogram([0] * 19, 0.0)
    names = ["utilization_percent", "memory_used_bytes", "memory_total_bytes", "process_memory_bytes", "temperature_c"]
    names += ["power_w", "power_limit_w", "sm_clock_mhz", "memory_clock_mhz", "ecc_corrected", "ecc_uncorrected"]
    figures: dict[str, Any] = dict.fromkeys(names, 1)
    telemetry = Telemetry(source="nvml", device="A1", throttle_reasons=["x"], **figures)
    replica = ReplicaStatus(
        replica="gpu-0", model="m", host="h", pid=1, state="ready", time_s=1.0, started_s=0.0, telemetry=telemetry,
        finished={"stop": 1}, queue_time=empty, time_to_first_token=empty, time_per_output_token=empty,
        end_to_end=empty,
    )  # fmt: skip
    status = FleetStatus(time_s=1.0, snapshot=QueueSnapshot(), replicas=[replica])
    reading = FleetReading(
        alerts=[("Long queue", "warning", 1)],
        redis_up=True,
        models={"m": status},
        refusals={("m", "acme", "queue_full"): 1},
    )
    lines = render_metrics(reading).decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def selected(expression: str) -> set[str]:
    """Names of the metrics in a PromQL expression, which has to be valid."""
    names: set[str] = set()
    nodes: list[Any] = [promql_parser.parse(expression)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, promql_parser.VectorSelector):
            names.add(str(node.name))
        nodes += [
            getattr(node, part)
            for part in ("expr", "lhs", "rhs", "param", "vector_selector")
            if getattr(node, part, None) is not None
        ]
        nodes += getattr(node, "args", None) or []
    return names


def alert_rules() -> list[dict[str, Any]]:
    (document,) = read_yaml(DEPLOY / "prometheus" / "rules.yml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "penstock.json").read_text())
    return found


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_an_alert_is_valid_promql_on_metrics_that_there_are(rule: dict[str, Any]) -> None:
    names = selected(rule["expr"])
    assert names
    assert names - {"up"} <= exposed()
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description"}
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))


def test_every_chart_of_the_dashboard_shows_metrics_that_there_are() -> None:
    charts = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    assert len(charts) > 20
    known = exposed()
    for chart in charts:
        for target in chart["targets"]:
            names = selected(target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*"))
            assert names, chart["title"]
            assert names <= known, chart["title"]
    assert len({chart["id"] for chart in charts}) == len(charts)


def test_the_dashboard_is_what_its_script_writes() -> None:
    assert runpy.run_path(str(DEPLOY / "grafana" / "make_dashboard.py"))["make_dashboard"]() == dashboard()


@pytest.mark.parametrize(
    "path", [MODELS_POD, *(p for p in MANIFESTS if p.name != "kustomization.yaml")], ids=lambda path: path.name
)
def test_a_manifest_is_what_kubernetes_takes(path: Path) -> None:
    for document in read_yaml(path):
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_the_kustomization_names_every_manifest() -> None:
    (document,) = read_yaml(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert {*document["resources"], "kustomization.yaml"} == {path.name for path in MANIFESTS}


def test_pods_have_probes_drain_and_no_secret_of_their_own() -> None:
    for workload in workloads():
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        name = container["name"]
        assert container["args"] == ["up", "--only", name]
        assert {"secretRef": {"name": "penstock"}} in container["envFrom"]
        assert (
            workload["spec"]["selector"]["matchLabels"].items()
            <= workload["spec"]["template"]["metadata"]["labels"].items()
        )
        assert {"startupProbe", "livenessProbe"} <= container.keys()
        assert container["image"] == ("penstock:cuda" if name == "gpu" else "penstock:latest")
        environment = {item["name"]: item.get("value") for item in container.get("env", [])}
        assert set(environment) <= SETTINGS
        assert not {"DATABASE_URL", "REDIS_URL", "PENSTOCK_SECRET_KEY"} & set(environment)
        drain_s = float(environment.get("PENSTOCK_DRAIN_S") or 5)
        assert pod["terminationGracePeriodSeconds"] >= drain_s + DRAIN_RESERVE_S
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert ("/files" in mounts) == (name != "gpu")
        assert mounts["/models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
        demo = {"name": "models", "mountPath": DEMO_FOLDER, "subPath": "demo"}
        assert mounts[DEMO_FOLDER] == demo | ({} if name == "gpu" else {"readOnly": True})
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["models"]["persistentVolumeClaim"] == {"claimName": "penstock-models"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (config,) = manifests("ConfigMap")
    Config(**{_field(name): _value(value) for name, value in config["data"].items()})
    assert not list(manifests("Secret"))


def test_a_pod_can_fill_the_claim_of_models() -> None:
    (pod,) = read_yaml(MODELS_POD)
    (container,) = pod["spec"]["containers"]
    assert container["volumeMounts"] == [{"name": "models", "mountPath": "/models"}]
    assert pod["spec"]["volumes"] == [
        {"name": "models", "persistentVolumeClaim": {"claimName": "penstock-models"}},
    ]
    claims = {claim["metadata"]["name"]: claim["spec"]["accessModes"] for claim in manifests("PersistentVolumeClaim")}
    assert claims == {"penstock-models": ["ReadWriteMany"], "penstock-files": ["ReadWriteMany"]}


def _field(variable: str) -> str:
    return variable.removeprefix("PENSTOCK_").lower()


def _value(text: str) -> Any:
    return json.loads(text) if text.startswith("[") else text


def test_the_compose_file_is_valid_and_its_services_drain() -> None:
    path = DEPLOY / "compose.yaml"
    filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", re.sub(r"\$\{\w+:\?[^}]*\}", "secret", path.read_text()))
    options = compose_spec.PyOptions()
    options.apply_merge = True
    options.from_yaml(filled).validate()
    services = yaml.safe_load(path.read_text())["services"]
    assert {"web", "ops", "cpu", "gpu", "postgres", "redis"} <= services.keys()
    for name in ("web", "ops", "cpu", "gpu"):
        environment = services[name]["environment"]
        assert set(environment) <= SETTINGS
        drain_s = float(environment.get("PENSTOCK_DRAIN_S", 5))
        assert float(services[name]["stop_grace_period"].removesuffix("s")) >= drain_s + 2.5
    wanted = set(re.findall(r"\$\{(\w+):\?", path.read_text()))
    assert wanted <= set(re.findall(r"^(\w+)=$", (DEPLOY / "env.example").read_text(), re.MULTILINE))
    for name in ("web", "ops", "cpu", "gpu"):
        own = name in ("web", "ops")
        mounts = {target: (source, mode) for source, target, mode in map(_mount, services[name]["volumes"])}
        assert mounts["/models"] == ("${PENSTOCK_MODELS:-models}", "ro")
        assert mounts[DEMO_FOLDER] == ("demo", "ro" if own else "")
        assert ("/files" in mounts) == own
        assert "healthcheck" in services[name]
    assert services["gpu"]["image"] != services["cpu"]["image"]
    assert services["web"]["build"]["args"] == {"TORCH_INDEX": "${TORCH_INDEX:-}"}
    assert services["gpu"]["build"]["args"] == {"TORCH_INDEX": "${CUDA_TORCH_INDEX:-}"}
    assert services["gpu"]["build"]["dockerfile"] == services["web"]["build"]["dockerfile"]
    assert "PENSTOCK_PROXIES" in services["web"]["environment"]
    refusal = services["grafana"]["entrypoint"][-1].replace("$$", "$").replace("exec /run.sh", "true")
    for password, code in (("", 1), ("x", 0)):
        run = subprocess.run(["sh", "-c", refusal], env={"GF_SECURITY_ADMIN_PASSWORD": password}, check=False)
        assert run.returncode == code
    redis_command = services["redis"]["command"]
    assert {"--appendonly", "noeviction"} <= set(redis_command)


def _mount(text: str) -> tuple[str, str, str]:
    """Source, target and mode of a volume in its short form; a source may hold a colon in its default."""
    found = re.fullmatch(r"(.+?):(/[^:]*)(?::(ro))?", text)
    assert found
    return found[1], found[2], found[3] or ""


def test_the_dockerfile_copies_what_there_is_and_all_that_the_processes_import() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"controlplane", "dashboard", "inference", "scheduling", "static", "templates", "manage.py"} <= set(copied)
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert re.search(rf"mkdir -p .*{DEMO_FOLDER} .*/models ", text)
    assert re.search(r'^RUN pip install .*"\$TORCH_INDEX"', text, re.MULTILINE)


def test_a_worker_that_reports_is_alive_and_a_silent_one_is_not(store: redis.Redis, redis_url: str, keys: Keys) -> None:
    config = Config.model_construct(redis_url=redis_url, key_prefix=keys.prefix, replica="gpu-0")
    assert probe(config) == ""
    fleet = FleetWriter(store, keys)
    fleet.deploy()
    assert probe(config) == "gpu-0 does not report."
    fleet.publish(fleet.status())
    assert probe(config) == ""
    away = Config.model_construct(redis_url="unix:///nowhere", key_prefix=keys.prefix, replica="gpu-0")
    assert probe(away) == ""
    assert probe(config, "ops") == "The ops worker has run no periodic task for a while."
    environment = {"REDIS_URL": redis_url, "PENSTOCK_KEY_PREFIX": keys.prefix, "PENSTOCK_REPLICA": "gpu-7"}
    done = subprocess.run([sys.executable, "-m", "controlplane.probe"], cwd=ROOT, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"gpu-7 does not report.\n")
