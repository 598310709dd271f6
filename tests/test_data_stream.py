import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.manifest import DataError, Manifest, read_manifest, write_manifest
from pipeline.data.order import batch_indices
from pipeline.data.shards import Sample, ShardWriter
from pipeline.data.stream import DataConfig, DataStream, read_images
from pipeline.randomness import flips
from pipeline.storage import StorageConfig, delete
from tests.pictures import encoded, make_data, picture_files, pixels
from tests.servers import S3Server

STORAGE = StorageConfig()
BATCH = 12


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 pictures in 10 row groups."""
    folder = tmp_path_factory.mktemp("stream")
    make_data(folder, 40)
    return str(folder / "data")


@pytest.fixture(scope="module")
def manifest(uri: str) -> Manifest:
    return read_manifest(uri, STORAGE)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Every test must end all threads of its streams."""
    yield
    deadline = time.monotonic() + 10
    for thread in threading.enumerate():
        if thread.name.startswith(("decode", "read")):
            thread.join(timeout=max(0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"{thread.name} runs on"


def settings(uri: str, **changes: Any) -> DataConfig:
    small = {"uri": uri, "decoder": "pillow", "shuffle_row_groups": 3, "read_ahead": 2, "threads": 2}
    return DataConfig.model_validate(small | changes)


def take(manifest: Manifest, data: DataConfig, count: int, **changes: Any) -> Tensor:
    """The first batches of a stream, stacked."""
    options: dict[str, Any] = {"seed": 5, "batch_size": BATCH, "positions": range(BATCH)} | changes
    with DataStream(manifest, data, STORAGE, **options) as stream:
        return torch.stack([next(stream) for _ in range(count)])


def mirror(seen: int, positions: Tensor) -> Tensor:
    return flips(9, seen, positions)


def test_batches_are_the_pictures_that_the_order_names(uri: str, manifest: Manifest) -> None:
    found = take(manifest, settings(uri), 8)  # more than two epochs
    assert found.dtype == torch.uint8 and found.shape == (8, BATCH, 16, 16, 3)
    stored = [pixels(data) for _, data in sorted(picture_files(40).items())]
    rows = [group.rows for group in manifest.row_groups]
    for number, batch in enumerate(found.numpy()):
        indices = batch_indices(rows, manifest.digest, 5, BATCH, number * BATCH, window=3)
        assert np.array_equal(batch, np.stack([stored[index] for index in indices]))


@pytest.mark.parametrize("parts", [[6, 6], [4, 4, 4], [8, 4], [1, 11]])
def test_any_split_gives_the_same_pictures(uri: str, manifest: Manifest, parts: list[int]) -> None:
    whole = take(manifest, settings(uri), 5, flips=mirror)
    ends = np.cumsum(parts).tolist()
    shares = [range(end - part, end) for part, end in zip(parts, ends, strict=True)]
    pieces = [take(manifest, settings(uri), 5, positions=share, flips=mirror) for share in shares]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("batches", [1, 3, 7])
def test_resuming_is_going_on(uri: str, manifest: Manifest, batches: int) -> None:
    whole = take(manifest, settings(uri), batches + 3, flips=mirror)
    resumed = take(manifest, settings(uri), 3, images_seen=batches * BATCH, flips=mirror)
    assert torch.equal(resumed, whole[batches:])


def test_another_batch_size_goes_through_the_same_pictures(uri: str, manifest: Manifest) -> None:
    twelve = take(manifest, settings(uri), 4).flatten(0, 1)
    sixteen = take(manifest, settings(uri), 3, batch_size=16, positions=range(16)).flatten(0, 1)
    assert torch.equal(twelve, sixteen)


def test_flips_are_the_callers_and_can_be_turned_off(uri: str, manifest: Manifest) -> None:
    plain = take(manifest, settings(uri), 3)
    assert torch.equal(take(manifest, settings(uri, flip=False), 3, flips=mirror), plain)
    flipped = take(manifest, settings(uri), 3, flips=mirror, positions=range(4, 12))
    for number in range(3):
        turned = mirror(number * BATCH, torch.arange(4, 12))
        assert turned.any() and not turned.all()
        expected = torch.where(turned[:, None, None, None], plain[number, 4:].flip(2), plain[number, 4:])
        assert torch.equal(flipped[number], expected)


def test_both_decoders_give_the_same_stream(uri: str, manifest: Manifest) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    pillow = take(manifest, settings(uri), 4, flips=mirror).int()
    dali = take(manifest, settings(uri, decoder="dali"), 4, flips=mirror).int()
    assert (pillow - dali).abs().float().mean(dim=(2, 3, 4)).max() <= 2


def test_memory_settings_do_not_change_the_pictures(uri: str, manifest: Manifest) -> None:
    usual = take(manifest, settings(uri), 8)
    for changes in ({"read_ahead": 0}, {"read_ahead": 50, "threads": 5}):
        assert torch.equal(take(manifest, settings(uri, **changes), 8), usual)


def test_a_batch_larger_than_the_data_set(tmp_path: Path) -> None:
    make_data(tmp_path, 5)
    data = settings(str(tmp_path / "data"))
    small = read_manifest(data.uri, STORAGE)
    batches = take(small, data, 2)
    assert len({picture.numpy().tobytes() for picture in batches.flatten(0, 1)[:5]}) == 5
    assert len({picture.numpy().tobytes() for picture in batches.flatten(0, 1)}) == 5


def test_read_images_by_index(uri: str, manifest: Manifest) -> None:
    stored = [pixels(data) for _, data in sorted(picture_files(40).items())]
    wanted = [3, 39, 0, 3, 17, 21, 22]
    batches = list(read_images(manifest, settings(uri), STORAGE, wanted, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert np.array_equal(torch.cat(batches).numpy(), np.stack([stored[index] for index in wanted]))
    everything = torch.cat(list(read_images(manifest, settings(uri), STORAGE, range(40), 7)))
    assert np.array_equal(everything.numpy(), np.stack(stored))
    assert list(read_images(manifest, settings(uri), STORAGE, [], 3)) == []
    for beyond in ([40], [-1]):
        with pytest.raises(ValueError, match="beyond the 40 samples"):
            list(read_images(manifest, settings(uri), STORAGE, beyond, 3))


def with_bad_picture(folder: Path, decoder: str) -> DataConfig:
    """A data set whose hashes are right and whose 7th picture is not."""
    with ShardWriter(str(folder), STORAGE, 16, 1 << 20, 4, 1 << 20) as writer:
        for number in range(12):
            bad = number == 6
            writer.add(Sample(f"pictures/{number}.png", b"not a picture" if bad else encoded(number)))
    write_manifest(Manifest(16, 16, tuple(writer.shards), {}, ""), str(folder), STORAGE)
    return settings(str(folder), decoder=decoder)


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_a_corrupt_picture_is_named(tmp_path: Path, decoder: str) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    data = with_bad_picture(tmp_path, decoder)
    words = r"shard-00000.parquet, row group 1, row 2 \('pictures/6.png'\) cannot be decoded"
    with pytest.raises(DataError, match=words):
        take(read_manifest(data.uri, STORAGE), data, 1)
    with pytest.raises(DataError, match=words):
        list(read_images(read_manifest(data.uri, STORAGE), data, STORAGE, range(12), 5))


def test_a_truncated_shard_is_named_by_next(tmp_path: Path) -> None:
    make_data(tmp_path, 40)
    data = settings(str(tmp_path / "data"))
    manifest = read_manifest(data.uri, STORAGE)
    path = tmp_path / "data" / manifest.shards[1].file
    path.write_bytes(path.read_bytes()[:-100])
    with DataStream(manifest, data, STORAGE, seed=1, batch_size=40, positions=range(40)) as stream:
        with pytest.raises(DataError, match=f"{path.name}: truncated"):
            next(stream)
        with pytest.raises(ValueError, match="closed"):
            next(stream)


def test_what_goes_wrong_in_flips_is_raised_by_next(uri: str, manifest: Manifest) -> None:
    def wrong(seen: int, positions: Tensor) -> Tensor:
        raise ZeroDivisionError("in the thread")

    with pytest.raises(ZeroDivisionError, match="in the thread"):
        take(manifest, settings(uri), 1, flips=wrong)


def test_close_is_prompt_whatever_the_thread_does(uri: str, manifest: Manifest) -> None:
    released, entered = threading.Event(), threading.Event()

    def stuck(seen: int, positions: Tensor) -> Tensor:
        if seen == 2 * BATCH:
            entered.set()
            released.wait(timeout=30)
        return mirror(seen, positions)

    full = DataStream(manifest, settings(uri), STORAGE, seed=1, batch_size=BATCH, positions=range(BATCH))
    while not full._batches.full():
        time.sleep(0.001)
    began = time.monotonic()
    full.close()
    full.close()
    assert time.monotonic() - began < 4 and not full._thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(full)
    busy = DataStream(manifest, settings(uri), STORAGE, seed=1, batch_size=BATCH, positions=range(BATCH), flips=stuck)
    assert entered.wait(timeout=30)
    threading.Timer(0.2, released.set).start()
    began = time.monotonic()
    busy.close()
    assert time.monotonic() - began < 4 and not busy._thread.is_alive()


def test_waiting_is_measured(uri: str, manifest: Manifest) -> None:
    release = threading.Event()

    def slow(seen: int, positions: Tensor) -> Tensor:
        release.wait(timeout=30)
        return mirror(seen, positions)

    with DataStream(
        manifest, settings(uri), STORAGE, seed=1, batch_size=BATCH, positions=range(BATCH), flips=slow
    ) as stream:
        assert stream.wait_seconds == 0
        threading.Timer(0.3, release.set).start()
        began = time.perf_counter()
        next(stream)
        elapsed = time.perf_counter() - began
        assert 0.2 < stream.wait_seconds <= elapsed
        while not stream._batches.full():
            time.sleep(0.001)
        before = stream.wait_seconds
        next(stream)
        assert stream.wait_seconds - before < 0.2


@pytest.mark.parametrize("positions", [range(0), range(5, 13), range(-1, 3)])
def test_positions_outside_of_the_batch_are_refused(uri: str, manifest: Manifest, positions: range) -> None:
    with pytest.raises(ValueError, match="not a part of a global batch of 12"):
        DataStream(manifest, settings(uri), STORAGE, seed=1, batch_size=BATCH, positions=positions)


@pytest.mark.integration
def test_streaming_from_s3_is_like_streaming_from_disk(s3: S3Server, tmp_path: Path) -> None:
    remote = f"s3://{s3.new_bucket()}/data"
    make_data(tmp_path, 40)
    make_data(tmp_path, 40, uri=remote)
    local, far = (read_manifest(uri, STORAGE) for uri in (str(tmp_path / "data"), remote))
    assert local.digest == far.digest
    expected = take(local, settings(str(tmp_path / "data")), 8, flips=mirror)
    assert torch.equal(take(far, settings(remote), 8, flips=mirror), expected)
    delete(f"{remote}/{far.shards[1].file}", STORAGE)
    with pytest.raises(DataError, match=f"{far.shards[1].file}: missing"):
        take(far, settings(remote), 4)
