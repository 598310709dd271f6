"""Small real pictures for tests: squares cut from the Blue Marble where there is land."""

import functools
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.manifest import FOOTERS_NAME, Manifest, write_manifest
from pipeline.ingest.ingest import IngestConfig, IngestReport, ingest
from pipeline.ingest.shards import Sample, ShardWriter, merge_footers
from pipeline.storage import StorageConfig, join, write_bytes

BLUE_MARBLE = Path(__file__).parents[1] / "pipeline/presets/data/earth-blue-marble.jpg"


def land(number: int, width: int, height: int | None = None) -> Image.Image:
    """The number-th of many different RGB pictures of Africa and Asia."""
    left, top = 2000 + number * 37 % 1000, 500 + number * 53 % 500
    return earth().crop((left, top, left + width, top + (height or width)))


@functools.cache
def earth() -> Image.Image:
    """The whole Blue Marble, decoded once a session."""
    with Image.open(BLUE_MARBLE) as picture:
        return picture.convert("RGB")


def encoded(number: int, size: int = 16, kind: str = "PNG", **options: Any) -> bytes:
    """One picture as a file's bytes."""
    buffer = io.BytesIO()
    land(number, size).save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes | np.ndarray) -> np.ndarray:
    """Bytes of a file to RGB uint8 (H, W, 3), by Pillow."""
    with Image.open(io.BytesIO(bytes(data))) as picture:
        return np.asarray(picture.convert("RGB"))


def picture_files(count: int, size: int = 16) -> dict[str, bytes]:
    """Files in nested folders, of several formats."""
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
    suffixes = list(kinds)
    names = [(f"part-{number % 3}/{number:04d}.{suffixes[number % 3]}", number) for number in range(count)]
    return {name: encoded(number, size, kinds[name.rsplit(".", 1)[1]]) for name, number in names}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Files by their name relative to the folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    """The same as an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_data(folder: Path, count: int = 40, uri: str = "", **settings: Any) -> IngestReport:
    """A data set of 16x16 pictures, in several small row groups and shards, at `uri` or in the folder."""
    source = write_folder(folder / "source", picture_files(count))
    small = {"size": 16, "row_group_rows": 4, "shard_bytes": 10_000}
    config = IngestConfig.model_validate({"source": str(source)} | small | settings)
    return ingest(config, uri or str(folder / "data"), StorageConfig(), progress=False)


def write_data_set(uri: str, pictures: Sequence[bytes], size: int = 16, rows: int = 4) -> Manifest:
    """A data set of just these bytes with the right hashes, be they pictures or not, `rows` in a row group."""
    with ShardWriter(uri, StorageConfig(), size, 1 << 20, rows, 1 << 20) as writer:
        for number, data in enumerate(pictures):
            writer.add(Sample(f"pictures/{number}.png", data))
    summary, footers = merge_footers(writer.footers)
    manifest = Manifest(size, size, tuple(writer.shards), {}, "", footers)
    write_bytes(join(uri, FOOTERS_NAME), summary, StorageConfig())
    write_manifest(manifest, uri, StorageConfig())
    return manifest
