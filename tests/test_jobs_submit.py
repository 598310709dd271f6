"""The command line of submission, up to where a cluster is needed."""

import argparse
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

from jobs import benchmark, submit, train
from tests.servers import free_ports

ROOT = Path(__file__).parents[1]


def ended(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stopped:
        submit.main(list(words))
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


@pytest.fixture
def nowhere() -> str:
    """An address where nothing answers."""
    return f"http://127.0.0.1:{free_ports(1)[0]}"


# ---- a job's arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "run"),
    [
        ("train --config demo", "demo"),
        ("train --config demo run.name=other", "other"),
        ("tune --config demo --space patches run.name=sweep", "sweep"),
        ("ingest --config demo --verify", "demo"),
        ("evaluate --config ffhq256 --model s3://bucket/x", "ffhq256"),
        ("promote --config demo --version 3", "demo"),
        ("synthesize --config demo", "demo"),
        ("synthesize samples --config demo", "demo"),
        ("benchmark loader --threads 2", "loader"),
        ("benchmark plan --config ffhq256 --gpus 8", "plan"),
    ],
)
def test_a_job_is_called_after_its_run_or_its_kind(command: str, run: str) -> None:
    job, *arguments = shlex.split(command)
    assert submit.resolve(job, arguments).run == run


@pytest.mark.parametrize(
    "words", [["train.batchsize=16"], ["train.batch_size=x", "run.seed=y"], ["--space", "patches"], ["run.name=/x"]]
)
def test_what_the_job_would_refuse_is_refused_here_in_the_same_words(
    words: list[str], nowhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config", "demo", *words]
    with pytest.raises(SystemExit) as stopped:
        train.main(command)
    own = capsys.readouterr().err
    assert ended(capsys, "train", "--address", nowhere, *command) == (2, "", own)
    assert stopped.value.code == 2 and own


def test_an_unknown_preset_is_refused_before_anything_is_asked(
    nowhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ended(capsys, "train", "--config", "dmo", "--address", nowhere)
    assert (code, out) == (2, "") and "no config 'dmo'" in err


def test_a_benchmarks_arguments_are_read_as_it_reads_them(nowhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys, "benchmark", "loader", "--thraeds", "2", "--address", nowhere)
    assert (code, out) == (2, "") and "--thraeds" in err
    code, out, err = ended(capsys, "benchmark", "laoder", "--address", nowhere)
    assert (code, out) == (2, "") and "laoder" in err


# ---- all jobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", submit.JOBS)
def test_each_jobs_own_options_are_known(job: str) -> None:
    """The function that a job hands to `parse` is the one in OPTIONS."""
    module = importlib.import_module(f"jobs.{job}")
    calls = re.findall(r"\bparse\(__doc__, \w+(?:, (?:extra=)?(\w+))?", inspect.getsource(module))
    assert hasattr(module, "parse") == bool(calls)
    assert (calls[0] if calls else "") == submit.OPTIONS.get(job, "")


def test_no_option_of_a_job_is_taken_by_submission() -> None:
    own = {option for action in submit._parser()._actions for option in action.option_strings}
    for job, name in submit.OPTIONS.items():
        parser = argparse.ArgumentParser(add_help=False)
        getattr(importlib.import_module(f"jobs.{job}"), name)(parser)
        assert not own & {option for action in parser._actions for option in action.option_strings}, job
    for kind in benchmark.KINDS:
        parser = argparse.ArgumentParser(add_help=False)
        benchmark.module(kind).add_arguments(parser)
        assert not own & {option for action in parser._actions for option in action.option_strings}, kind


def test_all_jobs_can_be_submitted_but_submission_and_what_asks_storage() -> None:
    assert {"ingest", "train", "tune", "evaluate", "synthesize", "promote", "benchmark"} <= set(submit.JOBS)
    assert not {"submit", "status", "cli", "models", "__init__"} & set(submit.JOBS)


# ---- without a cluster ---------------------------------------------------------------------------


WRONG = [
    [],
    ["trian"],
    ["--config", "demo"],
    ["--list", "train"],
    ["--list", "--stop", "x"],
    ["--stop", "x", "--dry-run"],
]


@pytest.mark.parametrize("words", WRONG)
def test_a_command_line_that_asks_for_nothing_sensible_ends_with_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ended(capsys, *words)
    assert (code, out) == (2, "") and "usage: python -m jobs.submit" in err


def test_help_lists_the_jobs_and_what_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ended(capsys, "--help")
    assert code == 0
    assert all(word in out for word in ("train", "ingest", "--list", "--stop", "--pass-env", "--dry-run", "Ctrl-C"))


@pytest.mark.parametrize("words", [["--list"], ["--stop", "demo"], ["train", "--config", "demo"]])
def test_where_nothing_answers_it_is_one_message(
    words: list[str], nowhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ended(capsys, *words, "--address", nowhere)
    assert (code, out) == (1, "") and f"no Ray dashboard answers at {nowhere}" in err


def test_a_dry_run_shows_what_would_be_sent_and_no_secret(
    nowhere: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.chdir(ROOT)
    words = ["train", "--config", "demo", "run.dir=s3://b/runs", "tracking.enabled=false", "run.name=my-run"]
    code, out, err = ended(capsys, *words, "--dry-run", "--address", nowhere, "--pass-env", "AWS_SECRET_ACCESS_KEY")
    assert code == 0
    assert f"no Ray dashboard answers at {nowhere}" in err
    lines = dict(re.findall(r"^(\w+): +(.*)$", out, re.MULTILINE))
    assert lines["id"] == "train-my-run-1"
    assert shlex.split(lines["entrypoint"]) == [
        *["python", "-m", "jobs.train", *words[1:]],
        f"data.uri={ROOT}/runs/data/earth-32",
    ]
    assert "AWS_SECRET_ACCESS_KEY" in lines["environment"].split(", ")
    assert "hunter2" not in out + err
    package = re.fullmatch(rf"(\d+) files of {ROOT}, ([\d.]+) MB of at most 104\.9; .*", lines["package"])
    assert package is not None
    count, size = package.groups()
    assert int(count) > 100 and 1 < float(size) < 20
    assert re.search(r"1\.46 MB  pipeline/presets/data/earth-blue-marble\.jpg", out)


def test_a_variable_that_is_not_set_is_refused(nowhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ended(capsys, "train", "--config", "demo", "--address", nowhere, "--pass-env", "NO_SUCH_VARIABLE")
    assert code == 1 and "NO_SUCH_VARIABLE" in err
