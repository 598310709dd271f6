"""What one sees of a run on a cluster: a live line on a terminal, metrics for Prometheus, its status, and MLflow."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from prometheus_client.parser import text_string_to_metric_families

from jobs import status
from pipeline.config import Config, load_config, to_yaml
from pipeline.training.observers import read_log
from tests.faults import starts
from tests.mlflow_server import sqlite_uri
from tests.ray_nodes import ray_nodes
from tests.small import SMALL_SETTINGS, small_data
from tests.terminal import terminal
from tests.test_infra_grafana import OWN, names, queries

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(480)]

COLUMNS = 160
Samples = dict[tuple[str, str], float]
"""(name without `ray_`, value of the tag `name` or `metric`) to the value exported last."""


def exported() -> Samples:
    """What the agents of all nodes offer to Prometheus at the moment, our own for the run `seen` only."""
    found: Samples = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=10) as response:
            for family in text_string_to_metric_families(response.read().decode()):
                for sample in family.samples:
                    tags, name = sample.labels, sample.name.removeprefix("ray_")
                    if not name.startswith("cips_") or tags.get("run") == "seen":
                        found[name, tags.get("name", tags.get("metric", ""))] = sample.value
    return found


def wait_for_metrics(wanted: set[str], deadline_s: float) -> Samples:
    """Waits until each of the names was exported at least once."""
    deadline, found = time.monotonic() + deadline_s, Samples()
    while missing := wanted - {name for name, _ in found}:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not exported within {deadline_s:g} s: {sorted(missing)}")
        time.sleep(0.5)
        found |= exported()
    return found


def settings_of(tmp_path: Path, address: str) -> Config:
    return load_config(
        None,
        [
            *SMALL_SETTINGS,
            f"run.dir={tmp_path}/runs",
            "run.name=seen",
            f"data.uri={small_data(tmp_path).uri}",
            "data.decoder=pillow",
            "train.precision=fp32",
            "train.total_kimg=2.4",
            "train.tick_kimg=0.08",
            "train.checkpoint_kimg=0.4",
            "train.evaluate_kimg=2.4",
            "evaluate.images=32",
            "evaluate.input_size=32",
            "cluster.workers=2",
            "cluster.threads_per_worker=1",
            "cluster.health_check_interval_s=0.5",
            f"cluster.address={address}",
            f"tracking.uri={sqlite_uri(tmp_path)}",
            "tracking.model_name=seen",
        ],
    )


def test_a_run_is_seen(tmp_path: Path) -> None:
    with (
        ray_nodes(1, cpus=2, _system_config={"metrics_report_interval_ms": 1000}) as address,
        terminal(COLUMNS) as term,
    ):
        config = settings_of(tmp_path, address)
        (tmp_path / "seen.yaml").write_text(to_yaml(config))
        ray.init(address=address, log_to_driver=False)
        command = [sys.executable, "-m", "jobs.train", "--config", str(tmp_path / "seen.yaml")]
        training = subprocess.Popen(command, stdout=term.slave, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            # A person sees what is waited for, then ticks.
            term.wait_for("line about the start", lambda text: "for the workers to start" in text, 60)
            term.wait_for("word of rank 0", lambda text: "worker 0: 2 workers run" in text, 90)
            term.wait_for("tick", lambda text: "img/s" in text, 60)

            # Prometheus would see the run, and the nodes as the dashboard asks for them.
            of_nodes = {name for query in queries() for name in names(query) if name.startswith("node_")}
            without_gpus = {name for name in of_nodes if "gpu" not in name and "gram" not in name}
            found = wait_for_metrics(OWN | without_gpus, 60)
            assert found["cips_images_total", ""] == 2400
            assert found["cips_workers", ""] == 2
            assert 0 <= found["cips_data_wait_share", ""] <= 1
            assert found["cips_images_per_second", ""] > 0 and found["cips_checkpoints_total", ""] >= 1
            log = {line["images_seen"]: line for line in read_log(config.run_uri, config.storage)}
            assert found["cips_images_seen", ""] in log
            losses = {line["scalars"].get("loss/D") for line in log.values()}
            assert found["cips_scalar", "loss/D"] in losses
            measured = {result["metric"]: result["value"] for result in log[0]["results"]}
            assert {metric: found["cips_distance", metric] for metric in measured} == measured

            # Whoever asks is told the same.
            told = status.look(config.run_uri, config.storage)
            assert (status.state(told), told["total_images"], told["mlflow"]["status"]) == ("running", 2400, "RUNNING")

            # A worker dies: the person sees why training pauses, and that it goes on.
            os.kill(starts(config)[-1][1]["pid"], signal.SIGKILL)
            term.wait_for("restart", lambda text: "restart 1: " in text, 60)
            term.wait_for("tick after it", lambda text: "restarts 1" in text.partition("restart 1: ")[2], 90)
            assert training.wait(timeout=200) == 0, "\n".join(term.screen())
        finally:
            if training.poll() is None:
                os.killpg(training.pid, signal.SIGKILL)
                training.wait()

        told = status.look(config.run_uri, config.storage)
        assert (status.state(told), told["images_seen"]) == ("ended", 2400)
        assert [restart["cause"][:7] for restart in told["restarts"]] == ["worker "]
        assert told["mlflow"]["versions"] == ["seen version 1"]
        run = MlflowClient(config.tracking_uri).get_run(told["tracking_run"])
        assert 0 < run.data.metrics["system/cpu_utilization_percentage"] <= 100

    # Of thirty ticks two lines are left: the distances at the start and at the end; the live line is gone.
    lines = term.screen()
    kept = [line for line in lines if line.startswith("kimg ")]
    assert [line.split()[1] for line in kept] == ["0.0/2.4", "2.4/2.4"], "\n".join(lines)
    assert all("fd_efficientnet_lite0" in line for line in kept)
    assert "restarts 1" in kept[-1]
    drawn = [piece for piece in term.output.split("\r") if " ago" in piece.split("\n")[0]]
    assert len(drawn) > 20 and max(len(piece.split("\n")[0].rstrip()) for piece in drawn) < COLUMNS
