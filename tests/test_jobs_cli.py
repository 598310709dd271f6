"""The shared command line, in processes of its own where exit codes and streams matter."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from pipeline import plain_yaml
from pipeline.config import Config, ConfigError, describe_fields, load_config, to_yaml
from pipeline.packages import MissingPackageError
from pipeline.storage import StorageError

JOB = '''"""Does a small thing.

    python -m job --config demo
"""

from jobs.cli import parse


def options(parser):
    parser.add_argument("kind", choices=["grid", "single"])
    parser.add_argument("--address")
    parser.add_argument("--space")


config, args = parse(__doc__, extra=options)
print("ran", args.kind, args.address, args.dry_run, config.train.batch_size)
'''


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def run(job: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(job), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, cwd=job.parent, env=environment)


def parsed(*arguments: str, **keywords: object) -> tuple[Config, argparse.Namespace]:
    return cli.parse("Doc.", arguments, **keywords)  # type: ignore[arg-type]


def stopped(capsys: pytest.CaptureFixture[str], *arguments: str, **keywords: object) -> str:
    with pytest.raises(SystemExit) as caught:
        parsed(*arguments, **keywords)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    return output.err.removeprefix("python -m jobs.NAME: ").removesuffix("\n")


# ---- in a process --------------------------------------------------------------------------------


def test_a_job_runs_with_overrides_anywhere(job: Path) -> None:
    done = run(job, "grid", "--config", "demo", "train.batch_size=16", "--address", "x", "run.seed=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ran grid x False 16\n"


def test_a_bad_config_is_one_message_on_stderr_and_code_2(job: Path) -> None:
    done = run(job, "grid", "--config", "demo", "train.batchsize=16")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "python -m jobs.NAME: unknown key train.batchsize: did you mean train.batch_size? (on the command line)\n"
    )


def test_dry_run_prints_a_config_that_loads_again(job: Path, tmp_path: Path) -> None:
    done = run(job, "single", "--dry-run", "--config", "demo", "train.batch_size=16")
    text, _, rest = done.stdout.rpartition("ran ")
    assert rest == "single None True 16\n"
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_config(str(again)) == load_config("demo", ["train.batch_size=16"])


# ---- in this process -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 100, 110])
def test_help_shows_every_setting_with_default_and_text(width: int) -> None:
    text = cli.settings_help(width)
    words = " ".join(text.split())
    for field in describe_fields():
        assert f"  {field.key} = " in text
        assert field.help in words, f"the help of {field.key} is not whole"
    for section in Config.model_fields:
        assert f"\n{section}: " in text
    assert "train.batch_size = 32 (integer > 0)" in words
    assert "cluster.use_gpu = false (true or false)" in words
    assert "train.betas = [0.0, 0.99]" in words
    assert "tracking.uri = (empty)" in words
    assert all(len(line) <= width for line in text.splitlines() if line.startswith("      "))


def test_the_config_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\ntrain: {r1_gamma: 3}\n")
    config, args = parsed("run.seed=1", "--config", str(path), "run.seed=2")
    assert (config.train.r1_gamma, config.run.seed, args.config) == (3.0, 2, str(path))
    assert args.overrides == ["run.seed=1", "run.seed=2"]


def test_a_job_may_have_a_default_config() -> None:
    assert parsed(default="demo")[0] == load_config("demo")
    assert parsed("--config", "ffhq256", default="demo")[0] == load_config("ffhq256")


def test_an_option_named_space_is_the_search_space() -> None:
    config, _ = parsed("--config", "demo", "--space", "patches", extra=lambda parser: parser.add_argument("--space"))
    assert list(config.tune.space) == ["train.patch.size", "train.learning_rate"]


def test_a_dry_run_prints_the_resolved_config(capsys: pytest.CaptureFixture[str]) -> None:
    config, args = parsed("--config", "demo", "--dry-run")
    assert args.dry_run
    assert capsys.readouterr().out == to_yaml(config)
    assert plain_yaml.parse(to_yaml(config))["model"]["size"] == 32


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(capsys, "--confg", "demo") == "unknown option --confg: did you mean --config?"
    assert stopped(capsys, "--config", "demo", "--train.batch_size=3").startswith(
        "unknown option --train.batch_size=3: --help lists the options; settings are written key=value"
    )
    assert stopped(capsys).startswith("--config is missing: expected a YAML file or one of churches256")
    assert stopped(capsys, "--config") == "argument --config: expected one argument"
    assert "expected key=value" in stopped(capsys, "--config", "demo", "fast")
    assert "no config 'dmo'" in stopped(capsys, "--config", "dmo")
    assert stopped(capsys, "--conf", "demo").startswith("unknown option --conf")


def test_several_problems_stand_on_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = stopped(capsys, "--config", "demo", "train.batch_size=x", "run.seed=y").splitlines()
    assert lines[0] == "the config cannot be used"
    assert sorted(line.split(" is ")[0] for line in lines[1:]) == ["  run.seed", "  train.batch_size"]


def test_secrets_are_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    text = stopped(capsys, "--config", "demo", "storage.secret_access_key=hunter2")
    assert "AWS_SECRET_ACCESS_KEY" in text
    assert "hunter2" not in text


def test_help_starts_with_the_jobs_own_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse("Trains.\n\n    python -m jobs.train --config demo\n", ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Trains.\n\n    python -m jobs.train --config demo\n\nusage: python -m jobs.NAME ")
    assert "--dry-run" in text
    assert text.endswith(cli.settings_help(cli._width()) + "\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("one"), 2, "one"),
        (ConfigError("first\nsecond"), 2, "the config cannot be used\n  first\n  second"),
        (StorageError("x is gone"), 1, "x is gone"),
        (MissingPackageError("run pip install x"), 1, "run pip install x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["config", "problems", "store", "package", "stop"],
)
def test_explained_errors_are_one_message(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    @cli.failing_clearly
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code
    assert capsys.readouterr().err == f"python -m jobs.NAME: {message}\n"


def test_work_that_goes_on_says_so_when_it_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    @cli.failing_clearly
    def main() -> None:
        with cli.going_on():
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    said = capsys.readouterr().err
    assert said == "python -m jobs.NAME: interrupted; the same command goes on where it was\n"


def test_defects_keep_their_traceback() -> None:
    @cli.failing_clearly
    def main() -> None:
        raise KeyError("k")

    with pytest.raises(KeyError):
        main()
