"""Each data set of the paper, ingested by its preset from a few real pictures of its shape."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import load_config
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.ingest.ingest import ingest
from tests.pictures import land, pixels, write_folder


def file(number: int, width: int, height: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    land(number, width, height).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def ingested(folder: Path, preset: str, source: Path) -> tuple[Manifest, list[bytes]]:
    """As `jobs.ingest --config PRESET ingest.source=SOURCE data.uri=FOLDER` does it."""
    config = load_config(preset, [f"ingest.source={source}", f"data.uri={folder / 'out'}"])
    report = ingest(config.ingest, config.data.uri, config.storage, progress=False)
    assert report.skipped == ()
    manifest = read_manifest(config.data.uri, config.storage)
    tables = [pq.read_table(folder / "out" / shard.file) for shard in manifest.shards]
    return manifest, [image["bytes"] for table in tables for image in table.column("image").to_pylist()]


def resized(picture: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


def test_ffhq_is_the_mean_of_blocks_of_the_large_pictures(tmp_path: Path) -> None:
    files = {f"{number:05d}.png": file(number, 1024, 1024) for number in range(2)}
    manifest, stored = ingested(tmp_path, "ffhq256", write_folder(tmp_path / "in", files))
    assert (manifest.height, manifest.width, manifest.samples) == (256, 256, 2)
    for data, original in zip(stored, files.values(), strict=True):
        blocks = pixels(original).reshape(256, 4, 256, 4, 3)
        rows = np.floor(blocks.mean(axis=3) + 0.5)  # Pillow rounds after each of its two passes, across first
        assert np.array_equal(pixels(data), np.floor(rows.mean(axis=1) + 0.5))
        assert np.abs(pixels(data) - blocks.mean(axis=(1, 3))).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_churches_keep_the_pixels_in_the_middle(tmp_path: Path, kind: str) -> None:
    """From LSUN's LMDB itself: the shorter side has 256 pixels already."""
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed: pip install 'cips-pipeline[lmdb]'")
    files = {
        f"{number:040x}": file(number, *shape, kind)
        for number, shape in enumerate([(341, 256), (256, 384), (256, 256)])
    }
    with lmdb.open(str(tmp_path / "in"), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for name, data in files.items():
            transaction.put(name.encode(), data)
    manifest, stored = ingested(tmp_path, "churches256", tmp_path / "in")
    assert (manifest.height, manifest.width, manifest.samples) == (256, 256, 3)
    wide, high, square = (pixels(data) for data in files.values())
    expected = [wide[:, 42:298], high[64:320], square]
    assert all(np.array_equal(pixels(data), cut) for data, cut in zip(stored, expected, strict=True))
    assert stored[2] == list(files.values())[2], "what fits is kept as it is, byte for byte"


def test_landscapes_lose_their_margins_and_not_their_proportions(tmp_path: Path) -> None:
    files = {"a.png": file(1, 900, 600), "b.png": file(2, 512, 700), "c.jpg": file(3, 257, 257, "JPEG")}
    manifest, stored = ingested(tmp_path, "landscapes256", write_folder(tmp_path / "in", files))
    assert (manifest.height, manifest.width, manifest.samples) == (256, 256, 3)
    wide, high, square = (pixels(data) for data in files.values())
    expected = [resized(wide[:, 150:750], 256), resized(high[94:606], 256), resized(square, 256)]
    assert all(np.array_equal(pixels(data), cut) for data, cut in zip(stored, expected, strict=True))


@pytest.mark.parametrize(("preset", "size"), [("satellite-buildings256", 300), ("satellite-landscapes256", 512)])
def test_satellite_pictures_are_stored_whole(tmp_path: Path, preset: str, size: int) -> None:
    """What is trained on is cut from them anew each time."""
    files = {f"{number}.jpg": file(number, size, size, "JPEG") for number in range(3)}
    manifest, stored = ingested(tmp_path, preset, write_folder(tmp_path / "in", files))
    assert (manifest.height, manifest.width) == (size, size)
    assert stored == list(files.values())
    assert load_config(preset).model.size == 256


def test_cifar10_is_taken_as_it_is(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "shared/data/cifar10/train.zip"
    if not source.exists():
        pytest.skip(f"CIFAR-10 is not at {source}")
    config = load_config("cifar10", [f"ingest.source={source}", "ingest.limit=2000", f"data.uri={tmp_path}"])
    report = ingest(config.ingest, config.data.uri, config.storage, progress=False)
    assert (report.samples, report.skipped, report.ignored) == (2000, (), ())
    table = pq.read_table(next(tmp_path.glob("shard-*-00000-00.parquet")), columns=["image"])
    encoded = table.column("image")[1999].as_py()["bytes"]
    assert encoded[:2] == b"\xff\xd8" and pixels(encoded).shape == (32, 32, 3)
