"""The store is gone for 20 seconds and the tracking server for 30, under two workers of a cluster.

Pictures, checkpoints and log lie in one S3 service, which dies in the middle of a checkpoint's upload; the MLflow
server dies at the same moment. Nobody is restarted: training goes on while it has pictures, and ends as if undisturbed.
"""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import train
from pipeline.cluster.follow import read_restarts
from pipeline.config import Config, load_config
from pipeline.ingest.ingest import IngestConfig, ingest
from pipeline.storage import StorageConfig
from pipeline.training.checkpoint import GENERATOR, TRAINING, list_checkpoints, read_info
from pipeline.training.observers import read_log
from tests.mlflow_server import MlflowServer, mlflow_server
from tests.proxy import Fault, FaultProxy, Request, fault_proxy, is_shard
from tests.ray_nodes import ray_nodes
from tests.servers import S3Server, s3_server
from tests.small import SMALL_SETTINGS, small_pictures
from tests.without_ray import train_without_ray

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow]

STORE_AWAY_S, TRACKER_AWAY_S = 20.0, 30.0
TICK, OUTAGE, TOTAL = 80, 400, 1200
SMALL = [
    *SMALL_SETTINGS,
    "train.precision=fp32",
    "train.r1_gamma=1",
    f"train.tick_kimg={TICK / 1000}",
    f"train.checkpoint_kimg={OUTAGE / 1000}",
    f"train.total_kimg={TOTAL / 1000}",
    "train.keep_checkpoints=9",
    "data.decoder=pillow",
    "data.read_ahead=1",
    "data.shuffle_row_groups=1",
    "storage.attempts=2",
    "storage.connect_timeout_s=2",
    "cluster.workers=2",
    "cluster.threads_per_worker=1",
    "cluster.health_check_interval_s=0.5",
    "tracking.model_name=outage",
]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    """Between everybody and the store, in the environment before the cluster starts."""
    with fault_proxy(server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in (server.environment() | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as tracker:
        yield tracker


class BothDie:
    """Kills store and tracker when the second file of a checkpoint is on its way; both come back by themselves."""

    def __init__(self, server: S3Server, tracker: MlflowServer, proxy: FaultProxy, checkpoint: int) -> None:
        self.server, self.tracker = server, tracker
        self.place = f"runs/disturbed/checkpoints/{checkpoint:010d}/{TRAINING}"
        self.died = threading.Event()
        self.missed: list[Request] = []
        """Requests for pictures while the store was away."""
        self.comebacks = [threading.Timer(STORE_AWAY_S, server.start), threading.Timer(TRACKER_AWAY_S, tracker.start)]
        proxy.plan([Fault("status")], self._look)

    def _look(self, request: Request) -> bool:
        if self.place in request.path and not self.died.is_set():
            self.server.stop()
            self.tracker.stop()
            self.died.set()
            for comeback in self.comebacks:
                comeback.start()
        if self.comebacks[0].is_alive() and is_shard(request):
            self.missed.append(request)
        return False  # no answer is spoiled: there is nobody left to give one


def hashes(config: Config, images_seen: int) -> list[str]:
    """Of all tensors of a checkpoint."""
    files = read_info(f"{config.run_uri}/checkpoints/{images_seen:010d}", config.storage).files
    return [files[name]["sha256"] for name in (GENERATOR, TRAINING)]


def test_store_and_tracker_are_away_for_a_while(
    server: S3Server, tracker: MlflowServer, proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = server.new_bucket()
    data = f"s3://{bucket}/data"
    source = small_pictures(tmp_path / "pictures", 120)
    ingest(IngestConfig(source=str(source), size=16, row_group_rows=4), data, StorageConfig(), progress=False)
    places = [f"data.uri={data}", f"run.dir=s3://{bucket}/runs"]
    fair = load_config(None, [*SMALL, *places, "run.name=fair", "tracking.enabled=false"])
    train_without_ray(fair, tmp_path / "fair")

    with ray_nodes(2, cpus=1) as address:
        places.append(f"cluster.address={address}")
        config = load_config(None, [*SMALL, *places, "run.name=disturbed", f"tracking.uri={tracker.uri}"])
        fault = BothDie(server, tracker, proxy, checkpoint=OUTAGE)
        trained = train.run(config)
        for comeback in fault.comebacks:
            comeback.join()
    assert fault.died.is_set(), "nobody wrote the checkpoint"
    assert fault.missed, "training asked for no pictures while the store was away"

    assert trained.outcome.images_seen == TOTAL
    assert trained.outcome.resumed_from == 0 and read_restarts(config.run_uri, config.storage) == []
    assert hashes(config, TOTAL) == hashes(fair, TOTAL)
    assert [line["images_seen"] for line in read_log(config.run_uri, config.storage)] == list(range(0, TOTAL + 1, TICK))
    assert list_checkpoints(config.run_uri, config.storage)[-1] == TOTAL
    assert OUTAGE not in list_checkpoints(config.run_uri, config.storage)

    assert trained.tracking_run is not None
    client = MlflowClient(tracker.uri)
    history = client.get_metric_history(trained.tracking_run, "loss/D")
    assert [point.step for point in history] == list(range(TICK, TOTAL + 1, TICK))
    assert client.get_run(trained.tracking_run).info.status == "FINISHED"
    times = [line["time"] for line in read_log(config.run_uri, config.storage)]
    longest = max(later - earlier for earlier, later in zip(times, times[1:], strict=False))
    with capsys.disabled():
        print(f"\nstore away for {STORE_AWAY_S:g} s: longest time between two ticks {longest:.1f} s")
    assert longest < STORE_AWAY_S + 60
