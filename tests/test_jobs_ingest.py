"""The command: it ingests, checks and describes, and its exit code says how that went."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import ingest
from tests.pictures import encoded, picture_files, write_data_set, write_folder


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    source = write_folder(tmp_path / "in", picture_files(12))
    text = f"extends: demo\ningest: {{source: {source}, tile: null}}\nmodel: {{size: 16}}\n"
    path = tmp_path / "mine.yaml"
    path.write_text(f"{text}data: {{uri: {tmp_path}/out}}\nrun: {{dir: {tmp_path}/runs}}\n")
    return ["--config", str(path)]


def test_ingest_verify_and_describe(tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    ingest.main([*settings, "ingest.workers=1"])
    said = capsys.readouterr().out
    assert "ingest with up to 1 process on this machine" in said and "wrote 12 pictures in 1 shard(s)" in said
    digest = said.split("digest ")[1].strip()
    ingest.main([*settings, "--verify"])
    said = capsys.readouterr().out
    assert "checked 3 files" in said and "1 row groups, headers of 12 pictures" in said and "all right" in said
    ingest.main([*settings, "--describe"])
    said = capsys.readouterr().out
    sheet = tmp_path / "runs" / f"contact-sheet-{digest[:8]}.png"
    assert "12 of 16x16" in said and said.splitlines()[-1] == f"contact sheet at {sheet}"
    with Image.open(sheet) as picture:
        assert np.asarray(picture).shape == ((2 * 17 - 1) * 8, (10 * 17 - 1) * 8, 3)
    ingest.main([*settings, "--describe", "--sheet", str(tmp_path / "mine.png")])
    assert (tmp_path / "mine.png").read_bytes() == sheet.read_bytes()


def test_a_dry_run_looks_and_writes_nothing(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ingest.main([*settings, "--dry-run"])
    said = capsys.readouterr().out
    assert said.startswith("run:") or "\nrun:" in said
    assert said.endswith("source: folder of 12 pictures, 1 part(s)\nwould be: a new data set\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "mine.yaml"]
    ingest.main(settings)
    capsys.readouterr()
    ingest.main([*settings, "--dry-run"])
    assert "would be: nothing to do: the data set is there already" in capsys.readouterr().out
    for change, code, words in (
        ("ingest.format=png", 1, "differs in ingest.format"),
        (f"ingest.source={tmp_path}/none", 1, "there is nothing to ingest here"),
        ("data.uri=", 2, "ingest.source and data.uri must say"),
        (f"data.uri={tmp_path}/in", 1, "are the same place"),
    ):
        with pytest.raises(SystemExit) as ended:
            ingest.main([*settings, "--dry-run", change])
        assert ended.value.code == code and words in capsys.readouterr().err


def test_a_sheet_belongs_to_describe(tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--verify"], ["--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            ingest.main([*settings, "--sheet", "x.png", *more])
        assert ended.value.code == 2 and "add --describe or leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("action", "message"),
    [([], "interrupted; the same command goes on where it was"), (["--verify"], "interrupted")],
    ids=["ingest", "verify"],
)
def test_what_ctrl_c_means_depends_on_what_was_done(
    settings: list[str],
    action: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*args: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest, action[0].strip("-") if action else "ingest", stopped)
    with pytest.raises(SystemExit) as ended:
        ingest.main([*settings, *action])
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"python -m jobs.NAME: {message}\n"


def test_a_missing_package_is_one_message(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "in" / "data.mdb").write_bytes(b"x")
    with pytest.raises(SystemExit) as ended:
        ingest.main(settings)
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith("needs the package lmdb; run pip install 'cips-pipeline[lmdb]'\n")


def test_verify_fails_with_all_problems_counted(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_data_set(str(tmp_path / "out"), [encoded(number, 24) for number in range(30)])
    with pytest.raises(SystemExit) as ended:
        ingest.main([*settings, "--verify"])
    assert ended.value.code == 1
    said = capsys.readouterr().out.splitlines()
    wrong = [line for line in said if line.startswith("wrong: ")]
    assert len(wrong) == 20 and "row group 0, row 0 ('pictures/0.png'): is 24x24" in wrong[0]
    assert said[-2] == "... and 10 more" and said[-1].startswith("30 problem(s): restore the files")


def test_what_is_missing_is_said(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--verify", "--describe"):
        with pytest.raises(SystemExit) as ended:
            ingest.main([*settings, flag])
        assert ended.value.code == 1 and "no manifest.json at " in capsys.readouterr().err
        with pytest.raises(SystemExit) as ended:
            ingest.main([*settings, flag, "data.uri="])
        assert ended.value.code == 2 and "data.uri is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        ingest.main([*settings, "--verify", "--describe"])
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err
