"""infra/kuberay/ by its structure, and by Ray's own autoscaler, which reads what the operator hands it."""

import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from tests.infra import ROOT, pinned

FOLDER = ROOT / "infra/kuberay"
FILES = sorted(FOLDER.glob("*.yaml"))
DOCKERFILE = (ROOT / "infra/docker/Dockerfile").read_text()


def document(name: str, kind: str) -> dict[str, Any]:
    (found,) = [one for one in yaml.safe_load_all((FOLDER / name).read_text()) if one["kind"] == kind]
    return found


@functools.cache
def spec() -> dict[str, Any]:
    return document("raycluster.yaml", "RayCluster")["spec"]


@functools.cache
def job() -> dict[str, Any]:
    return document("rayjob.yaml", "RayJob")["spec"]


def groups() -> dict[str, dict[str, Any]]:
    """Head and workers by name."""
    return {"head": spec()["headGroupSpec"]} | {group["groupName"]: group for group in spec()["workerGroupSpecs"]}


def pod(name: str) -> dict[str, Any]:
    return groups()[name]["template"]["spec"]


def container(name: str) -> dict[str, Any]:
    (only,) = pod(name)["containers"]
    return only


def gibibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


each_pod = pytest.mark.parametrize("name", ["head", "gpu"])


# ---- what it is ----------------------------------------------------------------------------------


