"""The table says what is stored, and the sheet shows it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.manifest import DataError, read_manifest
from pipeline.ingest.describe import as_text, describe, spread
from pipeline.storage import StorageConfig
from tests.pictures import encoded, make_data, picture_files, pixels, write_data_set

STORAGE = StorageConfig()


@given(samples=st.integers(1, 10**10), count=st.integers(1, 100))
def test_indices_are_spread_evenly(samples: int, count: int) -> None:
    indices = spread(samples, count)
    assert len(indices) == min(samples, count)
    assert indices[0] == 0 and indices.max() < samples
    if len(indices) > 1:
        assert indices[-1] == samples - 1
        steps = np.diff(indices)
        assert steps.min() >= 1 and steps.max() - steps.min() <= 1


def test_the_table_tells_what_is_stored(tmp_path: Path) -> None:
    files = dict(sorted(picture_files(40).items()))
    uri = make_data(tmp_path, 40, part_pictures=25, workers=1).uri
    manifest = read_manifest(uri, STORAGE)
    found = describe(uri, STORAGE, progress=False)
    table = dict(found.table)
    sizes = [len(data) for data in files.values()]
    assert found.digest == table["digest"] == manifest.digest
    assert table["pictures"] == "40 of 16x16"
    assert table["bytes per picture"].startswith(f"{min(sizes)} to {max(sizes)}, median {np.median(sizes):.0f} ")
    assert table["formats"] == "PNG 14, JPEG 13, WEBP 13 (of the 40 in 11 row groups looked at)"
    assert table["shards"].startswith(f"{len(manifest.shards)} Parquet files, 0.0 MB")
    assert table["row groups"].startswith("11 of 1 to 4 pictures")
    assert "size=16" in table["ingested with"] and "row_group_rows=4" in table["ingested with"]
    assert manifest.source in table["source"] and table["data set"] == uri
    assert as_text(found.table).splitlines()[1] == f"digest             {manifest.digest}"


def test_the_sheet_shows_pictures_from_all_over_the_data_set(tmp_path: Path) -> None:
    files = [data for _, data in sorted(picture_files(200).items())]
    sheet = pixels(describe(make_data(tmp_path, 200).uri, STORAGE, progress=False).sheet)
    assert sheet.shape == ((8 * 17 - 1) * 8, (10 * 17 - 1) * 8, 3)
    for cell, index in enumerate(spread(200, 80).tolist()):
        top, left = cell // 10 * 17 * 8, cell % 10 * 17 * 8
        assert np.array_equal(sheet[top : top + 128 : 8, left : left + 128 : 8], pixels(files[index]))


def test_large_pictures_are_shrunk_and_broken_ones_are_grey(tmp_path: Path) -> None:
    large = [encoded(number, 256) for number in range(3)]
    write_data_set(str(tmp_path), [*large, b"no picture"], size=256)
    found = describe(str(tmp_path), STORAGE, progress=False)
    sheet = pixels(found.sheet)
    assert sheet.shape == (128, 1289, 3)
    means = pixels(large[1]).reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(sheet[:, 129:257] - means).max() <= 1
    assert (sheet[:, 387:515] == 128).all()
    assert (sheet[:, 516:] == 255).all()
    assert dict(found.table)["formats"].startswith("PNG 3, unreadable 1")


def test_a_damaged_data_set_is_named(tmp_path: Path) -> None:
    uri = make_data(tmp_path, 8).uri
    path = Path(uri, read_manifest(uri, STORAGE).shards[0].file)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=path.name):
        describe(uri, STORAGE, progress=False)
    with pytest.raises(DataError, match="no manifest.json"):
        describe(str(tmp_path), STORAGE, progress=False)
