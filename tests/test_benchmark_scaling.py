"""The benchmark of several workers."""

import json
from pathlib import Path

import pytest

from jobs import benchmark
from pipeline.benchmark.pace import Pace
from pipeline.benchmark.scaling import (
    APART,
    ON_RAY,
    TOGETHER,
    Run,
    conclusions,
    efficiency,
    kinds,
    pictures_of,
    ray_cost,
)
from pipeline.config import ConfigError, load_config
from tests.small import SMALL_SETTINGS


def team(workers: int, kind: str, seconds: float) -> Run:
    return Run(workers, kind, [Pace(seconds * (1 - 0.1 * rank), 0.05, 0.002, 0.001) for rank in range(workers)])


ROUND = [team(1, TOGETHER, 0.09), team(1, ON_RAY, 0.1), team(2, APART, 0.095), team(2, TOGETHER, 0.1)]


def test_a_team_is_as_fast_as_its_slowest() -> None:
    assert ROUND[3].seconds == 0.1


def test_ratios_are_of_one_round() -> None:
    assert efficiency(ROUND, 0, 1) == 1.0
    assert efficiency(ROUND, 3, 1) == pytest.approx(0.9)
    assert ray_cost(ROUND, 1) == pytest.approx(0.1)
    assert ray_cost(ROUND, 2) is None


def test_the_report() -> None:
    text = "\n".join(conclusions([ROUND] * 3, 8, 1))
    assert "Ray costs 10.0% of the rate of 1 worker(s)" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[-1] == ["2", TOGETHER, "160.00", "100.0", "90.0%", "50.0", "2.0", "1.0"]
    assert rows[2] == ["1", TOGETHER, "88.89", "90.0", "100.0%", "50.0", "", ""]


def test_kinds_of_teams() -> None:
    assert list(kinds(1, False)) == [TOGETHER]
    assert list(kinds(2, True)) == [APART, TOGETHER, ON_RAY]


def test_pictures_of_a_worker_are_whole_groups() -> None:
    config = load_config("demo")  # 16 for two workers
    assert pictures_of(config, None) == 8 and pictures_of(config, 12) == 12
    with pytest.raises(ConfigError, match="expected a multiple of model.discriminator.group"):
        pictures_of(config, 6)


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scaling.json"
    words = ["scaling", "--config", "demo", *SMALL_SETTINGS, "train.r1_interval=2", "--pictures", "4"]
    benchmark.main([*words, "--updates", "2", "--rounds", "1", "--json", str(out)])
    text = capsys.readouterr().out
    (runs,) = json.loads(out.read_text())["rounds"]
    assert [(run["workers"], run["kind"]) for run in runs] == [(1, TOGETHER), (2, APART), (2, TOGETHER)]
    assert all(pace["seconds"] > 0 for run in runs for pace in run["paces"])
    assert all(0 < pace["waiting"] < pace["seconds"] and pace["transfer"] > 0 for pace in runs[2]["paces"])
    assert all(pace["waiting"] == 0 and pace["transfer"] == 0 for run in runs[:2] for pace in run["paces"])
    assert "waiting:" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "demo", "--workers", "1,none"], "expected a whole number"),
        (["--config", "demo", "--updates", "10"], "multiple of train.r1_interval (16), for example 16"),
        (["--config", "demo", "--pictures", "3"], "model.discriminator.group"),
    ],
)
def test_what_cannot_be_measured_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["scaling", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
