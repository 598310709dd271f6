from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.picture import PictureError
from pipeline.ingest.sources import list_source
from pipeline.ingest.tables import ROW_GROUPS_HELD, ParquetPictures
from pipeline.storage import MissingError, StorageConfig, StorageError
from tests.picture_sources import IMAGE, image_rows, write_parquet, write_parquet_folder
from tests.pictures import picture_files

STORAGE = StorageConfig()
FILES = dict(sorted(picture_files(8).items()))
ROWS = image_rows(FILES)


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (IMAGE, ROWS),
        (pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]), ROWS),
        (pa.struct([("bytes", pa.binary())]), [{"bytes": data} for data in FILES.values()]),
        (pa.binary(), list(FILES.values())),
        (pa.large_binary(), list(FILES.values())),
    ],
    ids=["struct", "large-struct", "struct-without-path", "binary", "large-binary"],
)
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"row_group_size": 100, "use_dictionary": False}])
def test_one_file_of_any_layout(tmp_path: Path, kind: pa.DataType, rows: list[Any], options: dict[str, Any]) -> None:
    uri = str(write_parquet(tmp_path / "train.parquet", rows, kind, **options))
    found = list_source(uri, STORAGE)
    assert found.kind == "parquet" and not found.single
    assert found.names == tuple(f"train.parquet#{row}" for row in range(8))
    pictures = ParquetPictures(uri, STORAGE)
    assert [pictures.read(name) for name in found.names] == list(FILES.values())
    pictures.close()


def test_files_of_a_folder_in_their_order(tmp_path: Path) -> None:
    uri = str(write_parquet_folder(tmp_path / "x.parquet", FILES))  # as some writers call their folders
    (tmp_path / "x.parquet/README.md").write_text("x")
    found = list_source(uri, STORAGE)
    assert found.names[2:4] == ("data/train-00000.parquet#2", "data/train-00001.parquet#0")
    assert found.ignored == ("README.md",)
    pictures = ParquetPictures(uri, STORAGE)
    assert [pictures.read(name) for name in found.names] == list(FILES.values())


def test_the_only_column_of_pictures_may_have_another_name(tmp_path: Path) -> None:
    uri = str(write_parquet(tmp_path / "a.parquet", ROWS, column="img"))
    assert ParquetPictures(uri, STORAGE).read("a.parquet#1") == ROWS[1]["bytes"]
    pq.write_table(pa.table({"left": pa.array(ROWS, IMAGE), "right": pa.array(ROWS, IMAGE)}), tmp_path / "b.parquet")
    with pytest.raises(StorageError, match="b.parquet: has more than one column of pictures.*left.*right.*rename"):
        list_source(str(tmp_path / "b.parquet"), STORAGE)
    pq.write_table(pa.table({"text": ["x"], "image": ["a.png"]}), tmp_path / "c.parquet")
    with pytest.raises(
        StorageError, match="c.parquet: has no column of pictures; expected `image`.*found text: string"
    ):
        list_source(str(tmp_path / "c.parquet"), STORAGE)


def test_rows_without_bytes_are_explained(tmp_path: Path) -> None:
    rows = [ROWS[0], {"bytes": None, "path": "/home/x.png"}, None, {"bytes": None, "path": None}]
    pictures = ParquetPictures(str(write_parquet(tmp_path / "x.parquet", rows)), STORAGE)
    assert pictures.read("x.parquet#0") == ROWS[0]["bytes"]
    with pytest.raises(PictureError, match="no bytes, only the path '/home/x.png': this data set stores paths"):
        pictures.read("x.parquet#1")
    for row in (2, 3):
        with pytest.raises(PictureError, match="is empty"):
            pictures.read(f"x.parquet#{row}")


def test_rows_that_are_not_there_are_named(tmp_path: Path) -> None:
    pictures = ParquetPictures(str(write_parquet(tmp_path / "x.parquet", ROWS)), STORAGE)
    for row in ("8", "-1", "x", ""):
        with pytest.raises(MissingError, match=rf"has no row '{row}' \(rows: 8\)"):
            pictures.read(f"x.parquet#{row}")


def test_threads_share_a_few_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(write_parquet_folder(tmp_path, FILES))
    names = list_source(uri, STORAGE).names
    pictures = ParquetPictures(uri, STORAGE)
    made: list[tuple[str, int]] = []
    read_group = pictures._read_group
    monkeypatch.setattr(pictures._groups, "_make", lambda key: made.append(key) or read_group(key))  # type: ignore[func-returns-value]
    assert [pictures.read(name) for name in names] == list(FILES.values())
    assert len(made) == len(set(made)) == 5  # each row group once, going forward
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pictures.read, names * 20)) == list(FILES.values()) * 20
    assert len(pictures._groups._slots) <= ROW_GROUPS_HELD


def test_damage_is_named_with_the_file_and_the_row_group(tmp_path: Path) -> None:
    write_parquet_folder(tmp_path, FILES)
    names = list_source(str(tmp_path), STORAGE).names
    path = tmp_path / "data/train-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="train-00001.parquet: not a readable Parquet file.*copy it again"):
        list_source(str(tmp_path), STORAGE)
    # The pictures' bytes stand in the file as they are, and once.
    plain: dict[str, Any] = {"use_dictionary": False, "write_statistics": False, "compression": "none"}
    write_parquet(path, ROWS[3:6], write_page_checksum=True, **plain)
    data = bytearray(path.read_bytes())
    data[data.index(ROWS[5]["bytes"]) + 20] ^= 0xFF
    path.write_bytes(data)
    pictures = ParquetPictures(str(tmp_path), STORAGE)
    assert pictures.read(names[4]) == ROWS[4]["bytes"]
    with pytest.raises(StorageError, match=r"train-00001.parquet \(row group 1\): .*checksum"):
        pictures.read(names[5])


def test_the_fingerprint_is_that_of_the_footers(tmp_path: Path) -> None:
    def fingerprint(name: str, rows: list[dict[str, Any]]) -> str:
        return list_source(str(write_parquet(tmp_path / name / "x.parquet", rows)), STORAGE).fingerprint

    first = fingerprint("one", ROWS)
    assert fingerprint("two", ROWS) == first
    assert fingerprint("order", ROWS[::-1]) != first
    assert fingerprint("fewer", ROWS[1:]) != first
    assert fingerprint("longer", [*ROWS[:-1], ROWS[-1] | {"bytes": ROWS[-1]["bytes"] + b"1"}]) != first


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=12), st.integers(1, 5), st.randoms(use_true_random=False))
def test_rows_in_any_order_of_reading(
    tmp_path_factory: pytest.TempPathFactory, values: list[bytes], row_group_size: int, random: Any
) -> None:
    path = tmp_path_factory.mktemp("table") / "x.parquet"
    rows = image_rows({str(index): value for index, value in enumerate(values)})
    uri = str(write_parquet(path, rows, row_group_size=row_group_size))
    names = list(list_source(uri, STORAGE).names)
    assert len(set(names)) == len(values)
    expected = dict(zip(names, values, strict=True))
    random.shuffle(names)
    pictures = ParquetPictures(uri, STORAGE)
    assert {name: pictures.read(name) for name in names} == expected
