import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data import stream as stream_module
from pipeline.data.manifest import FOOTERS_NAME, DataError, Manifest, read_manifest, write_manifest
from pipeline.data.order import Order
from pipeline.data.stream import DataConfig, DataStream, augmentation, read_images
from pipeline.data.views import Views, fixed_views, training_views
from pipeline.ingest.shards import Sample, ShardWriter, merge_footers
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
    small = {"uri": uri, "decoder": "pillow", "flip": False, "read_ahead": 2, "threads": 2}
    return DataConfig.model_validate(small | changes)


def take(manifest: Manifest, data: DataConfig, count: int, **changes: Any) -> Tensor:
    """The first batches of a stream, stacked."""
    options: dict[str, Any] = {"seed": 5, "batch_size": BATCH, "positions": range(BATCH)} | changes
    with DataStream(manifest, data, STORAGE, **options) as stream:
        return torch.stack([next(stream) for _ in range(count)])


def order_of(manifest: Manifest, data: DataConfig, batch: int = BATCH) -> Order:
    rows = [group.rows for group in manifest.row_groups]
    return Order(rows, manifest.digest, 5, batch, data.shuffle_row_groups)


def test_batches_are_the_pictures_that_the_order_names(uri: str, manifest: Manifest) -> None:
    found = take(manifest, settings(uri), 8)  # more than two epochs
    assert found.dtype == torch.uint8 and found.shape == (8, BATCH, 16, 16, 3)
    stored = [pixels(data) for _, data in sorted(picture_files(40).items())]
    indices = order_of(manifest, settings(uri)).at(0, range(BATCH), 8)
    for batch, expected in zip(found.numpy(), indices, strict=True):
        assert np.array_equal(batch, np.stack([stored[index] for index in expected]))


@pytest.mark.parametrize("parts", [[6, 6], [4, 4, 4], [8, 4], [1, 11]])
def test_any_split_gives_the_same_pictures(uri: str, manifest: Manifest, parts: list[int]) -> None:
    whole = take(manifest, settings(uri, flip=True), 5)
    ends = np.cumsum(parts).tolist()
    shares = [range(end - part, end) for part, end in zip(parts, ends, strict=True)]
    pieces = [take(manifest, settings(uri, flip=True), 5, positions=share) for share in shares]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("batches", [1, 3, 7])
def test_resuming_is_going_on(uri: str, manifest: Manifest, batches: int) -> None:
    whole = take(manifest, settings(uri, flip=True), batches + 3)
    resumed = take(manifest, settings(uri, flip=True), 3, images_seen=batches * BATCH)
    assert torch.equal(resumed, whole[batches:])


def test_flips_are_drawn_by_place_and_images_seen(uri: str, manifest: Manifest) -> None:
    plain = take(manifest, settings(uri), 3)
    flipped = take(manifest, settings(uri, flip=True), 3, positions=range(4, 12))
    kind = augmentation(manifest, settings(uri, flip=True))
    for number in range(3):
        turned = training_views(kind, 5, number * BATCH, torch.arange(4, 12)).flips_B
        assert turned is not None and turned.any() and not turned.all()
        chosen = torch.from_numpy(turned)[:, None, None, None]
        assert torch.equal(flipped[number], torch.where(chosen, plain[number, 4:].flip(2), plain[number, 4:]))


def test_random_squares_and_turns_while_training_and_fixed_ones_to_measure(uri: str, manifest: Manifest) -> None:
    data = settings(uri, crop=True, rotate=True)
    found = take(manifest, data, 8, size=12)
    assert found.shape == (8, BATCH, 12, 12, 3)
    stored = [pixels(picture) for _, picture in sorted(picture_files(40).items())]
    kind = augmentation(manifest, data, 12)
    for number, indices in enumerate(order_of(manifest, data).at(0, range(BATCH), 8)):
        views = training_views(kind, 5, number * BATCH, torch.arange(BATCH))
        assert np.array_equal(found[number].numpy(), looked_at(stored, indices, views))
    real = torch.cat(list(read_images(manifest, data, STORAGE, [3, 39, 0], 2, 12)))
    indices = np.array([3, 39, 0])
    assert np.array_equal(real.numpy(), looked_at(stored, indices, fixed_views(kind, torch.from_numpy(indices))))


def looked_at(stored: list[np.ndarray], indices: np.ndarray, views: Views) -> np.ndarray:
    """Squares of 12 pixels by numpy alone."""
    assert views.corners_B2 is not None and views.turns_B is not None
    cut = zip(indices, views.corners_B2, views.turns_B, strict=True)
    return np.stack([np.rot90(stored[index][y : y + 12, x : x + 12], turn) for index, (x, y), turn in cut])


