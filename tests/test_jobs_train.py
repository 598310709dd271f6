"""What `jobs.train` notes when its command is given again; the job itself is tested whole in tests/integration/."""

import json
from pathlib import Path
from typing import Any

from jobs.train import note_return
from pipeline.storage import StorageConfig
from pipeline.training.checkpoint import INDEX, checkpoint_folder
from pipeline.training.notes import read_restarts

STORAGE = StorageConfig()


def run_folder(folder: Path, images_seen: int, *checkpoints: int) -> str:
    """What a run of 64 images has left when it came so far."""
    line: dict[str, Any] = {"images_seen": images_seen, "total_images": 64}
    (folder / "log.jsonl").write_text(json.dumps(line) + "\n")
    for count in checkpoints:
        path = Path(checkpoint_folder(str(folder), count))
        path.mkdir(parents=True)
        (path / INDEX).write_text("{}")
    return str(folder)


def causes(folder: str) -> list[str]:
    return [restart["cause"] for restart in read_restarts(folder, STORAGE)]


def test_a_new_run_and_one_that_has_ended_are_no_restarts(tmp_path: Path) -> None:
    note_return(str(tmp_path), STORAGE)
    assert causes(str(tmp_path)) == []
    ended = run_folder(tmp_path, 64, 32, 64)
    note_return(ended, STORAGE)
    assert causes(ended) == []


def test_each_return_to_an_unfinished_run_is_noted_with_where_it_goes_on(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, 64, 16, 32)  # all was trained, but the last checkpoint does not stand
    note_return(folder, STORAGE)
    note_return(folder, STORAGE)
    assert causes(folder) == ["jobs.train was started again, from the checkpoint at 0.032 kimg"] * 2


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, 16)
    note_return(folder, STORAGE)
    assert causes(folder) == ["jobs.train was started again, from the beginning: there was no checkpoint"]
