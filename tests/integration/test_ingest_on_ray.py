"""The parts of an ingest as tasks of a Ray cluster: the same bytes as on one machine, also where a node is lost."""

import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.cluster.ingest import ray_runner
from pipeline.config import ClusterConfig, load_config
from pipeline.data.manifest import DataError
from pipeline.ingest.ingest import IngestConfig, IngestReport, TileConfig, ingest
from pipeline.ingest.making import Job
from pipeline.ingest.parts import Part
from pipeline.ingest.records import PartRecord
from pipeline.ingest.verify import verify
from pipeline.storage import StorageConfig, write_bytes
from tests.pictures import BLUE_MARBLE, picture_files, write_folder
from tests.ray_nodes import ray_cluster
from tests.servers import S3Server

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow]

STORAGE = StorageConfig()


def test_the_same_bytes_as_on_one_machine(
    s3: S3Server, ray_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From S3 to S3 on two nodes, by the job itself; then what goes wrong in a task is said as it is elsewhere."""
    from jobs import ingest as job

    files, bucket = picture_files(60), s3.new_bucket()
    for name, data in files.items():
        write_bytes(f"s3://{bucket}/in/{name}", data, STORAGE)
    settings = ["ingest.tile=", "model.size=16", "ingest.part_pictures=7", f"ingest.source=s3://{bucket}/in"]
    on_ray = [*settings, f"cluster.address={ray_address}"]
    report = job.run(load_config("demo", [*on_ray, f"data.uri=s3://{bucket}/out"]))
    assert f"ingest as tasks of the Ray cluster at {ray_address}" in capsys.readouterr().out
    write_bytes(f"s3://{bucket}/in/z.png", b"no picture", STORAGE)
    with pytest.raises(DataError, match="z.png cannot be decoded.*strict"):
        job.run(load_config("demo", [*on_ray, f"data.uri=s3://{bucket}/strict", "ingest.strict=true"]))
    assert (report.samples, report.parts) == (60, 9)
    config = IngestConfig(source=str(write_folder(tmp_path / "in", files)), size=16, part_pictures=7, workers=1)
    assert ingest(config, str(tmp_path / "out"), STORAGE, progress=False).digest == report.digest
    assert verify(f"s3://{bucket}/out", STORAGE, progress=False).problems == ()


def test_a_node_that_is_lost_costs_time_only(tmp_path: Path) -> None:
    config = IngestConfig(
        source=str(BLUE_MARBLE), size=32, tile=TileConfig(size=32, stride=64), part_pictures=100, workers=1
    )
    expected = ingest(config, str(tmp_path / "expected"), STORAGE, progress=False)
    with ray_cluster(1, cpus=1) as cluster:
        report = ingest_losing(cluster, cluster.add_node(num_cpus=1), config, tmp_path / "out")
    assert (report.digest, report.parts) == (expected.digest, 15)
    assert verify(str(tmp_path / "out"), STORAGE, progress=False).problems == ()


def noted(parts: Iterable[Part], drawn: list[Part]) -> Generator[Part]:
    for part in parts:
        drawn.append(part)
        yield part


def ingest_losing(cluster: Cluster, node: Any, config: IngestConfig, out: Path) -> IngestReport:
    """Kills a node while its tasks run: after the first part is done, with as many under way as there may be."""
    runner = ray_runner(ClusterConfig(address=cluster.address))

    def run(job: Job, parts: Iterable[Part], tick: Callable[[int], object]) -> Generator[PartRecord]:
        drawn: list[Part] = []
        for count, record in enumerate(runner(job, noted(parts, drawn), tick)):
            assert len(drawn) <= count + 4, "two tasks for each of two cores, however many parts there are"
            if count == 0:
                cluster.remove_node(node, allow_graceful=False)
                wait_for_nodes(2)
            yield record

    return ingest(config, str(out), STORAGE, progress=False, run_parts=run)


def wait_for_nodes(count: int) -> None:
    """Until the cluster knows that only so many are alive."""
    deadline = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) != count:
        assert time.monotonic() < deadline, ray.nodes()
        time.sleep(0.05)
