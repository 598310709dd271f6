"""What travels with a job: exactly what Ray packs, and no data, history or environment."""

import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray._private.runtime_env.packaging import create_package

from pipeline.cluster.packing import ROOT, check_package, excluded, largest, limit_bytes, package_bytes, packed
from pipeline.cluster.session import ClusterError

PARTS = ["pipeline", "jobs", "a b", "é", ".git", "runs", ".venv", "__pycache__", "dist", "x.db", "m.py", ".env"]
TREES = st.dictionaries(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(tuple), st.binary(max_size=40), max_size=12
)
IGNORED = st.lists(st.sampled_from(["m.py", "/jobs", "pipeline/", "*.db", "!m.py", "a*/**/m.py", "# text"]), max_size=3)


def write(root: Path, tree: dict[tuple[str, ...], bytes]) -> None:
    """The files of a tree, but those that lie where a file is already."""
    for parts, data in tree.items():
        path = root.joinpath(*parts)
        if path.exists() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@settings(max_examples=60)
@given(TREES, IGNORED)
def test_the_list_is_what_ray_packs_to_the_byte(tree: dict[tuple[str, ...], bytes], ignored: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        write(root, tree)
        (root / ".gitignore").write_text("\n".join(ignored))
        patterns = excluded(root)
        files = packed(root, patterns)
        target = Path(folder) / "package.zip"
        create_package(str(root), target, include_gitignore=True, excludes=patterns)
        entries = zipfile.ZipFile(target).infolist()
        assert files == {entry.filename: entry.file_size for entry in entries if not entry.is_dir()}
        folders = [entry for entry in entries if entry.is_dir()]  # empty ones, which Ray packs too
        empty = sum(76 + 2 * len(one.filename.encode()) for one in folders)
        assert package_bytes(files) == target.stat().st_size - empty


@settings(max_examples=60)
@given(TREES)
def test_no_data_history_or_environment_travels_and_all_else_does(tree: dict[tuple[str, ...], bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, tree)
        stays = {".git", ".venv", "__pycache__", ".env", "x.db"}
        expected = {
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.is_file()
            and not stays & set(path.relative_to(root).parts)
            and path.relative_to(root).parts[0] not in ("runs", "dist")
        }
        assert set(packed(root, excluded(root))) == expected


def test_what_gitignore_names_stays_even_where_there_is_no_gitignore(tmp_path: Path) -> None:
    patterns = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] not in "#!"]
    for pattern in patterns:
        path = tmp_path / pattern.strip("/").replace("*", "x")
        path.mkdir(parents=True)
        (path / "file").write_text("x")
    assert len(list(tmp_path.iterdir())) == len(patterns) > 5
    assert packed(tmp_path, excluded(tmp_path)) == {}


def test_an_environment_of_any_name_stays(tmp_path: Path) -> None:
    for name in ("env311", "pipeline"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").write_text("x")
    (tmp_path / "env311" / "pyvenv.cfg").write_text("home = /usr/bin")
    assert set(packed(tmp_path, excluded(tmp_path))) == {"pipeline/bin/python"}


def test_this_project_travels_with_its_code_and_presets() -> None:
    files = packed(ROOT, excluded(ROOT))
    check_package(files)
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("pipeline", "jobs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= set(files)
    assert package_bytes(files) < 20e6, largest(files)


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git checkout to ask")
def test_nothing_travels_that_git_ignores() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]

    def known() -> set[str]:
        return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"))

    before = known()
    files = packed(ROOT, excluded(ROOT))
    assert set(files) <= before | known()


def test_too_much_is_refused_with_the_names_of_the_largest() -> None:
    files = {"jobs/train.py": 10, "pyproject.toml": 10, "pictures.zip": 90_000_000, "more/a.bin": 20_000_000}
    with pytest.raises(ClusterError, match=r"4 files with 110\.0 MB") as refused:
        check_package(files)
    lines = str(refused.value).splitlines()
    assert ".gitignore" in lines[0]
    assert lines[1].split() == ["90.00", "MB", "pictures.zip"]
    assert lines[2].split() == ["20.00", "MB", "more/a.bin"]
    check_package(files | {"pictures.zip": limit_bytes() - package_bytes(files) + 90_000_000 - 1})
    with pytest.raises(ClusterError):
        check_package(files | {"pictures.zip": limit_bytes() - package_bytes(files) + 90_000_000})


def test_an_installed_package_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=f"{tmp_path} is no checkout"):
        check_package({"jobs/train.py": 10, "torch/lib.so": 10}, tmp_path)
