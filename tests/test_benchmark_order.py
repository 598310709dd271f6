from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from jobs.benchmark import main
from pipeline.benchmark.order import notes, table
from pipeline.benchmark.simulate import Cluster, Report, imagined, simulate
from tests.pictures import encoded, write_data_set

MB = 1_000_000


def test_quality_is_a_table_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "quality.png"
    main(
        ["order", "--quality", "--groups", "20,40", "--quality-batches", "32,64", "--epochs", "3", "--plot", str(plot)]
    )
    out = capsys.readouterr().out
    assert sum(line.split()[:3] == ["closed", "form", "all"] for line in out.splitlines()) == 4
    assert "2 (chosen)" in out and "40 row groups of 256, batch 64, 3 epochs" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("permutation")]
    assert len(rows) == 4 and all(0.9 < float(row[2]) < 1.1 for row in rows)
    assert "Simulated" not in out
    with Image.open(plot) as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_without_arguments_both_parts_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.benchmark.order.SHAPES", {"FFHQ": 70_000, "tiny": 3_000})
    main(["order", "--groups", "10", "--quality-batches", "32", "--epochs", "2"])
    out = capsys.readouterr().out
    assert "10 row groups of 256" in out and "FFHQ: 70,000 pictures in 274 row groups, 2,100 MB" in out
    assert "tiny: 3,000" in out and "assumed: pictures of 30,000 bytes" in out
    simulated = out[out.index("Simulated") :].splitlines()
    rows = [line.split() for line in simulated if line.strip()[:1].isdigit() and line.endswith("%")]
    assert [int(row[0]) for row in rows] == [1, 8, 64, 512] * 2
    assert "512 workers: a batch of 32 has too few minibatch-stddev groups of 4; shown for a batch of 2048" in out


def test_a_data_set_is_simulated_from_its_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data_set(str(tmp_path / "data"), [encoded(number) for number in range(40)])
    for uri in (tmp_path / "data", tmp_path / "data" / "manifest.json"):
        main(["order", "--manifest", str(uri), "--workers", "1,2", "--batch-size", "8"])
        out = capsys.readouterr().out
        assert f"{tmp_path / 'data'}: 40 pictures in 10 row groups" in out
        assert "10 / 10.0 / 10" in out
        assert "Quality" not in out and "~" not in out


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["order", "--manifest", str(tmp_path / "nothing")])
    assert ended.value.code == 1
    assert f"no manifest.json at {tmp_path / 'nothing'}" in capsys.readouterr().err


def test_an_epoch_too_large_to_walk_says_that_it_was_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    main(["order", "--samples", "600000", "--workers", "8", "--exact-samples", "1000"])
    out = capsys.readouterr().out
    assert "~ projected from the beginning and the end of one epoch" in out and "6 of 8" in out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--workers", "1,zwei"], "'zwei': expected a whole number from 1 on"),
        (["--samples", "0"], "'0': expected a whole number from 1 on"),
        (["--bandwidth-mb", "-3"], "'-3': expected a number above 0"),
        (["--latency-ms", "inf"], "'inf': expected a number above 0"),
        (["--epochs", "1"], "'1': expected a whole number from 2 on"),
    ],
)
def test_an_option_that_makes_no_sense_is_explained(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["order", *words])
    assert ended.value.code == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", ["16", "34", "96"])
def test_a_batch_whose_quality_cannot_be_measured_is_refused(
    batch_size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too small for eight workers; no whole minibatch-stddev groups; no divisor of the epoch."""
    with pytest.raises(SystemExit) as ended:
        main(["order", "--quality", "--groups", "10", "--quality-batches", batch_size])
    assert ended.value.code == 2
    assert f"--quality-batches is {batch_size}" in capsys.readouterr().err


def test_a_plot_that_cannot_be_stored_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["order", "--quality", "--plot", str(tmp_path / "nowhere" / "plot.png")])
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert f"there is no folder {tmp_path / 'nowhere'}" in captured.err and "Quality" not in captured.out


def report_of(workers: int, bandwidth: float = 100 * MB) -> Report:
    shape = imagined("x", 20_000, 100_000)
    cluster = Cluster(workers, 0.01, bandwidth, 100.0, 4, 4)
    return simulate(shape, cluster, 32, 2, exact_samples=10**9)


def test_notes_say_what_to_look_at() -> None:
    shape = imagined("x", 20_000, 100_000)
    assert not any("would need" in note for note in notes(shape, [report_of(2)], 32, 100 * MB))
    [slow] = [note for note in notes(shape, [report_of(2, 5 * MB)], 32, 5 * MB) if "would need" in note]
    assert slow.startswith("2 workers: each would need 10.") and slow.endswith("MB/s and has 5.0")
    stormy = replace(report_of(2), workers=700, peak_requests=7_000.0)
    [many] = [note for note in notes(shape, [report_of(2), stormy], 32, 100 * MB) if "SlowDown" in note]
    assert many.startswith("700 workers: 7,000 GETs in a second") and "5,500" in many
    huge = imagined("x", 2_000_000_000, 30_000)
    [footers] = [note for note in notes(huge, [report_of(2)], 32, 100 * MB) if "footers" in note]
    assert "row groups of 384 pictures or more" in footers


def test_columns_are_as_wide_as_their_longest_cell() -> None:
    assert table(("a", "long"), [("123", "4"), ("5", "6")]) == "    a  long\n  123     4\n    5     6"
