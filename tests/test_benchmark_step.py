"""The benchmark of a whole update."""

import json
from pathlib import Path

import pytest

from jobs import benchmark
from pipeline.benchmark.step import cells, conclusions, median, share_of_peak, stored_data
from pipeline.benchmark.updates import DATA_WAIT, OTHER, Measured, per_update
from pipeline.config import load_config
from pipeline.training import phases as phase
from tests.small import SMALL_SETTINGS, small_data

SECONDS = {phase.D_MAIN: 0.05, phase.D_R1: 0.01, phase.G_BACKWARD: 0.03, OTHER: 0.01}
MEASURED = Measured(SECONDS, 3_000_000, 2_000_000, {"bf16": 1e9, "fp32": 1e8}, "bf16")
FLOPS = {phase.D_MAIN: 1e6, phase.D_R1: 1e5, phase.G_BACKWARD: 2e6}


def test_r1_is_spread_over_its_interval_and_all_else_over_the_updates() -> None:
    totals = {phase.D_R1: 3.0, phase.D_MAIN: 8.0, phase.EMA: 1.0}
    found = per_update(totals, 1, 4, 16)
    assert found == {phase.D_MAIN: 2.0, phase.D_R1: 3.0 / 16, phase.EMA: 0.25}
    assert list(found) == [name for name in phase.MEANING if name in found]
    assert per_update({phase.D_MAIN: 8.0}, 0, 4, 16) == {phase.D_MAIN: 2.0}


def test_a_share_of_the_peak_is_that_of_the_phases_own_precision() -> None:
    assert cells(phase.D_MAIN, MEASURED, FLOPS, 10) == ["50.0", "50%", "0", "20%"]
    assert cells(phase.D_R1, MEASURED, FLOPS, 10) == ["10.0", "10%", "0", "100%"]
    assert cells(OTHER, MEASURED, FLOPS, 10) == ["10.0", "10%", "", ""]
    # (10 ms + 10 ms + 20 ms) that the product would take, of 100
    assert share_of_peak(MEASURED, FLOPS, 10) == pytest.approx(0.4)


def test_medians_are_taken_number_by_number() -> None:
    runs = [
        Measured({OTHER: seconds}, peak, above, {"fp32": rate}, "fp32")
        for seconds, peak, above, rate in [(1.0, 7, 2, 5.0), (3.0, 5, 1, 4.0), (2.0, 9, 9, 9.0)]
    ]
    assert median(runs) == Measured({OTHER: 2.0}, 7, 2, {"fp32": 5.0}, "fp32")


def test_the_report_compares_and_says_what_was_not_measured() -> None:
    slow = Measured({name: 3 * took for name, took in SECONDS.items()}, 9_000_000, 8_000_000, {"fp32": 1e8}, "fp32")
    config = load_config("demo", ["data.uri="])
    text = "\n".join(conclusions(config, {"fast": MEASURED, "reference": slow}, FLOPS, False))
    assert "3.00 times as fast, 0.25 of its memory" in text
    assert "160.00 images/s" in text  # 16 in 100 ms
    assert "data wait: not measured" in text and f"| {DATA_WAIT}" not in text
    assert phase.MEANING[phase.D_R1] in text and phase.MEANING[phase.EMA] not in text


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_data(tmp_path)
    out = tmp_path / "step.json"
    words = ["step", "--config", "demo", *SMALL_SETTINGS, f"data.uri={data.uri}", "data.decoder=pillow"]
    words += ["--updates", "2", "--rounds", "1", "--threads", "1", "--compare", "reference", "--json", str(out)]
    benchmark.main(words)
    text = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert set(content["runs"]) == {"fast", "reference"}
    for (measured,) in content["runs"].values():
        assert set(measured["seconds"]) == {*phase.MEANING, OTHER, DATA_WAIT}
        assert all(seconds >= 0 for seconds in measured["seconds"].values())
        assert measured["peak_bytes"] > measured["above_bytes"] > 0 and measured["rates"]["fp32"] > 0
    assert content["runs"]["reference"][0]["precision"] == "fp32"
    assert all(f"| {name} " in text for name in (*phase.MEANING, OTHER, DATA_WAIT, "update"))
    assert "times as fast" in text


def test_data_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    assert stored_data(load_config("demo", [f"data.uri={tmp_path / 'none'}"])) is None
    assert stored_data(load_config("demo", ["data.uri="])) is None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--config", "dmeo"], 2, "dmeo"),
        (["--config", "demo", "train.batch=3"], 2, "train.batch"),
        (["--config", "demo", "--updates", "0"], 2, "expected a whole number"),
        (["--config", "demo", "--json", "/nowhere/step.json"], 2, "there is no folder /nowhere"),
        (["--config", "demo", "--compare", "refrence"], 2, "refrence"),
        ([], 2, "--config"),
    ],
)
def test_what_cannot_be_measured_is_named(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["step", *words])
    assert ended.value.code == code
    assert message in capsys.readouterr().err
