"""jobs.status of a real small run: for people, for programs, with MLflow there and away."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import status, train
from pipeline.config import Config, load_config
from pipeline.storage import StorageConfig
from pipeline.tracking.runs import end_run
from pipeline.training.notes import note_restart
from tests.mlflow_server import sqlite_uri
from tests.servers import free_ports
from tests.small import SMALL_SETTINGS, small_data

STORAGE = StorageConfig()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, train.Trained]:
    """A run that ended, recorded in a database, measured twice and registered."""
    folder = tmp_path_factory.mktemp("status")
    data = small_data(folder)
    settings = [f"run.dir={folder}/runs", "run.name=small", f"data.uri={data.uri}", "data.decoder=pillow"]
    settings += [*SMALL_SETTINGS, "train.precision=fp32", "train.total_kimg=0.064", "train.tick_kimg=0.016"]
    settings += ["train.checkpoint_kimg=0.032", "train.evaluate_kimg=0.064", "evaluate.images=16"]
    settings += ["evaluate.input_size=32", "cluster.backend=local", f"tracking.uri={sqlite_uri(folder)}"]
    config = load_config(None, [*settings, "tracking.model_name=small"])
    return config, train.run(config)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    status.main(arguments)
    return capsys.readouterr().out


def rows(text: str) -> dict[str, str]:
    """The last row of each name."""
    return {line[2:14].strip(): line[14:] for line in text.splitlines()[1:]}


def test_a_run_that_has_ended(trained: tuple[Config, train.Trained], capsys: pytest.CaptureFixture[str]) -> None:
    config, done = trained
    text = told(capsys, config.run_uri)
    assert text.splitlines()[0] == f"ended: {config.run_uri}"
    found = rows(text)
    assert found["images"].startswith("0.064 of 0.064 kimg (100.0%)") and "left" not in found["images"]
    assert "0m" in found["last tick"]
    assert found["checkpoint"].endswith(done.outcome.checkpoint) and "ago" in found["checkpoint"]
    value = done.outcome.results[0]["value"]
    assert f"last {value:.2f} at 0.064 kimg" in found["distance"]
    assert "16 generated" in text and "protocol" in text  # a number never travels without its protocol
    assert found["restarts"] == "0"
    assert Path(found["samples"]).name == "0000000064.png" and Path(found["samples"]).exists()
    assert found["MLflow"].startswith("FINISHED") and str(done.tracking_run) in found["MLflow"]
    assert found["registered"] == "small version 1"


def test_the_command_line_of_the_training_names_the_run_too(
    trained: tuple[Config, train.Trained], capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = trained
    text = told(capsys, "--config", "demo", f"run.dir={config.run.dir}", "run.name=small", "--json")
    found = json.loads(text)
    assert (found["state"], found["images_seen"], found["mlflow"]["versions"]) == ("ended", 64, ["small version 1"])
    assert found["best"]["protocol"]["images"] == 16


def test_watching_ends_with_the_run(trained: tuple[Config, train.Trained], capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, trained[0].run_uri, "--watch").count("ended: ") == 1


def copied(trained: tuple[Config, train.Trained], folder: Path, lines: int, **note: Any) -> Path:
    """A folder with the first lines of the run's log, and another note of where it is recorded."""
    source = Path(trained[0].run_uri)
    folder.mkdir(parents=True)
    log = (source / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(log[:lines]))
    known = json.loads((source / "tracking.json").read_text())
    (folder / "tracking.json").write_text(json.dumps(known | note))
    return folder


def test_mlflow_that_is_down_is_said_and_the_rest_is_told(
    trained: tuple[Config, train.Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = free_ports(1)
    folder = copied(trained, tmp_path / "run", 3, uri=f"http://127.0.0.1:{port}")
    note_restart(str(folder), STORAGE, "worker 1: killed")
    found = rows(told(capsys, str(folder)))
    assert "no tracking server answers" in found["MLflow"]
    assert found["images"].startswith("0.032 of 0.064 kimg (50.0%)") and "left" in found["images"]
    assert found["checkpoint"] == "none yet"
    assert found[""].endswith("worker 1: killed")


def test_a_run_whose_driver_gave_up_has_stopped(
    trained: tuple[Config, train.Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, done = trained
    folder = copied(trained, tmp_path / "run", 3)
    try:
        end_run(config.tracking_uri, str(done.tracking_run), "FAILED")
        assert told(capsys, str(folder)).startswith("stopped: ")
    finally:
        end_run(config.tracking_uri, str(done.tracking_run), "FINISHED")


def test_neither_ray_nor_mlflow_is_imported_where_the_run_is_not_recorded(
    trained: tuple[Config, train.Trained], tmp_path: Path
) -> None:
    folder = copied(trained, tmp_path / "run", 2)
    (folder / "tracking.json").unlink()
    code = (
        "import sys\nfrom jobs import status\nstatus.main(sys.argv[1:])\nprint({'ray', 'mlflow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "not recorded there" in done.stdout and done.stdout.endswith("set()\n")


def test_a_run_that_is_not_there_is_refused(
    trained: tuple[Config, train.Trained], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        status.main([f"{trained[0].run.dir}/smal"])
    assert caught.value.code == 1
    assert "there are small" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        status.main([])
    assert caught.value.code == 2
    assert "which run?" in capsys.readouterr().err
