"""Which checkpoint becomes the registered model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_config
from pipeline.storage import StorageConfig
from pipeline.tracking.recording import best_checkpoint
from pipeline.training.checkpoint import CheckpointError, save_checkpoint
from pipeline.training.state import build_state
from tests.small import SMALL_MODEL, small_train


def results(value: float, images: int = 10) -> list[dict[str, Any]]:
    return [{"metric": "fid", "value": value, "protocol": {"images": images}}]


def save(run: Path, images_seen: int, measured: list[dict[str, Any]]) -> None:
    state = build_state(SMALL_MODEL, small_train(), 0, torch.device("cpu"))
    state.images_seen = images_seen
    save_checkpoint(str(run), state, config={}, dataset_digest="d", results=measured, storage=StorageConfig())


def test_the_smallest_distance_under_the_last_protocol_wins(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "run.name=run"])
    with pytest.raises(CheckpointError, match="holds no checkpoint to register"):
        best_checkpoint(config)
    save(tmp_path / "run", 8, results(1.0, images=99))  # another protocol: not comparable
    save(tmp_path / "run", 16, results(5.0))
    save(tmp_path / "run", 24, results(7.0))
    assert best_checkpoint(config)[0] == 16


def test_without_distances_the_last_is_taken(tmp_path: Path) -> None:
    config = load_config(None, [f"run.dir={tmp_path}", "run.name=run"])
    save(tmp_path / "run", 8, [])
    save(tmp_path / "run", 16, [])
    assert best_checkpoint(config)[0] == 16
