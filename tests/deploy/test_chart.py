"""The Helm chart: it lints, renders to valid Kubernetes objects, keeps its promises, refuses values that break them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tenora.cli import serving
from tenora.config import Settings
from tenora.control.worker import runner
from tests.deploy.conftest import Helm, Tools
from tests.support.patience import PATIENCE

Render = Callable[..., dict[str, dict[str, Any]]]
AFTER_THE_DRAIN = 20  # seconds that the chart's rule leaves for what follows the drain
VALUES = ["", "values-cpu.yaml", "values-gpu.yaml"]
# Ways to install that change which resources there are.
VARIATIONS: list[list[str]] = [
    [],
    ["apiKey.existingSecret=mine"],
    ["database.existingSecret=mine"],
    ["apiKey.value=a-key-of-sixteen-or-more"],
    ["persistence.existingClaim=mine"],
    ["persistence.enabled=false"],
    ["networkPolicy.enabled=false", "serviceAccount.create=false"],
    ["networkPolicy.allowFetch=false"],
    ["podAnnotations.prometheus\\.io/port=http", "priorityClassName=high", "runtimeClassName=nvidia"],
]


def pod(rendered: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The pod's spec."""
    spec: dict[str, Any] = rendered["Deployment"]["spec"]["template"]["spec"]
    return spec


def environment(rendered: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The container's variables: the value, or where it comes from."""
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in pod(rendered)["containers"][0]["env"]}


def test_the_url_of_the_database_comes_from_a_secret_or_is_not_set(render: Render) -> None:
    assert "TENORA_DATABASE_URL" not in environment(render())
    chosen = render(set=["database.existingSecret=registry", "database.key=url"])
    assert environment(chosen)["TENORA_DATABASE_URL"] == {"secretKeyRef": {"name": "registry", "key": "url"}}


@pytest.mark.parametrize("values", VALUES)
def test_lints(helm: Helm, values: str) -> None:
    done = helm("lint", values=values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def validate(tools: Tools, manifest: Path) -> subprocess.CompletedProcess[str]:
    """Check `manifest` against Kubernetes' own schemas; a field that they do not know is an error."""
    # --strict has to stand before the file: the program takes all that follows the first file for files.
    command = [str(tools.kubernetes_validate), "--strict", str(manifest)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize("values", VALUES)
def test_renders_to_valid_kubernetes_objects(helm: Helm, tools: Tools, tmp_path: Path, values: str) -> None:
    manifest = tmp_path / "manifest.yaml"
    rendered = [helm("template", values=values, set=variation) for variation in VARIATIONS]
    assert [done.stderr for done in rendered if done.returncode != 0] == []
    manifest.write_text("\n---\n".join(done.stdout for done in rendered))
    done = validate(tools, manifest)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed for resource deployment/tenora" in done.stdout + done.stderr


def test_validation_notices_an_unknown_field(helm: Helm, tools: Tools, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.yaml"
    text = helm("template").stdout
    manifest.write_text(text.replace("enableServiceLinks:", "enableServiceLink:"))
    assert "enableServiceLink:" in manifest.read_text()
    assert validate(tools, manifest).returncode != 0


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("replicas=2", "replicas"),
        ("image.varient=gpu", "varient"),
        ("image.variant=tpu", "variant"),
        ("image.repository=", "repository"),
        ("device=gpu", "device"),
        ("dtype=int8", "dtype"),
        ("drainSeconds=-1", "drainSeconds"),
        ("drainSeconds=soon", "drainSeconds"),
        ("preStopSeconds=0", "preStopSeconds"),
        ("persistence.size=lots", "size"),
        ("persistence.accessModes={ReadOnlyMany}", "accessModes"),
        ("probes.liveness.path=/", "path"),
        ("service.port=0", "port"),
        ("apiKey.value=short", "value"),
        ("settings.max_num_seq=4", "max_num_seq"),
        ("settings.home=/tmp", "home"),
    ],
)
def test_refuses_values_that_its_schema_does_not_allow(helm: Helm, setting: str, named: str) -> None:
    done = helm("template", set=[setting])
    assert done.returncode != 0, f"{setting} was accepted"
    assert "values don't meet the specifications of the schema" in done.stderr
    assert named in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["terminationGracePeriodSeconds=64"], "must be at least"),  # 15 + 30 + 20
        (["drainSeconds=120"], "must be at least"),
        (["preStopSeconds=40"], "must be at least"),
        (["apiKey.existingSecret=a", "apiKey.value=a-key-of-sixteen-or-more"], "not both"),
        (["database.existingSecret=a", "settings.database_url=b"], "not both"),
        (["persistence.enabled=false", "persistence.existingClaim=a"], "persistence.enabled"),
    ],
)
def test_refuses_values_that_do_not_fit_together(helm: Helm, settings: list[str], message: str) -> None:
    done = helm("template", set=settings)
    assert done.returncode != 0
    assert message in done.stderr


def test_accepts_a_longer_drain_with_a_longer_grace(render: Render) -> None:
    rendered = render(set=["drainSeconds=120", "terminationGracePeriodSeconds=155"])
    assert pod(rendered)["terminationGracePeriodSeconds"] == 155
    assert environment(rendered)["TENORA_DRAIN_SECONDS"] == "120"


