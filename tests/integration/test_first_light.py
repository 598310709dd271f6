"""The whole way through real servers: S3, MLflow over HTTP, two Ray nodes, a worker killed in between.

Pictures are ingested to S3; two workers on two nodes train from it and keep their checkpoints there; one is killed;
the run goes on, is measured, registered, promoted, loaded in a new process and asked for pictures.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import evaluate, ingest, promote, train
from pipeline.cluster.follow import read_restarts
from pipeline.config import Config, load_config, to_yaml
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.observers import read_log
from tests.faults import starts
from tests.mlflow_server import check_one_run, mlflow_server
from tests.servers import S3Server
from tests.small import SMALL_SETTINGS, small_pictures

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow]

SMALL = [
    *SMALL_SETTINGS,
    "train.precision=fp32",
    "train.r1_gamma=1",
    "train.tick_kimg=0.08",
    "train.checkpoint_kimg=0.24",
    "evaluate.images=64",
    "evaluate.input_size=32",
    "cluster.workers=2",
    "cluster.threads_per_worker=1",
    "cluster.health_check_interval_s=0.5",
    "tracking.model_name=first-light",
]


def kill_a_worker_after(config: Config, images_seen: int, done: threading.Event) -> None:
    """Waits until the run's log has reached a count of images, then kills one of its worker processes."""
    while not done.wait(0.2):
        log = read_log(config.run_uri, config.storage)
        if log and log[-1]["images_seen"] >= images_seen:
            os.kill(starts(config)[-1][1]["pid"], signal.SIGKILL)
            return


def test_first_light(s3: S3Server, ray_address: str, tmp_path: Path) -> None:
    bucket = s3.new_bucket()
    pictures = small_pictures(tmp_path / "pictures", 80)
    (pictures / "broken.jpg").write_bytes((pictures / "000.png").read_bytes()[:100])
    with mlflow_server(tmp_path) as server:
        config = load_config(
            None,
            [
                *SMALL,
                f"ingest.source={pictures}",
                f"data.uri=s3://{bucket}/data",
                f"run.dir=s3://{bucket}/runs",
                "run.name=light",
                f"cluster.address={ray_address}",
                f"tracking.uri={server.uri}",
                "train.total_kimg=1.2",
                "train.evaluate_kimg=1.2",
            ],
        )
        report = ingest.run(config)
        assert (report.samples, [skipped.path for skipped in report.skipped]) == (80, ["broken.jpg"])

        done = threading.Event()
        killer = threading.Thread(target=kill_a_worker_after, args=(config, 480, done))
        killer.start()
        try:
            trained = train.run(config)
        finally:
            done.set()
            killer.join()

        # The kill happened, cost a restart, and left neither a gap nor a second MLflow run.
        assert len(read_restarts(config.run_uri, config.storage)) == 1
        assert trained.outcome.resumed_from >= 240
        assert trained.outcome.images_seen == 1200
        assert list_checkpoints(config.run_uri, config.storage)[-1] == 1200
        log = read_log(config.run_uri, config.storage)
        assert [line["images_seen"] for line in log] == list(range(0, 1201, 80))
        run = check_one_run(config, range(80, 1201, 80))
        assert run.info.run_id == trained.tracking_run
        assert run.data.params["train.batch_size"] == "8"
        assert run.inputs.dataset_inputs[0].dataset.digest == report.digest[:36]

        # Measured again by tasks over the cluster, the distance is the one that training saw.
        again = evaluate.run(config)
        assert again.value == pytest.approx(trained.outcome.results[0]["value"], rel=1e-3)
        assert again.protocol.to_dict() == trained.outcome.results[0]["protocol"]

        assert trained.version == "1"
        assert "is the champion" in promote.run(config)
        drawn = subprocess.run(
            [
                sys.executable,
                "-m",
                "jobs.synthesize",
                "samples",
                "--config",
                write_config(tmp_path, config),
                "synthesize.model=models:/first-light@champion",
                f"synthesize.out={tmp_path}/samples.png",
                "synthesize.images=6",
                "synthesize.columns=3",
                "synthesize.size=32",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert drawn.returncode == 0, drawn.stderr
        with Image.open(tmp_path / "samples.png") as sheet:
            assert sheet.size == (3 * 33 - 1, 2 * 33 - 1)
            assert np.asarray(sheet).std() > 1

        # Started again, the finished run does nothing but say so.
        assert train.train(config, trained.tracking_run).resumed_from == 1200


def write_config(folder: Path, config: Config) -> str:
    """The configuration as a file for another process."""
    (folder / "config.yaml").write_text(to_yaml(config))
    return str(folder / "config.yaml")