@pytest.mark.parametrize(
    "crop, size, words",
    [
        (False, 12, "model.size is 12.*pictures of 16x16.*ingest.size=12, or set data.crop=true"),
        (True, 20, "model.size is 20.*pictures of 16x16.*model.size=16, or ingest with ingest.size=20$"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(uri: str, manifest: Manifest, crop: bool, size: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        take(manifest, settings(uri, crop=crop), 1, size=size)


@pytest.mark.parametrize("decoder, package", [("dali", "nvidia.dali"), ("turbo", "simplejpeg")])
def test_all_decoders_give_the_same_stream(uri: str, manifest: Manifest, decoder: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    moves = {"flip": True, "crop": True, "rotate": True}
    pillow = take(manifest, settings(uri, **moves), 4, size=12).int()
    other = take(manifest, settings(uri, decoder=decoder, **moves), 4, size=12).int()
    assert (pillow - other).abs().float().mean(dim=(2, 3, 4)).max() <= 2


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


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_read_each_row_group_once_an_epoch(tmp_path: Path, workers: int) -> None:
    """The bound of 1 + W/R, counted at the reader, with a memory that is far smaller than the data."""
    make_data(tmp_path, 320)
    data = settings(str(tmp_path / "data"), shuffle_row_groups=1, read_ahead=1)
    manifest = read_manifest(data.uri, STORAGE)
    groups = len(manifest.row_groups)
    assert groups == 80
    requests = []
    for rank in range(workers):
        share = range(8 * rank // workers, 8 * (rank + 1) // workers)
        with DataStream(manifest, data, STORAGE, seed=2, batch_size=8, positions=share) as stream:
            for _ in range(5 * 320 // 8):
                next(stream)
            ahead = stream._capacity + len(share)  # what it has read already for the sixth epoch
            requests.append(stream._samples._reader.requests - ahead)
    assert 4 * groups < sum(requests) <= 5 * (groups + workers)


@pytest.mark.parametrize("count", [1, 3, 17])
def test_a_data_set_smaller_than_a_batch_starts_at_once(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data(tmp_path, count)
    data = settings(str(tmp_path / "data"))
    manifest = read_manifest(data.uri, STORAGE)
    planned: list[int] = []
    plan = DataStream._plan

    def counted(stream: DataStream, images_seen: int) -> Any:
        planned.append(images_seen)
        return plan(stream, images_seen)

    monkeypatch.setattr(DataStream, "_plan", counted)
    with DataStream(manifest, data, STORAGE, seed=1, batch_size=64, positions=range(64)) as stream:
        for _ in range(20):
            assert next(stream).shape == (64, 16, 16, 3)
    assert len(planned) <= 4, "more was planned than the batches that were asked for and those ahead"


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
    summary, footers = merge_footers(writer.footers)
    (folder / FOOTERS_NAME).write_bytes(summary)
    write_manifest(Manifest(16, 16, tuple(writer.shards), {}, "", footers), str(folder), STORAGE)
    return settings(str(folder), decoder=decoder)


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_a_corrupt_picture_is_named(tmp_path: Path, decoder: str) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    data = with_bad_picture(tmp_path, decoder)
    words = r"shard-00000-00.parquet, row group 1, row 2 \('pictures/6.png'\) cannot be decoded"
    with pytest.raises(DataError, match=words):
        take(read_manifest(data.uri, STORAGE), data, 1)
    with pytest.raises(DataError, match=words):
        list(read_images(read_manifest(data.uri, STORAGE), data, STORAGE, range(12), 5))


def test_a_truncated_shard_is_named_by_next(tmp_path: Path) -> None:
    make_data(tmp_path, 40)
    data = settings(str(tmp_path / "data"))
    manifest = read_manifest(data.uri, STORAGE)
    path = tmp_path / "data" / manifest.shards[1].file
    path.write_bytes(path.read_bytes()[: manifest.shards[1].row_groups[-1].offset + 9])
    with DataStream(manifest, data, STORAGE, seed=1, batch_size=40, positions=range(40)) as stream:
        with pytest.raises(DataError, match=f"{path.name}, row group .: truncated"):
            next(stream)
        with pytest.raises(ValueError, match="closed"):
            next(stream)


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_skipping_takes_the_next_picture_whoever_reads_it(tmp_path: Path, decoder: str) -> None:
    data = with_bad_picture(tmp_path, decoder).model_copy(update={"on_corrupt": "skip"})
    manifest = read_manifest(data.uri, STORAGE)
    indices = order_of(manifest, data).at(0, range(BATCH), 4)
    stored = [pixels(encoded(number)) for number in range(12)]
    expected = np.stack([stored[7 if index == 6 else index] for index in indices.ravel()]).reshape(4, BATCH, 16, 16, 3)
    with DataStream(manifest, data, STORAGE, seed=5, batch_size=BATCH, positions=range(BATCH)) as stream:
        found = np.stack([next(stream).numpy() for _ in range(4)])
        assert stream.replaced == (indices == 6).sum() == 4
    assert np.array_equal(found, expected)
    for resumed in range(4):  # by a worker that begins anywhere and has some of the places
        part = take(manifest, data, 1, images_seen=resumed * BATCH, positions=range(3, 8))
        assert np.array_equal(part[0].numpy(), expected[resumed, 3:8])
    whole = torch.cat(list(read_images(manifest, data, STORAGE, range(12), 5))).numpy()
    assert np.array_equal(whole, np.stack([stored[7 if index == 6 else index] for index in range(12)]))


def test_skipping_a_row_group_takes_the_same_row_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path, 40)
    data = settings(str(tmp_path / "data"), on_corrupt="skip")
    manifest = read_manifest(data.uri, STORAGE)
    damaged = [group for group, one in enumerate(manifest.row_groups) if one.file == manifest.shards[-1].file]
    Path(data.uri, manifest.shards[-1].file).unlink()  # with all row groups of this shard, the last one among them
    starts = np.cumsum([0, *(group.rows for group in manifest.row_groups)])
    stand_in = {starts[group] + row: row % manifest.row_groups[0].rows for group in damaged for row in range(4)}
    stored = [pixels(picture) for _, picture in sorted(picture_files(40).items())]
    indices = order_of(manifest, data).at(0, range(BATCH), 4).ravel()
    found = take(manifest, data, 4).flatten(0, 1).numpy()
    assert set(indices.tolist()) & set(stand_in)
    assert np.array_equal(found, np.stack([stored[stand_in.get(index, index)] for index in indices]))
    said = capsys.readouterr().out
    assert said.count("skipped from now on") == len(damaged) and f"{manifest.shards[-1].file}" in said


def test_nothing_but_damage_is_an_error(tmp_path: Path) -> None:
    make_data(tmp_path, 8)
    data = settings(str(tmp_path / "data"), on_corrupt="skip")
    manifest = read_manifest(data.uri, STORAGE)
    for shard in manifest.shards:
        Path(data.uri, shard.file).unlink()
    with pytest.raises(
        DataError, match=f"{data.uri}: no sample of the data set can be read, the first because.*missing"
    ):
        take(manifest, data, 1)


def test_what_goes_wrong_in_the_thread_is_raised_by_next(
    uri: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> Views:
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(stream_module, "training_views", wrong)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        take(manifest, settings(uri), 1)


def test_close_is_prompt_whatever_the_thread_does(
    uri: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, entered = threading.Event(), threading.Event()

    def stuck(*draw: Any) -> Views:
        entered.set()
        released.wait(timeout=30)
        return training_views(*draw)

    full = DataStream(manifest, settings(uri), STORAGE, seed=1, batch_size=BATCH, positions=range(BATCH))
    while not full._batches.full():
        time.sleep(0.001)
    began = time.monotonic()
    full.close()
    full.close()
    assert time.monotonic() - began < 4 and not full._thread.is_alive()
    with pytest.raises(ValueError, match="closed"):
        next(full)
    monkeypatch.setattr(stream_module, "training_views", stuck)
    busy = DataStream(manifest, settings(uri), STORAGE, seed=1, batch_size=BATCH, positions=range(BATCH))
    assert entered.wait(timeout=30)
    threading.Timer(0.2, released.set).start()
    began = time.monotonic()
    busy.close()
    assert time.monotonic() - began < 4 and not busy._thread.is_alive()


def test_a_process_ends_well_with_a_stream_that_nobody_closed(uri: str) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    program = f"""
from pipeline.data.manifest import read_manifest
from pipeline.data.stream import DataConfig, DataStream
from pipeline.storage import StorageConfig
manifest = read_manifest({uri!r}, StorageConfig())
stream = DataStream(manifest, DataConfig(uri={uri!r}), StorageConfig(), seed=0, batch_size=8, positions=range(8))
print(next(stream).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "torch.Size([8, 16, 16, 3])\n"), done.stderr


def test_waiting_is_measured(uri: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow(*draw: Any) -> Views:
        release.wait(timeout=30)
        return training_views(*draw)

    monkeypatch.setattr(stream_module, "training_views", slow)
    with DataStream(manifest, settings(uri), STORAGE, seed=1, batch_size=BATCH, positions=range(BATCH)) as stream:
        assert stream.wait_seconds == 0
        threading.Timer(1.0, release.set).start()
        began = time.perf_counter()
        next(stream)
        elapsed = time.perf_counter() - began
        assert 0.2 < stream.wait_seconds <= elapsed
        while not stream._batches.full():
            time.sleep(0.001)
        before = stream.wait_seconds
        next(stream)
        assert stream.wait_seconds - before < 0.5


def test_a_cache_needs_a_place_that_all_workers_find() -> None:
    with pytest.raises(ValueError, match="data.cache_dir is 'cache': expected an absolute path"):
        DataConfig(cache_dir="cache")


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
    expected = take(local, settings(str(tmp_path / "data")), 8)
    assert torch.equal(take(far, settings(remote), 8), expected)
    delete(f"{remote}/{far.shards[1].file}", STORAGE)
    with pytest.raises(DataError, match=f"{far.shards[1].file}, row group .: missing"):
        take(far, settings(remote), 4)
