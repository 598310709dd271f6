"""A grid over two settings, patch size among them: a Train run per trial, one MLflow parent, a sorted table."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.mlflow_server import sqlite_uri
from tests.ray_nodes import ray_nodes
from tests.small import SMALL_SETTINGS, small_data

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow]


def test_a_grid_search(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    uri = sqlite_uri(tmp_path)
    (tmp_path / "grid.yaml").write_text("run: {name: grid}\n")
    settings = [
        f"run.dir={tmp_path}/runs",
        f"data.uri={data.uri}",
        "data.decoder=pillow",
        *SMALL_SETTINGS,
        "train.total_kimg=0.032",
        "evaluate.images=32",
        "evaluate.input_size=32",
        "cluster.health_check_interval_s=0.5",
        f"tracking.uri={uri}",
        "tune.space={train.patch.size: [8, null], train.learning_rate: [0.002]}",
    ]
    with ray_nodes(1, cpus=1) as address:  # a trial that took the CPU for itself would wait for ever
        command = [sys.executable, "-m", "jobs.tune", "--config", f"{tmp_path}/grid.yaml", *settings]
        command.append(f"cluster.address={address}")
        search = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert search.returncode == 0, search.stdout + search.stderr
    printed = search.stdout
    rows = [line.split() for line in printed.splitlines() if line.startswith("grid-0")]
    assert {row[0] for row in rows} == {"grid-000", "grid-001"}
    assert [float(row[3]) for row in rows] == sorted(float(row[3]) for row in rows)
    assert all(row[4] == "0.032" for row in rows)
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "cips"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"grid", "grid-000", "grid-001"}
    for name in ("grid-000", "grid-001"):
        assert runs[name].data.tags["mlflow.parentRunId"] == runs["grid"].info.run_id
        assert "fd_efficientnet_lite0" in runs[name].data.metrics
        assert runs[name].info.status == "FINISHED"
