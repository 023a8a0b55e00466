"""infra/monitoring and the RayService: valid, pinned versions, existing metrics."""

from __future__ import annotations

import asyncio
import copy
import ipaddress
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families
from support.live_standin import StandInHub
from test_infra import INFRA, PINS, manifest, manifest_errors, wrong_images

from jobs.cli.app import app as command_line
from pipeline.api.metrics import metrics_text
from pipeline.live.spec import LiveSpec

MONITORING = INFRA / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "xmem.json"
_CAPACITY = {"predicted_bytes": 1, "budget_bytes": 2}


def load(name: str) -> Any:
    return yaml.safe_load((MONITORING / name).read_text())


def sample_names() -> set[str]:
    """Names of all metrics while a stream is running."""

    async def text() -> bytes:
        hub = StandInHub()
        await hub.add(LiveSpec("gate", "rtsp://10.0.0.9/x", detector="motion"))
        hub.publish("gate")
        (status,) = await hub.list()
        return metrics_text([{**status, "ms_per_frame": 20.0}], {**await hub.capacity(), **_CAPACITY})

    families = text_string_to_metric_families(asyncio.run(text()).decode())
    return {sample.name for family in families for sample in family.samples}


def unknown_metrics(expression: str) -> set[str]:
    """Names in a PromQL expression that no metric has."""
    words = set(re.findall(r"\bxmem_[a-z0-9_]+", expression))
    return words - sample_names()


def expressions() -> Iterator[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in load("alerts.yml")["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def test_panels_and_alerts_speak_of_metrics_that_exist() -> None:
    everything = list(expressions())
    assert len(everything) > 10
    assert [e for e in everything if unknown_metrics(e)] == []
    assert unknown_metrics("rate(xmem_frames_tracket_total[1m])") == {"xmem_frames_tracket_total"}
    for expression in everything:
        assert expression.count("(") == expression.count(")"), expression


def test_the_dashboard_is_provisioned() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    (provider,) = load("grafana/provisioning/dashboards/xmem.yaml")["providers"]
    mounts = load("compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert all(target["legendFormat"] for target in panel["targets"])
    assert source["url"] == "http://prometheus:9090"
    assert dashboard["templating"]["list"][0]["name"] == "stream"


def test_prometheus_asks_where_the_api_is() -> None:
    compose = load("compose.yaml")["services"]
    (job,) = load("prometheus.yml")["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert f"--port={port}" in compose[name]["command"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/tokens"
    assert compose["prometheus"]["secrets"] == ["tokens"]
    assert f"--token-file={job['authorization']['credentials_file']}" in compose[name]["command"]


def test_nothing_listens_for_other_machines() -> None:
    compose = load("compose.yaml")
    for name, service in compose["services"].items():
        assert [p for p in service.get("ports", ()) if not p.startswith("127.0.0.1:")] == [], name
        assert ":latest" not in service["image"]
        assert ":" in service["image"]
    for image in (compose["services"][name]["image"] for name in ("xmem", "bucket")):
        assert wrong_images([f"registry.example.com/{image}"]) == []


def test_the_only_camera_is_the_only_one_allowed() -> None:
    compose = load("compose.yaml")
    address = compose["services"]["mediamtx"]["networks"]["inside"]["ipv4_address"]
    assert f"--allow-network={address}/32" in compose["services"]["xmem"]["command"]
    subnet = compose["networks"]["inside"]["ipam"]["config"][0]["subnet"]
    assert ipaddress.ip_address(address) in ipaddress.ip_network(subnet)


def test_the_command_exists_with_its_options() -> None:
    words = load("compose.yaml")["services"]["xmem"]["command"]
    assert words[:2] == ["xmem", "serve"]
    commands: Any = typer.main.get_command(command_line)
    known = {option for parameter in commands.commands["serve"].params for option in parameter.opts}
    assert [word for word in words[2:] if word.split("=")[0] not in known] == []


def test_the_bucket_has_the_keys_that_are_used() -> None:
    (identity,) = json.loads((MONITORING / "s3.json").read_text())["identities"]
    for name in ("xmem", "bucket"):
        environment = load("compose.yaml")["services"][name]["environment"]
        assert environment["AWS_ACCESS_KEY_ID"] == identity["credentials"][0]["accessKey"]
        assert environment["AWS_SECRET_ACCESS_KEY"] == identity["credentials"][0]["secretKey"]


# --- KubeRay -------------------------------------------------------------------------------------


def cluster_of(service: dict[str, Any]) -> dict[str, Any]:
    """The RayService's cluster as a RayCluster, which the schema of infra/k8s knows."""
    spec = copy.deepcopy(service["spec"]["rayClusterConfig"])
    return {**service, "kind": "RayCluster", "spec": spec}


def test_the_rayservices_cluster_is_valid() -> None:
    service = manifest("rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) == {"upgradeStrategy", "serveConfigV2", "rayClusterConfig"}
    assert manifest_errors(cluster_of(service)) == []
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == PINS["ray"]
    broken = cluster_of(service)
    broken["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMounts"].pop()
    assert manifest_errors(broken) != []


def test_the_rayservices_application_can_be_built() -> None:
    service = manifest("rayservice.yaml")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray Serve's own
        from ray.serve.schema import ServeDeploySchema

        from pipeline.distributed import serve

        ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["import_path"] == f"{serve.app.__module__}:{serve.app.__name__}"
    words = dict(application["args"])
    mounts = {
        mount["mountPath"]: mount["name"]
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert mounts[words["token_file"].rpartition("/")[0]] == "api-tokens"
    assert mounts[words["secrets"]] == "cameras"
    del words["token_file"]
    api, place = serve.settings_from(words, {"XMEM_API_TOKENS": "x" * 32})
    assert api.networks == ("10.20.0.0/16",)
    assert place.settings is not None
    assert (place.gpus, place.settings.tracking.model.device) == (1.0, "cuda")


@pytest.mark.parametrize("name", ["compose.yaml", "prometheus.yml", "alerts.yml"])
def test_files_hold_no_key_twice(name: str) -> None:
    """YAML readers silently take the last one."""

    class Strict(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            assert len(keys) == len(set(keys)), keys
            return super().construct_mapping(node, deep)

    yaml.load((MONITORING / name).read_text(), Loader=Strict)
