"""Checkpoints: whole or not at all, damage named, another training refused."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.data.stream import DataConfig
from pipeline.storage import StorageConfig
from pipeline.training.checkpoint import (
    CheckpointError,
    check_same_training,
    checkpoint_folder,
    delete_unfinished,
    find_best,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_info,
    save_checkpoint,
)
from pipeline.training.state import TrainState, build_state
from tests.small import SMALL_MODEL, small_train

STORAGE = StorageConfig()
CONFIG = {
    "run": {"seed": 3},
    "train": small_train().model_dump(mode="json"),
    "data": DataConfig(uri="here").model_dump(mode="json"),
}


def a_state(seed: int = 0, images_seen: int = 8) -> TrainState:
    state = build_state(SMALL_MODEL, small_train(), seed, torch.device("cpu"))
    for parameter in state.generator.parameters():
        parameter.grad = torch.ones_like(parameter)
    for parameter in state.discriminator.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer_generator.step()
    state.optimizer_discriminator.step()
    state.images_seen = images_seen
    return state


def save(run: str, state: TrainState) -> str:
    results = [{"metric": "fid", "value": 9.0, "protocol": {}}]
    save_checkpoint(run, state, config=CONFIG, dataset_digest="abc", results=results, storage=STORAGE)
    return checkpoint_folder(run, state.images_seen)


def test_round_trip(tmp_path: Path) -> None:
    state = a_state()
    folder = save(str(tmp_path), state)
    other = a_state(seed=1, images_seen=0)
    info = read_info(folder, STORAGE)
    load_checkpoint(folder, other, info, STORAGE)
    assert (other.images_seen, info.config, info.dataset_digest) == (8, CONFIG, "abc")
    assert info.results[0]["value"] == 9.0
    for name, value in state.tensors().items():
        assert torch.equal(value, other.tensors()[name]), name


def test_without_its_index_a_checkpoint_does_not_exist(tmp_path: Path) -> None:
    save(str(tmp_path), a_state(images_seen=8))
    folder = save(str(tmp_path), a_state(images_seen=16))
    (Path(folder) / "checkpoint.json").unlink()
    assert list_checkpoints(str(tmp_path), STORAGE) == [8]
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        read_info(folder, STORAGE)


@pytest.mark.parametrize("name", ["generator.safetensors", "training.safetensors"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    folder = save(str(tmp_path), a_state())
    path = Path(folder) / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=f"{name} is damaged .* delete"):
        load_checkpoint(folder, a_state(), read_info(folder, STORAGE), STORAGE)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_checkpoint(folder, a_state(), read_info(folder, STORAGE), STORAGE)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    folder = save(str(tmp_path), a_state())
    (Path(folder) / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="checkpoint.json is damaged"):
        read_info(folder, STORAGE)


def test_pruning_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for images_seen in (8, 16, 24, 32):
        save(str(tmp_path), a_state(images_seen=images_seen))
    prune_checkpoints(str(tmp_path), keep=2, best=8, storage=STORAGE)
    assert list_checkpoints(str(tmp_path), STORAGE) == [8, 24, 32]
    assert not Path(checkpoint_folder(str(tmp_path), 16)).exists()


def test_the_best_is_found_under_the_last_protocol(tmp_path: Path) -> None:
    run, old, new = str(tmp_path), {"images": 10}, {"images": 20}
    assert find_best(run, STORAGE) is None
    measured: dict[int, list[tuple[dict[str, int], float]]] = {
        8: [(old, 1.0)],
        16: [(new, 5.0)],
        24: [(old, 0.5), (new, 4.0)],
        32: [(new, 6.0)],
        40: [],
    }
    for images_seen, values in measured.items():
        results = [{"metric": "fid", "value": value, "protocol": protocol} for protocol, value in values]
        state = a_state(images_seen=images_seen)
        save_checkpoint(run, state, config=CONFIG, dataset_digest="abc", results=results, storage=STORAGE)
    assert find_best(run, STORAGE) == 24
    (Path(checkpoint_folder(run, 24)) / "checkpoint.json").write_text("{")  # damaged: it has no say
    assert find_best(run, STORAGE) == 16


def test_another_training_is_refused_with_the_keys_named(tmp_path: Path) -> None:
    info = read_info(save(str(tmp_path), a_state()), STORAGE)
    check_same_training(info, CONFIG, "abc", "here")
    changed = json.loads(json.dumps(CONFIG))
    changed["train"]["patch"]["size"] = 16
    changed["run"]["seed"] = 4
    with pytest.raises(CheckpointError) as refusal:
        check_same_training(info, changed, "abc", "here")
    assert "train.patch.size: None in the checkpoint, 16 now" in str(refusal.value)
    assert "run.seed: 3 in the checkpoint, 4 now" in str(refusal.value)
    assert "batch_size" not in str(refusal.value)
    with pytest.raises(CheckpointError, match="trained on the data set abc"):
        check_same_training(info, CONFIG, "other", "here")


def test_a_moved_data_set_and_a_longer_training_are_the_same_training(tmp_path: Path) -> None:
    info = read_info(save(str(tmp_path), a_state()), STORAGE)
    moved = json.loads(json.dumps(CONFIG))
    moved["data"]["uri"] = "s3://elsewhere"
    moved["train"]["total_kimg"] = 100
    moved["train"]["recompute"] = "segment"  # what a run that ran out of memory is started again with
    check_same_training(info, moved, "abc", "here")


def test_what_failed_checkpoints_left_is_deleted_up_to_a_count(tmp_path: Path) -> None:
    for images_seen in (8, 16, 24, 32):
        save(str(tmp_path), a_state(images_seen=images_seen))
    for images_seen in (8, 24):
        (Path(checkpoint_folder(str(tmp_path), images_seen)) / "checkpoint.json").unlink()
    delete_unfinished(str(tmp_path), 16, STORAGE)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["0000000016", "0000000024", "0000000032"]
    assert list_checkpoints(str(tmp_path), STORAGE) == [16, 32]
