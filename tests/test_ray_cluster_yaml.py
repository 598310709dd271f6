"""ray_cluster.yaml and infra/ray_cluster_owned.yaml by Ray's own rules, and the promises that their comments make.

No cloud and no second machine are needed: Ray's own functions check, complete and schedule by these files.
"""

import copy
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from tests.infra import ROOT, pinned

session = importlib.import_module("botocore.session")  # published without type hints
validate = importlib.import_module("botocore.validate")
util = pytest.importorskip("ray.autoscaler._private.util", reason="Ray is not installed: pip install -e '.[cluster]'")

AWS, OWNED = ROOT / "ray_cluster.yaml", ROOT / "infra/ray_cluster_owned.yaml"
WORKERS = ("gpu_spot", "gpu_on_demand")
for_both = pytest.mark.parametrize("path", [AWS, OWNED], ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.fixture
def cluster() -> dict[str, Any]:
    return read(AWS)


def validated(cluster: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` completes it, before it asks the cloud anything. Raises what is wrong."""
    prepared = util.prepare_config(copy.deepcopy(cluster))
    util.validate_config(prepared)
    return prepared


# ---- both ----------------------------------------------------------------------------------------


@for_both
def test_ray_accepts_it(path: Path) -> None:
    prepared = validated(read(path))
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert head["max_workers"] == (0 if path == AWS else len(read(OWNED)["provider"]["worker_ips"]))


@for_both
def test_ray_is_the_tested_one_and_never_a_nightly_build(path: Path) -> None:
    cluster = read(path)
    commands = [line for key in cluster if key.endswith("_commands") for line in cluster[key]]
    assert cluster["setup_commands"], "Ray's default for AWS installs a nightly build"
    assert re.findall(r"ray\[[a-z,]*\]==([0-9.]+)", "\n".join(commands)) == [pinned("ray")]
    everything = "\n".join(validated(cluster)["head_setup_commands"])
    assert "nightly" not in everything
    assert "dev0" not in everything


@for_both
def test_machines_install_what_make_wheel_built(path: Path) -> None:
    cluster = read(path)
    mounted = {remote.replace("/home/ubuntu", "~"): local for remote, local in cluster["file_mounts"].items()}
    assert mounted["~/cips/dist"] == "dist"
    assert "-w dist ." in (ROOT / "Makefile").read_text()
    assert (ROOT / mounted["~/cips/constraints.txt"]).is_file()
    assert any("~/cips/dist/*.whl" in line and "constraints.txt" in line for line in cluster["setup_commands"])


@for_both
def test_every_start_presents_the_token(path: Path) -> None:
    cluster = read(path)
    mounted = {remote.replace("/home/ubuntu", "~"): local for remote, local in cluster["file_mounts"].items()}
    assert mounted["~/.ray/auth_token"] == "~/.ray/auth_token"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [line for line in cluster[key] if "ray start" in line]
        assert len(starts) == 1
        assert "export RAY_AUTH_MODE=token" in starts[0]
    head = " ".join(cluster["head_start_ray_commands"])
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--dashboard-host=127.0.0.1" in head


def test_owned_machines_know_their_addresses_and_are_all_started() -> None:
    """Without a way to the internet Debian's machines call themselves 127.0.1.1; Ray's default leaves one out."""
    owned = read(OWNED)
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in owned[key]
        if "ray start" in line
    ]
    assert all("--node-ip-address=$(echo $SSH_CONNECTION | cut -d" in line for line in starts) and len(starts) == 2
    assert "RAY_enable_autoscaler_v2=0" in starts[0]
    reached = "export SSH_CONNECTION='192.0.2.1 50000 192.0.2.11 22'; "
    address = re.search(r"--node-ip-address=(\$\(.*?\)) ", starts[1])
    assert address is not None
    told = subprocess.run(["bash", "-c", f"{reached}echo {address[1]}"], capture_output=True, text=True, check=True)
    assert told.stdout == "192.0.2.11\n"


@for_both
def test_a_silent_machine_is_given_up_before_training_gives_up_its_worker(path: Path) -> None:
    """Else training would start a new worker on a machine that is gone."""
    head = " ".join(read(path)["head_start_ray_commands"])
    timeout_ms, failures = (
        int(re.search(rf"RAY_health_check_{name}=(\d+)", head)[1])  # type: ignore[index]
        for name in ("timeout_ms", "failure_threshold")
    )
    period_ms = 3000  # Ray's own pause between two checks
    assert (
        timeout_ms * failures + period_ms * (failures - 1)
        < 1000 * load_config("ffhq256").cluster.health_check_timeout_s
    )


@for_both
def test_no_secret_is_written_here(path: Path) -> None:
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|password", path.read_text(), re.IGNORECASE)


@for_both
def test_every_number_is_explained(path: Path) -> None:
    """A line with a number has a comment on it or close above it."""
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        code, _, comment = line.partition(" #")
        if re.match(r"\s*(- )?[A-Za-z_]+: \d+\s*$", code) and not comment:
            above = "\n".join(lines[max(0, number - 6) : number])
            assert "#" in above, f"line {number + 1} has no explanation: {line}"


@for_both
def test_its_commands_are_the_readmes(path: Path) -> None:
    told = (ROOT / "infra/README.md").read_text()
    assert f"ray up {path.relative_to(ROOT)}" in path.read_text()
    assert f"ray up {path.relative_to(ROOT)}" in told


# ---- AWS -----------------------------------------------------------------------------------------


def test_ray_would_have_refused_mistakes(cluster: dict[str, Any]) -> None:
    """The check above means something: common mistakes do not pass it."""
    wrong = {**cluster, "max_worker": 8}
    with pytest.raises(Exception, match="max_worker"):
        validated(wrong)
    with pytest.raises(ValueError, match="head_node_type"):
        validated({**cluster, "head_node_type": "haed"})
    wrong = copy.deepcopy(cluster)
    wrong["available_node_types"]["gpu_spot"]["resources"]["GPU"] = 0.5
    with pytest.raises(Exception, match="0.5 is not of type 'integer'"):
        validated(wrong)


def test_the_head_runs_drivers_and_no_gpu_work(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"]["driver"] == 1
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"], "a crash of the head ends all runs: no spot machine"


@pytest.mark.parametrize("name", WORKERS)
def test_gpu_workers_come_and_go(cluster: dict[str, Any], name: str) -> None:
    worker = cluster["available_node_types"][name]
    assert (worker["min_workers"], worker["max_workers"]) == (0, 8)
    assert cluster["max_workers"] == worker["max_workers"]
    assert worker["resources"]["GPU"] == 1
    for preset in ("ffhq256", "churches256"):
        wanted = load_config(preset).cluster
        assert wanted.workers <= worker["max_workers"]
        assert wanted.cpus_per_worker <= worker["resources"]["CPU"]


def test_the_two_types_differ_in_their_price_alone(cluster: dict[str, Any]) -> None:
    spot, on_demand = (copy.deepcopy(cluster["available_node_types"][name]) for name in WORKERS)
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot.pop("priority") > on_demand.pop("priority")
    assert spot == on_demand


def launched(cluster: dict[str, Any], gpus: int, availability: dict[str, float]) -> dict[str, int]:
    """Machines by type that Ray's autoscaler, the one that the head starts, would ask for."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(copy.deepcopy(cluster), skip_content_hash=True)
    wanted = {"GPU": 1, "CPU": load_config("ffhq256").cluster.cpus_per_worker}
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=cluster["max_workers"],  # the head aside, which is none of them here
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(wanted)] * gpus),
            recoverable_resource_availabilities=availability,
        )
    )
    return {request.instance_type: request.count for request in reply.to_launch}


def test_spot_machines_are_asked_for_first_and_on_demand_ones_after_a_refusal(cluster: dict[str, Any]) -> None:
    assert launched(cluster, 8, {}) == {"gpu_spot": 8}
    assert launched(cluster, 8, {"gpu_spot": 0.5}) == {"gpu_on_demand": 8}
    assert launched(cluster, 3, {"gpu_spot": 0.9, "gpu_on_demand": 0.1}) == {"gpu_spot": 3}
    assert launched(cluster, 9, {}) == {"gpu_spot": 8}, "never more than max_workers"
    assert "RAY_enable_autoscaler_v2=1" in cluster["head_start_ray_commands"][-1]


def misunderstood(node_config: dict[str, Any]) -> str:
    """What Amazon's own description of RunInstances has against a machine; needs no account."""
    described = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = validate.ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, described)
    return report.generate_report()


@pytest.mark.parametrize("name", ["head", *WORKERS])
def test_amazon_understands_the_machines(cluster: dict[str, Any], name: str) -> None:
    machine = cluster["available_node_types"][name]["node_config"]
    assert misunderstood(machine) == ""
    assert "VolumeSiz" in misunderstood(machine | {"BlockDeviceMappings": [{"Ebs": {"VolumeSiz": 150}}]})


def test_every_machine_has_a_role_and_the_same_image(cluster: dict[str, Any]) -> None:
    nodes = [node["node_config"] for node in cluster["available_node_types"].values()]
    assert all(node["IamInstanceProfile"]["Name"].startswith("cips-") for node in nodes)
    assert len({node["ImageId"] for node in nodes}) == 1


def test_disks_hold_what_the_heads_holds_and_the_cache(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head, spot = (types[name]["node_config"]["BlockDeviceMappings"][0]["Ebs"] for name in ("head", "gpu_spot"))
    told = re.search(r"data\.cache_bytes=(\d+)e9", AWS.read_text())
    assert told is not None
    assert spot["VolumeSize"] == head["VolumeSize"] + int(told[1])


def test_workers_watch_for_the_end_of_a_spot_machine(cluster: dict[str, Any]) -> None:
    """tests/test_infra_spot_notice.py runs the script."""
    assert (ROOT / cluster["file_mounts"]["/home/ubuntu/cips/spot_notice.sh"]).is_file()
    watch = cluster["worker_start_ray_commands"][-1]
    assert "~/cips/spot_notice.sh" in watch and watch.rstrip().endswith("&"), "`ray up` would wait for its end"


# ---- machines of one's own -----------------------------------------------------------------------


def test_all_machines_that_one_owns_are_kept_and_the_head_runs_no_work() -> None:
    owned = read(OWNED)
    prepared = validated(owned)
    (kind,) = prepared["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(owned["provider"]["worker_ips"])
    start = owned["head_start_ray_commands"][-1]
    assert "--num-cpus=0 --num-gpus=0" in start and """--resources='{"driver": 1}'""" in start