def test_a_training_of_its_own_runs_on_the_same_cluster() -> None:
    assert job()["rayClusterSpec"] == spec()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_documents_say_what_they_are(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert {(one["apiVersion"], one["kind"]) for one in documents} <= {
        ("v1", "ServiceAccount"),
        ("ray.io/v1", "RayCluster"),
        ("ray.io/v1", "RayJob"),
    }
    assert all(one["metadata"]["name"].startswith("cips") for one in documents)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kubernetes_reads_the_files_as_this_test_does(path: Path, tmp_path: Path) -> None:
    """Kustomize, part of kubectl, needs no server; its YAML reader is kubectl's."""
    shutil.copy(path, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{path.name}]\n")
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    read = list(yaml.safe_load_all(done.stdout))
    assert sorted(map(in_order, read)) == sorted(map(in_order, yaml.safe_load_all(path.read_text())))


def in_order(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)


@each_pod
def test_ray_is_the_tested_one(name: str) -> None:
    assert spec()["rayVersion"] == pinned("ray")
    assert container(name)["image"].endswith(f"/cips-pipeline:ray-{pinned('ray')}")


# ---- what Ray makes of it ------------------------------------------------------------------------


def test_rays_autoscaler_reads_it_and_offers_gpus_and_no_work_on_the_head() -> None:
    kuberay = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config", reason="Ray is not installed")
    cluster = document("raycluster.yaml", "RayCluster")
    cluster["metadata"]["namespace"] = "default"
    understood = kuberay._derive_autoscaling_config_from_ray_cr(cluster)
    head, gpu = (understood["available_node_types"][name] for name in ("headgroup", "gpu"))
    assert (head["resources"]["CPU"], head["resources"].get("GPU"), head["resources"]["driver"]) == (0, None, 1)
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    assert understood["idle_timeout_minutes"] == 10
    for preset in ("ffhq256", "churches256"):
        wanted = load_config(preset).cluster
        assert wanted.use_gpu and wanted.workers <= gpu["max_workers"]
        assert wanted.cpus_per_worker <= gpu["resources"]["CPU"]


def test_gpus_asked_of_kubernetes_are_gpus_told_to_ray() -> None:
    told, asked = groups()["gpu"]["rayStartParams"], container("gpu")["resources"]
    assert told["num-gpus"] == asked["limits"]["nvidia.com/gpu"] == asked["requests"]["nvidia.com/gpu"]
    assert told["num-cpus"] == asked["limits"]["cpu"]
    assert "nvidia.com/gpu" not in container("head")["resources"]["limits"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod("gpu")["tolerations"]


@each_pod
def test_requests_equal_limits(name: str) -> None:
    resources = container(name)["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory"} <= resources["limits"].keys()
    scaler = spec()["autoscalerOptions"]["resources"]
    assert scaler["requests"] == scaler["limits"]


@each_pod
def test_shared_memory_is_memory_and_holds_rays_objects(name: str) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container(name)["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod(name)["volumes"]}
    assert set(mounts.values()) == volumes.keys()
    memory = volumes[mounts["/dev/shm"]]
    assert memory["medium"] == "Memory"
    limit = gibibytes(container(name)["resources"]["limits"]["memory"])
    assert 0.3 * limit <= gibibytes(memory["sizeLimit"]) < limit / 2, "Ray's share is 30%"


def test_the_cache_fits_its_volume() -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in container("gpu")["volumeMounts"]}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod("gpu")["volumes"]}
    config = load_config("ffhq256", arguments_of_the_job()[2:])
    assert config.data.cache_dir.replace("~", "/home/ray").startswith("/home/ray/.cache/")
    assert config.data.cache_bytes < gibibytes(volumes[mounts["/home/ray/.cache"]]["sizeLimit"]) * 2**30
    assert "useradd --create-home --uid 1000 ray" in DOCKERFILE


# ---- who may do what -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_secrets_are_references(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}", text)
    for one in yaml.safe_load_all(text):
        assert one["kind"] != "Secret"
        for name, value in environment_of(one):
            secret = re.search(r"TOKEN|SECRET|PASSWORD|KEY", name)
            assert not secret or value is None, f"{name} has a value"
    assert container("gpu")["envFrom"] == container("head")["envFrom"]
    assert [list(source) for source in container("head")["envFrom"]] == [["secretRef"]]


def environment_of(node: Any) -> list[tuple[str, str | None]]:
    """Names and written values of all variables below a node of a manifest."""
    if isinstance(node, list):
        return [found for one in node for found in environment_of(one)]
    if not isinstance(node, dict):
        return []
    own = [(one["name"], one.get("value")) for one in node.get("env", [])]
    return own + [found for one in node.values() for found in environment_of(one)]


def test_the_token_is_made_and_handed_out_by_the_operator() -> None:
    assert spec()["authOptions"] == {"mode": "token"}
    major, minor = map(int, pinned("ray").split(".")[:2])
    assert (major, minor) >= (2, 52), "the first that KubeRay does this for"


@each_pod
def test_pods_have_an_account_and_no_privilege(name: str) -> None:
    account = document("raycluster.yaml", "ServiceAccount")["metadata"]["name"]
    assert account == document("rayjob.yaml", "ServiceAccount")["metadata"]["name"]
    assert pod(name)["serviceAccountName"] == account
    assert pod(name)["securityContext"]["runAsNonRoot"] is True
    uid = re.search(r"useradd .*--uid (\d+)", DOCKERFILE)
    assert uid is not None
    assert pod(name)["securityContext"]["runAsUser"] == int(uid[1])
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


# ---- life and death ------------------------------------------------------------------------------


@each_pod
def test_readiness_is_asked_where_ray_answers_without_a_token(name: str) -> None:
    agent = pytest.importorskip("ray.dashboard.http_server_agent", reason="Ray is not installed")
    constants = importlib.import_module("ray._private.ray_constants")
    asked = container(name)["readinessProbe"]["httpGet"]
    assert asked["path"] in agent.PUBLIC_EXACT_PATHS
    assert asked["port"] == constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


def test_a_pod_that_is_told_to_end_has_time_for_a_checkpoint() -> None:
    variables = {one["name"]: one["value"] for one in container("gpu")["env"]}
    drain_s = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 60 < drain_s < pod("gpu")["terminationGracePeriodSeconds"]
    constants = pytest.importorskip("ray._private.ray_constants", reason="Ray is not installed")
    assert hasattr(constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"), "Ray's name for it has changed"


def test_a_silent_pod_is_given_up_before_training_gives_up_its_worker() -> None:
    variables = {one["name"]: int(one["value"]) for one in container("head")["env"]}
    timeout_ms, failures = (variables[f"RAY_health_check_{name}"] for name in ("timeout_ms", "failure_threshold"))
    limit_s = load_config("ffhq256", arguments_of_the_job()[2:]).cluster.health_check_timeout_s
    assert timeout_ms * failures + 3000 * (failures - 1) < 1000 * limit_s


def test_a_lost_head_is_a_new_cluster_and_the_run_goes_on() -> None:
    assert job()["backoffLimit"] > 0
    assert job()["shutdownAfterJobFinishes"] is True
    assert any(word.startswith("run.name=") for word in arguments_of_the_job()), "a second attempt must find the first"


def arguments_of_the_job() -> list[str]:
    program, option, module, *arguments = shlex.split(job()["entrypoint"])
    assert (program, option, module) == ("python", "-m", "jobs.train")
    return arguments


def test_the_training_is_one_that_can_be_started(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("jobs.train").main([*arguments_of_the_job(), "--dry-run"])
    assert "workers: 8" in capsys.readouterr().out
