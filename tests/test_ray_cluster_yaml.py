"""ray_cluster.yaml by Ray's own rules, without a cloud, and the promises that its comments make."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config

util = pytest.importorskip("ray.autoscaler._private.util", reason="Ray is not installed: pip install -e '.[cluster]'")

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "ray_cluster.yaml").read_text()


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def validated(cluster: dict[str, Any]) -> dict[str, Any]:
    prepared = util.prepare_config(copy.deepcopy(cluster))
    util.validate_config(prepared)
    return prepared


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = validated(cluster)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_ray_would_have_refused_mistakes(cluster: dict[str, Any]) -> None:
    """The check above means something: common mistakes do not pass it."""
    wrong = {**cluster, "max_worker": 8}
    with pytest.raises(Exception, match="max_worker"):
        validated(wrong)
    with pytest.raises(ValueError, match="head_node_type"):
        validated({**cluster, "head_node_type": "haed"})
    wrong = copy.deepcopy(cluster)
    wrong["available_node_types"]["gpu_worker"]["resources"]["GPU"] = 0.5
    with pytest.raises(Exception, match="0.5 is not of type 'integer'"):
        validated(wrong)


def test_the_head_runs_drivers_and_no_gpu_work(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["driver"] == 1
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"], "a crash of the head ends all runs: no spot machine"


def test_gpu_workers_come_and_go(cluster: dict[str, Any]) -> None:
    worker = cluster["available_node_types"]["gpu_worker"]
    assert (worker["min_workers"], worker["max_workers"]) == (0, 8)
    assert cluster["max_workers"] == worker["max_workers"]
    assert worker["resources"]["GPU"] == 1
    for name in ("ffhq256", "churches256"):
        wanted = load_config(name).cluster
        assert wanted.workers <= worker["max_workers"]
        assert wanted.cpus_per_worker <= worker["resources"]["CPU"]


def test_every_machine_has_a_role_and_the_same_image(cluster: dict[str, Any]) -> None:
    nodes = [node["node_config"] for node in cluster["available_node_types"].values()]
    assert all(node["IamInstanceProfile"]["Name"].startswith("cips-") for node in nodes)
    assert len({node["ImageId"] for node in nodes}) == 1


def test_ray_is_the_tested_one_and_never_a_nightly_build(cluster: dict[str, Any]) -> None:
    commands = [line for key in cluster if key.endswith("_commands") for line in cluster[key]]
    assert cluster["setup_commands"], "Ray's default installs a nightly build"
    assert re.findall(r"ray\[[a-z,]*\]==([0-9.]+)", "\n".join(commands)) == [pinned("ray")]
    everything = "\n".join(validated(cluster)["head_setup_commands"])
    assert "nightly" not in everything
    assert "dev0" not in everything


def test_machines_install_what_make_wheel_built(cluster: dict[str, Any]) -> None:
    mounts = cluster["file_mounts"]
    makefile = (ROOT / "Makefile").read_text()
    assert mounts["/home/ubuntu/cips/dist"] == "dist"
    assert "-w dist ." in makefile
    assert (ROOT / mounts["/home/ubuntu/cips/constraints.txt"]).is_file()
    assert any("~/cips/dist/*.whl" in line and "constraints.txt" in line for line in cluster["setup_commands"])


def test_every_start_presents_the_token(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [line for line in cluster[key] if "ray start" in line]
        assert len(starts) == 1
        assert "export RAY_AUTH_MODE=token" in starts[0]
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in cluster["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_no_secret_is_written_here() -> None:
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|password", TEXT, re.IGNORECASE)


def test_every_number_is_explained() -> None:
    """A line with a number has a comment on it or close above it."""
    lines = TEXT.splitlines()
    for number, line in enumerate(lines):
        code, _, comment = line.partition(" #")
        if re.match(r"\s*[A-Za-z_]+: \d+\s*$", code) and not comment:
            above = "\n".join(lines[max(0, number - 6) : number])
            assert "#" in above, f"line {number + 1} has no explanation: {line}"
