"""A cluster without machines: the run asks Ray's autoscaler for them, trains on them, and lets them go again.

The machines are Ray nodes on this one, which Ray's own autoscaler starts and ends (its provider `fake_multinode`).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.cluster.resources import nodes_alive, room
from pipeline.cluster.session import ray_session
from pipeline.cluster.training import fit
from pipeline.config import load_config
from pipeline.data.stream import DataConfig
from tests.faults import starts, wait_until
from tests.servers import free_ports
from tests.small import SMALL_SETTINGS, small_data

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return small_data(tmp_path_factory.mktemp("data"))


def scaling(address: str) -> dict[str, object]:
    """What ray_cluster.yaml is to AWS: a head without work, up to two machines, idle ones end after six seconds."""
    types = {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "machine": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    return {
        "cluster_name": "test",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "provider": {"type": "fake_multinode", "gcs_address": address},
        "head_node_type": "head",
        "available_node_types": types,
        "cluster_synced_files": [],
    }


@contextlib.contextmanager
def autoscaling_cluster() -> Iterator[str]:
    """A Ray head with its autoscaler, in processes of their own; yields its address, and ends all that it started."""
    (port,) = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: paths of sockets are limited
    address = f"127.0.0.1:{port}"
    (folder / "scaling.json").write_text(json.dumps(scaling(address)))
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=0"),
        *("--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}/ray"),
        f"--autoscaling-config={folder}/scaling.json",
    ]
    settings = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "PYTHONPATH": os.getcwd(),
    }
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        for name, value in settings.items():
            patch.setenv(name, value)
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            started = wait_until(
                "the start of the head", 60.0, lambda: head.poll() is not None or b"runtime started" in read(folder)
            )
            assert started and head.poll() is None, read(folder).decode()
            yield address
        finally:
            ray.shutdown()
            head.kill()
            head.wait()
            for pid in processes_of(folder):  # the autoscaler's nodes, and whatever the head left
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def read(folder: Path) -> bytes:
    return (folder / "log").read_bytes()


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names the cluster's own folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_machines_come_for_a_run_and_go_after_it(
    data: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with autoscaling_cluster() as address:
        config = load_config(
            None,
            [
                *SMALL_SETTINGS,
                "data.decoder=pillow",
                "train.precision=fp32",
                "train.total_kimg=0.08",
                "train.tick_kimg=0.04",
                "cluster.workers=2",
                "cluster.threads_per_worker=1",
                "cluster.worker_start_timeout_s=90",
                "cluster.health_check_interval_s=0.5",
                f"cluster.address={address}",
                "tracking.enabled=false",
                f"data.uri={data.uri}",
                f"run.dir={tmp_path}",
                "run.name=scaled",
            ],
        )
        with ray_session(config.cluster):
            assert room(config.cluster, nodes_alive()) == 0
            assert fit(config, None).images_seen == 80
            said = capfd.readouterr().out
            assert "waiting for machines, 90 s at most: asked for 2 workers with 1 CPU each" in said
            (workers,) = starts(config)
            assert len({worker["node"] for worker in workers}) == 2
            wait_until("the end of idle machines", 90.0, lambda: room(config.cluster, nodes_alive()) == 0, pause=0.5)
