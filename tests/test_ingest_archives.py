import gzip
import itertools
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.picture import PictureError
from pipeline.ingest.archives import TarPictures, WebDatasetPictures, ZipPictures, compressed
from pipeline.ingest.sources import list_source
from pipeline.storage import MissingError, StorageConfig, StorageError
from tests.picture_sources import write_tar, write_webdataset
from tests.pictures import picture_files, write_zip
from tests.servers import S3Server

STORAGE = StorageConfig()
FILES = dict(sorted(picture_files(7).items()))
LONG = f"{'deep/' * 60}{'n' * 120}.png"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_keep_their_order(tmp_path: Path, form: int) -> None:
    files = dict(reversed(FILES.items())) | {"empty.txt": b""}
    if form != tarfile.USTAR_FORMAT:
        files |= {LONG: b"long", "bücher/straße.png": b"umlauts"}
    uri = str(write_tar(tmp_path / "x.tar", {f"./{name}": data for name, data in files.items()}, form))
    found = list_source(uri, STORAGE)
    assert (found.kind, found.ignored) == ("tar", ("empty.txt",))
    assert list(found.names) == [name for name in files if name != "empty.txt"]
    pictures = TarPictures(uri, STORAGE)
    assert {name: pictures.read(name) for name in found.names} == {name: files[name] for name in found.names}


def test_links_are_not_pictures_and_the_last_of_two_members_counts(tmp_path: Path) -> None:
    first, second, third = list(FILES)[:3]
    path = tmp_path / "x.tar"
    write_tar(path, {first: b"old", second: FILES[second]})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, second
        archive.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        (tmp_path / "new").write_bytes(FILES[first])
        archive.add(tmp_path / "new", first)
    found = list_source(str(path), STORAGE)
    assert found.names == (second, first)
    assert found.ignored == ("link.png",)
    assert TarPictures(str(path), STORAGE).read(first) == FILES[first]
    with pytest.raises(MissingError, match=f"has no member '{third}' any more"):
        TarPictures(str(path), STORAGE).read(third)


