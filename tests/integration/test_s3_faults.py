"""Epochs through the whole stream from a real S3 server that misbehaves: each sample once, in order, every time."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.stream import DataConfig, DataStream
from pipeline.storage import StorageConfig, StorageError
from tests.pictures import make_data
from tests.proxy import Fault, FaultProxy, Request, fault_proxy, is_shard
from tests.servers import S3Server, s3_server

pytestmark = pytest.mark.integration

SAMPLES, BATCH = 48, 8
BATCHES = 2 * SAMPLES // BATCH
"""Two epochs."""
ROW_GROUPS = SAMPLES // 4
"""No stream reads less often; how much more depends on what the order lets it keep in memory for the second epoch."""


@pytest.fixture(scope="module")
def uri(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"s3://{s3.new_bucket()}/data"
    make_data(tmp_path_factory.mktemp("faults"), SAMPLES, uri=uri)
    return uri


@pytest.fixture(scope="module")
def manifest(uri: str) -> Manifest:
    manifest = read_manifest(uri, StorageConfig())
    assert len(manifest.row_groups) == ROW_GROUPS
    return manifest


@pytest.fixture(scope="module")
def undisturbed(uri: str, manifest: Manifest) -> Tensor:
    """What every stream must give: (batches, BATCH, 16, 16, 3); every sample once in each epoch."""
    with open_stream(uri, manifest, StorageConfig()) as stream:
        found = torch.stack([next(stream) for _ in range(BATCHES)])
    for epoch in found.flatten(0, 1).split(SAMPLES):
        assert len({picture.numpy().tobytes() for picture in epoch}) == SAMPLES
    return found


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint) as proxy:
        yield proxy


def open_stream(uri: str, manifest: Manifest, storage: StorageConfig) -> DataStream:
    """Small enough in memory that the second epoch reads the store again."""
    data = DataConfig(uri=uri, decoder="pillow", shuffle_row_groups=1, read_ahead=1, threads=3)
    return DataStream(manifest, data, storage, seed=5, batch_size=BATCH, positions=range(BATCH))


def short_tempered(proxy: FaultProxy, total_timeout_s: float = 300) -> StorageConfig:
    return StorageConfig(endpoint=proxy.endpoint, request_timeout_s=0.4, total_timeout_s=total_timeout_s)


KINDS = {
    "slow down": [Fault("status")] * 6,
    "internal errors": [Fault("status", status=500, code="InternalError")] * 6,
    "slow answers": [Fault("delay", seconds=0.05)] * ROW_GROUPS,
    "stalls before an answer": [Fault("stall", share=0)] * 3,
    "stalls in the middle": [Fault("stall")] * 3,
    "resets before an answer": [Fault("reset", share=0)] * 6,
    "resets in the middle": [Fault("reset")] * 6,
    "bodies that end early": [Fault("truncate")] * 6,
    "bodies of a wrong length": [Fault("short"), Fault("unmeasured")] * 3,
    "all at once": [Fault(kind) for kind in ("status", "stall", "reset", "truncate", "short", "garbage", "unmeasured")],
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_under_faults(uri: str, manifest: Manifest, undisturbed: Tensor, proxy: FaultProxy, kind: str) -> None:
    proxy.plan(KINDS[kind], is_shard)
    with open_stream(uri, manifest, short_tempered(proxy)) as stream:
        found = torch.stack([next(stream) for _ in range(BATCHES)])
    assert proxy.pending == 0, "not all faults happened"
    assert torch.equal(found, undisturbed)


def test_bits_that_flip_on_the_way(uri: str, manifest: Manifest, undisturbed: Tensor, proxy: FaultProxy) -> None:
    """Once for each row group: what is wrong twice in a row counts as damage in the store."""
    spoiled: set[str] = set()

    def first_of_its_row_group(request: Request) -> bool:
        new = is_shard(request) and request.path + request.range not in spoiled
        spoiled.add(request.path + request.range)
        return new

    proxy.plan([Fault("flip")] * len(manifest.row_groups), first_of_its_row_group)
    with open_stream(uri, manifest, short_tempered(proxy)) as stream:
        found = torch.stack([next(stream) for _ in range(BATCHES)])
    assert proxy.pending == 0
    assert torch.equal(found, undisturbed)


def test_a_quiet_epoch_is_one_get_for_each_row_group_and_no_list(
    uri: str, manifest: Manifest, undisturbed: Tensor, proxy: FaultProxy
) -> None:
    data = DataConfig(uri=uri, decoder="pillow", shuffle_row_groups=1, read_ahead=1000, threads=3)
    storage = StorageConfig(endpoint=proxy.endpoint)  # patient: on a busy machine no answer is asked for twice
    with DataStream(manifest, data, storage, seed=5, batch_size=BATCH, positions=range(BATCH)) as stream:
        found = torch.stack([next(stream) for _ in range(BATCHES)])
    assert torch.equal(found, undisturbed)
    shards = [request for request in proxy.requests if ".parquet" in request.path]
    assert {request.method for request in shards} == {"GET"}
    assert len({(request.path, request.range) for request in shards}) == len(shards) == len(manifest.row_groups)
    others = [(request.method, request.path) for request in proxy.requests if request not in shards]
    assert others == [("GET", f"/{uri.removeprefix('s3://')}/_metadata")]


def test_a_store_that_stays_away_ends_the_stream_with_its_name(uri: str, manifest: Manifest, proxy: FaultProxy) -> None:
    proxy.plan([Fault("status", status=500, code="InternalError")] * 1000, is_shard)
    # Its last attempt may be the one that the end of all patience cuts.
    words = r"bucket 'test-.*key 'data/shard-.*attempts.*(500 InternalError|TimeoutError)"
    with open_stream(uri, manifest, short_tempered(proxy, total_timeout_s=3)) as stream:
        with pytest.raises(StorageError, match=words):
            next(stream)
    assert proxy.pending < 1000


def test_the_server_dies_and_comes_back_during_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Tensor
) -> None:
    with s3_server() as server, fault_proxy(server.endpoint) as proxy:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        uri = f"s3://{server.bucket}/data"
        make_data(tmp_path, SAMPLES, uri=uri)
        manifest = read_manifest(uri, StorageConfig())
        with open_stream(uri, manifest, short_tempered(proxy)) as stream:
            batches = [next(stream)]
            server.stop()
            rest: list[Tensor] = []
            consumer = threading.Thread(target=lambda: rest.extend(next(stream) for _ in range(BATCHES - 1)))
            consumer.start()
            assert proxy.unreachable.wait(timeout=60), "the stream went on without the server"
            server.start()
            consumer.join(timeout=240)
            assert not consumer.is_alive()
        assert torch.equal(torch.stack(batches + rest), undisturbed)
