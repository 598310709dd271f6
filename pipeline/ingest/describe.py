"""A data set at a glance: a table of what it is, and a contact sheet of pictures spread evenly over it."""

import io
import json
from collections import Counter
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline import pictures
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.picture import READABLE, PictureError, open_rgb
from pipeline.data.reader import Reader
from pipeline.storage import StorageConfig

COLUMNS, ROWS = 10, 8
CELL = 128  # pixels; larger pictures are shrunk to it, smaller ones drawn with larger pixels
READ_AHEAD = 4


@dataclass(frozen=True)
class Description:
    """What `describe` found."""

    digest: str
    table: tuple[tuple[str, str], ...]
    """Names and values, to be printed one below the other."""
    sheet: bytes
    """PNG: COLUMNS x ROWS pictures in the order of the data set, row by row."""


@dataclass(frozen=True)
class _Look:
    """At some row groups: pictures for the sheet, and figures about all pictures in them."""

    cells_BHWC: np.ndarray
    sizes: np.ndarray
    formats: Counter[str]
    row_groups: int


def describe(uri: str, storage: StorageConfig, threads: int = 4, progress: bool = True) -> Description:
    """Describe the data set at `uri`. Reads the row groups of the pictures on the sheet, 80 at most.

    Raises DataError for an absent or damaged data set, StorageError for a store that fails.
    """
    manifest = read_manifest(uri, storage)
    look = _look(manifest, uri, storage, threads, progress)
    scale = max(1, CELL // max(manifest.width, manifest.height))
    sheet = pictures.encode_png(pictures.tile(look.cells_BHWC, COLUMNS), scale)
    return Description(manifest.digest, tuple(_table(manifest, uri, look).items()), sheet)


def as_text(table: tuple[tuple[str, str], ...]) -> str:
    """The table in two columns."""
    width = max(len(name) for name, _ in table)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in table)


def spread(samples: int, count: int) -> np.ndarray:
    """int64: at most `count` different sample indices from the first to the last, evenly spaced."""
    return np.unique(np.linspace(0, samples - 1, min(samples, count)).round().astype(np.int64))


def _look(manifest: Manifest, uri: str, storage: StorageConfig, threads: int, progress: bool) -> _Look:
    indices = spread(manifest.samples, COLUMNS * ROWS)
    ends = np.cumsum([group.rows for group in manifest.row_groups])
    groups = np.searchsorted(ends, indices, side="right")
    rows = indices - (ends - [group.rows for group in manifest.row_groups])[groups]
    wanted = np.unique(groups).tolist()
    cells, sizes, formats = [], [], Counter[str]()
    with closing(Reader(manifest, uri, storage, READ_AHEAD + 1, threads)) as reader:
        for at, group in enumerate(tqdm(wanted, "describe", unit=" row groups", disable=None if progress else True)):
            reader.prefetch(wanted[at : at + READ_AHEAD])
            content = reader.rows(group)
            sizes.append(np.diff(content.offsets))
            formats.update(_format(content[row]) for row in range(len(content)))
            cells += [_cell(content[row], manifest) for row in rows[groups == group].tolist()]
    return _Look(np.stack(cells), np.concatenate(sizes), formats, len(wanted))


def _format(encoded: np.ndarray) -> str:
    try:
        with Image.open(io.BytesIO(encoded.data), formats=READABLE) as picture:
            return str(picture.format)
    except Exception:  # Pillow's plugins raise nearly any kind on damaged input
        return "unreadable"


def _cell(encoded: np.ndarray, manifest: Manifest) -> np.ndarray:
    """uint8 RGB of the cell's shape; grey where the picture cannot be decoded."""
    shrink = min(1.0, CELL / max(manifest.width, manifest.height))
    size = max(1, round(manifest.width * shrink)), max(1, round(manifest.height * shrink))
    try:
        picture = open_rgb(bytes(encoded))[0]
    except PictureError:
        picture = Image.new("RGB", size, (128, 128, 128))
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BOX))


def _table(manifest: Manifest, uri: str, look: _Look) -> dict[str, str]:
    total = sum(shard.bytes for shard in manifest.shards)
    rows, sizes = [group.rows for group in manifest.row_groups], [group.bytes for group in manifest.row_groups]
    looked_at = f"of the {len(look.sizes)} in {look.row_groups} row groups looked at"
    low, middle, high = look.sizes.min(), np.median(look.sizes), look.sizes.max()
    return {
        "data set": uri,
        "digest": manifest.digest,
        "pictures": f"{manifest.samples} of {manifest.width}x{manifest.height}",
        "bytes per picture": f"{low} to {high}, median {middle:.0f} ({looked_at})",
        "formats": ", ".join(f"{name} {count}" for name, count in look.formats.most_common()) + f" ({looked_at})",
        "shards": f"{len(manifest.shards)} Parquet files, {total / 1e6:.1f} MB",
        "row groups": f"{len(rows)} of {min(rows)} to {max(rows)} pictures, up to {max(sizes) / 1e6:.2f} MB; "
        f"one is read at a time",
        "source": f"fingerprint {manifest.source}",
        "ingested with": ", ".join(f"{key}={_shown(value)}" for key, value in sorted(manifest.parameters.items())),
    }


def _shown(value: object) -> str:
    return "" if value is None else json.dumps(value) if isinstance(value, dict) else str(value)