def test_a_tar_that_is_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", dict(itertools.islice(FILES.items(), 2)), tarfile.USTAR_FORMAT)
    data = path.read_bytes()
    end = data.rindex(b"\0" * 9 + b"\0" * 512)  # somewhere in the zeros at the end
    members = len(data[:end].rstrip(b"\0"))
    for kept in range(0, members, 128):
        path.write_bytes(data[:kept])
        with pytest.raises(StorageError, match=r"x\.tar: (ends within|is cut off|not a readable)"):
            list_source(str(path), STORAGE)
    whole = -(-members // 512) * 512 + 512  # one block of zeros is enough
    path.write_bytes(data[:whole])
    assert len(list_source(str(path), STORAGE).names) == 2


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", FILES, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    place = data.index(sorted(FILES)[3].encode())
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(StorageError, match=f"x.tar: is damaged at byte {place} of {len(data)}; copy or pack it again"):
        list_source(str(path), STORAGE)


def test_a_tar_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", FILES)
    pictures = TarPictures(str(path), STORAGE)
    first, *_, last = FILES
    assert pictures.read(first) == FILES[first]
    with path.open("r+b") as file:
        file.truncate(1024)
    with pytest.raises(StorageError, match="x.tar"):
        pictures.read(last)


def test_compressed_tars_are_refused_with_the_fix(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "x.tar", FILES).read_bytes()
    (tmp_path / "x.tar").unlink()
    for name in ("a.tar.gz", "A.TGZ", "b.tar.zst"):
        assert compressed(name)
        (tmp_path / name).write_bytes(gzip.compress(data))
        with pytest.raises(StorageError, match=f"{name}.*uncompress it to a .tar"):
            list_source(str(tmp_path / name), STORAGE)
    with pytest.raises(StorageError, match=r"'A.TGZ' is compressed \(3 such files\).*uncompress"):
        list_source(str(tmp_path), STORAGE)
    (tmp_path / "c.tar").write_bytes(gzip.compress(data))
    with pytest.raises(StorageError, match="c.tar: not a readable tar.*without compression"):
        list_source(str(tmp_path / "c.tar"), STORAGE)


def test_webdataset_goes_through_its_tars_in_order(tmp_path: Path) -> None:
    uri = str(write_webdataset(tmp_path, FILES))
    (tmp_path / "index.json").write_text("{}")
    found = list_source(uri, STORAGE)
    assert found.kind == "webdataset"
    assert found.names[:3] == tuple(
        f"0/part-00{number // 2}.tar/{name}" for number, name in enumerate(itertools.islice(FILES, 3))
    )
    assert [name.split(".tar/")[1] for name in found.names] == list(FILES)
    assert len(found.ignored) == 1 + 2 * len(FILES) and "index.json" in found.ignored
    with pytest.raises(MissingError, match="has no member 'x.png'"):
        WebDatasetPictures(uri, STORAGE).read("x.png")


def test_each_tar_is_scanned_once_and_read_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(write_webdataset(tmp_path, FILES))
    names = list_source(uri, STORAGE).names
    pictures = WebDatasetPictures(uri, STORAGE)
    scanned = []
    opened = pictures._open
    monkeypatch.setattr(pictures._tars, "_make", lambda tar: scanned.append(tar) or opened(tar))  # type: ignore[func-returns-value]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pictures.read, names * 20)) == list(FILES.values()) * 20
    assert len(scanned) == len(set(scanned)) == 4
    pictures.close()


def test_a_damaged_tar_among_many_and_a_misleading_folder_are_named(tmp_path: Path) -> None:
    write_webdataset(tmp_path, FILES)
    damaged = tmp_path / "0/part-001.tar"
    damaged.write_bytes(damaged.read_bytes()[:700])
    with pytest.raises(StorageError, match="0/part-001.tar: ends within"):
        list_source(str(tmp_path), STORAGE)
    write_tar(tmp_path / "other/x.tar/y.tar", FILES)
    with pytest.raises(StorageError, match="x.tar/y.tar: lies in a folder that is named like a tar"):
        list_source(str(tmp_path / "other"), STORAGE)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?\.(png|txt)", fullmatch=True), st.binary(max_size=1100)))
def test_every_member_of_any_tar_reads_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    uri = str(write_tar(tmp_path_factory.mktemp("tar") / "x.tar", files))
    wanted = {name: data for name, data in files.items() if name.endswith(".png")}
    if not wanted:
        with pytest.raises(StorageError, match="expected pictures"):
            list_source(uri, STORAGE)
        return
    found = list_source(uri, STORAGE)
    pictures = TarPictures(uri, STORAGE)
    assert found.names == tuple(wanted)
    assert {name: pictures.read(name) for name in found.names} == wanted


def test_damaged_zips_are_explained(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "x.zip", FILES)
    data = bytearray(archive.read_bytes())
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match="x.zip: not a readable zip"):
        list_source(str(archive), STORAGE)
    name = sorted(FILES)[2]
    start = data.index(FILES[name])
    data[start + 10 : start + 20] = b"\0" * 10
    archive.write_bytes(data)
    pictures = ZipPictures(str(archive), STORAGE)
    with pytest.raises(PictureError, match="cannot be unpacked"):
        pictures.read(name)
    assert pictures.read(sorted(FILES)[3]) == FILES[sorted(FILES)[3]]
    with pytest.raises(MissingError, match="has no member 'absent.png'"):
        pictures.read("absent.png")
    pictures.close()


@pytest.mark.integration
def test_a_tar_on_s3_is_read_by_ranges(s3: S3Server, tmp_path: Path) -> None:
    path, bucket = write_tar(tmp_path / "x.tar", FILES), s3.new_bucket()
    with s3.filesystem().open_output_stream(f"{bucket}/x.tar") as stream:
        stream.write(path.read_bytes())
    with s3.filesystem().open_output_stream(f"{bucket}/cut.tar") as stream:
        stream.write(path.read_bytes()[:3000])
    uri = f"s3://{bucket}/x.tar"
    found = list_source(uri, STORAGE)
    assert found.fingerprint == list_source(str(path), STORAGE).fingerprint
    pictures = TarPictures(uri, STORAGE)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pictures.read, found.names * 3)) == list(FILES.values()) * 3
    with pytest.raises(StorageError, match="cut.tar: (ends within|is cut off)"):
        list_source(f"s3://{bucket}/cut.tar", STORAGE)