@pytest.mark.parametrize("values", VALUES)
def test_drains_within_the_grace_period(render: Render, values: str) -> None:
    rendered = render(values=values)
    sleep = pod(rendered)["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(environment(rendered)["TENORA_DRAIN_SECONDS"])
    assert pod(rendered)["terminationGracePeriodSeconds"] >= sleep + drain + AFTER_THE_DRAIN


def test_what_comes_after_the_drain_fits_the_rule() -> None:
    """Cut-off streams get their last event, uvicorn closes its connections, jobs save their state."""
    assert 2 * serving.FLUSH_SECONDS + runner.STOP_SECONDS <= AFTER_THE_DRAIN


@pytest.mark.parametrize("values", VALUES)
def test_is_confined(render: Render, values: str) -> None:
    rendered = render(values=values)
    spec, container = pod(rendered), pod(rendered)["containers"][0]
    assert spec["automountServiceAccountToken"] is False
    assert rendered["ServiceAccount"]["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 10000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert "emptyDir" in volumes[mounts["/tmp"]]
    assert environment(rendered)["TENORA_HOME"] in mounts
    assert not any("hostPath" in volume for volume in volumes.values())


def test_the_image_runs_as_the_user_of_the_chart(render: Render, repo_root: Path) -> None:
    context = pod(render())["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in (repo_root / "Dockerfile").read_text()


def test_one_pod_owns_the_volume(render: Render) -> None:
    deployment = render()["Deployment"]["spec"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize(
    ("probe", "path"), [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")]
)
def test_probes(render: Render, probe: str, path: str) -> None:
    container = pod(render())["containers"][0]
    assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    assert environment(render())["TENORA_PORT"] == str(container["ports"][0]["containerPort"])


def test_start_up_is_waited_for_longer_than_the_engine_may_take(render: Render) -> None:
    probe = pod(render())["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > Settings().engine_start_seconds


def test_the_network_is_closed_but_for_the_port_and_fetching(render: Render) -> None:
    policy = render()["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"from": [{"podSelector": {}}], "ports": [{"port": "http", "protocol": "TCP"}]}]
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 443}
    assert "egress" not in render(set=["networkPolicy.allowFetch=false"])["NetworkPolicy"]["spec"]


def test_cpu_and_gpu(render: Render) -> None:
    cpu, gpu = render(values="values-cpu.yaml"), render(values="values-gpu.yaml")
    assert (environment(cpu)["TENORA_DEVICE"], environment(gpu)["TENORA_DEVICE"]) == ("cpu", "cuda")
    assert pod(cpu)["containers"][0]["image"].endswith("-cpu")
    assert pod(gpu)["containers"][0]["image"].endswith("-gpu")
    assert pod(gpu)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in pod(cpu)["containers"][0]["resources"]["limits"]


def test_the_key_comes_from_a_secret_or_is_made_by_the_service(render: Render) -> None:
    assert "TENORA_API_KEY" not in environment(render())
    mine = render(set=["apiKey.existingSecret=mine", "apiKey.key=token"])
    assert environment(mine)["TENORA_API_KEY"] == {"secretKeyRef": {"name": "mine", "key": "token"}}
    assert "Secret" not in mine
    given = render(set=["apiKey.value=a-key-of-sixteen-or-more"])
    source = environment(given)["TENORA_API_KEY"]["secretKeyRef"]
    assert source["name"] == given["Secret"]["metadata"]["name"]
    assert given["Secret"]["stringData"] == {source["key"]: "a-key-of-sixteen-or-more"}
    assert "a-key-of-sixteen-or-more" not in json.dumps(given["Deployment"])


def test_state_outlives_the_release(render: Render) -> None:
    claim = render(set=["persistence.size=7Gi", "persistence.storageClass=fast"])["PersistentVolumeClaim"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"]["requests"]["storage"] == "7Gi"
    mine = render(set=["persistence.existingClaim=mine"])
    assert "PersistentVolumeClaim" not in mine
    assert {"name": "home", "persistentVolumeClaim": {"claimName": "mine"}} in pod(mine)["volumes"]


def test_variables_are_settings(render: Render) -> None:
    known = {f"TENORA_{name.upper()}" for name in Settings.model_fields}
    for values in VALUES:
        used = {name for name in environment(render(values=values)) if name.startswith("TENORA_")}
        assert used <= known


def test_every_setting_can_be_set(chart: Path, render: Render) -> None:
    by_value = {"home", "host", "port", "role", "model", "device", "dtype", "log_level", "drain_seconds", "api_key"}
    schema = json.loads((chart / "values.schema.json").read_text())
    for_tests = {"failpoints"}
    settable = set(Settings.model_fields) - by_value - for_tests
    assert set(schema["properties"]["settings"]["propertyNames"]["enum"]) == settable


def test_settings_reach_the_pod_as_they_were_written(render: Render) -> None:
    written = ["settings.kv_cache_bytes=8589934592", "settings.key_cache_seconds=0.5", "settings.threads=3"]
    variables = environment(render(set=written))
    assert variables["TENORA_KV_CACHE_BYTES"] == "8589934592"
    assert variables["TENORA_KEY_CACHE_SECONDS"] == "0.5"
    assert variables["TENORA_THREADS"] == "3"


def test_threads_follow_the_limit_of_the_container(render: Render) -> None:
    assert environment(render())["TENORA_THREADS"] == {
        "resourceFieldRef": {"containerName": "tenora", "resource": "limits.cpu"}
    }


def test_values_files_change_only_what_exists(chart: Path) -> None:
    default = yaml.safe_load((chart / "values.yaml").read_text())
    for name in ("values-cpu.yaml", "values-gpu.yaml"):
        assert set(yaml.safe_load((chart / name).read_text())) <= set(default)


def test_the_chart_names_the_version_of_the_package(chart: Path, repo_root: Path) -> None:
    import tomllib

    version = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((chart / "Chart.yaml").read_text())["appVersion"] == version
