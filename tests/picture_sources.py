"""The same pictures in every kind of source, written with the tools that people write them with."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lmdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.listing import Kind
from tests.pictures import write_folder, write_zip

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_tar(path: Path, files: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """Members in the order of `files`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_webdataset(folder: Path, files: Mapping[str, bytes], per_tar: int = 2) -> Path:
    """Several tars in nested folders; each picture has a caption and a label beside it."""
    items = list(files.items())
    for start in range(0, len(items), per_tar):
        members: dict[str, bytes] = {}
        for name, data in items[start : start + per_tar]:
            stem = name.rsplit(".", 1)[0]
            members |= {name: data, f"{stem}.txt": b"a caption", f"{stem}.cls": b"1"}
        write_tar(folder / f"{start // 4}/part-{start // per_tar:03d}.tar", members)
    return folder


def write_lmdb(folder: Path, values: Mapping[str, bytes] | Mapping[str | bytes, bytes]) -> Path:
    """Values by key, as LSUN's own export wrote them."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(folder), map_size=64 << 20)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode() if isinstance(key, str) else key, value)
    environment.close()
    return folder


def image_rows(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Cells of Hugging Face's image column."""
    return [{"bytes": data, "path": name} for name, data in files.items()]


def write_parquet(
    path: Path, rows: Iterable[Any], kind: pa.DataType = IMAGE, column: str = "image", **options: Any
) -> Path:
    """One file, with a label beside each picture, by default in row groups of two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array(list(rows), kind)
    table = pa.table({"label": pa.array(range(len(images)), pa.int64()), column: images})
    pq.write_table(table, path, **({"row_group_size": 2} | options))
    return path


def write_parquet_folder(folder: Path, files: Mapping[str, bytes], per_file: int = 3) -> Path:
    """Several files of several row groups."""
    rows = image_rows(files)
    for start in range(0, len(rows), per_file):
        write_parquet(folder / f"data/train-{start // per_file:05d}.parquet", rows[start : start + per_file])
    return folder


def write_sources(folder: Path, files: dict[str, bytes]) -> dict[Kind, Path]:
    """All kinds of collections of the same pictures in the same order. `files` are sorted by name."""
    return {
        "folder": write_folder(folder / "folder", files),
        "zip": write_zip(folder / "pictures.zip", files),
        "tar": write_tar(folder / "pictures.tar", files),
        "webdataset": write_webdataset(folder / "webdataset", files),
        "lmdb": write_lmdb(folder / "lmdb", {**files, "length": b"5"}),
        "parquet": write_parquet_folder(folder / "parquet", files),
    }
