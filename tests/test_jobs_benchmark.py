"""The command line of benchmarks."""

import argparse
from pathlib import Path

import pytest

from jobs import benchmark
from pipeline.benchmark import loader


@pytest.mark.parametrize("kind", list(benchmark.KINDS))
def test_every_kind_has_options_and_runs(kind: str) -> None:
    code = benchmark.module(kind)
    assert callable(code.add_arguments) and callable(code.run)


def test_help_lists_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(kind in text for kind in benchmark.KINDS)
    assert "python -m jobs.benchmark loader" in text


def test_help_of_a_kind_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["loader", "--help"])
    text = capsys.readouterr().out
    assert "--peers-venv" in text and "--row-group-rows" in text


@pytest.mark.parametrize("words", [[], ["laoder"], ["loader", "--peer"], ["loader", "--batch", "none"]])
def test_a_command_line_that_cannot_be_used_ends_with_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_the_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(loader, "run", seen.append)
    benchmark.main(["loader", "--pictures", "7", "--peers"])
    (args,) = seen
    assert (args.pictures, args.peers, args.kind) == (7, True, "loader")


def test_an_error_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["loader", "--data", str(tmp_path / "none")])
    assert ended.value.code == 1
    assert "no manifest.json at" in capsys.readouterr().err
