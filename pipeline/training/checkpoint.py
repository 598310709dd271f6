"""Checkpoints in a run's folder: written whole or not at all, checked when read (promise 5).

<run>/checkpoints/0000128000/generator.safetensors   the averaged generator: what one uses and registers
                             training.safetensors    the rest of `TrainState`
                             checkpoint.json         last: sizes, hashes, config, data set, distances
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pipeline.data.stream import DataConfig
from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.cips import Generator
from pipeline.schema import Section
from pipeline.storage import (
    MissingError,
    StorageConfig,
    StorageError,
    delete,
    join,
    list_names,
    read_bytes,
    write_bytes,
)
from pipeline.training.settings import TrainConfig
from pipeline.training.snapshot import Snapshot
from pipeline.training.state import TrainState, select

GENERATOR, TRAINING, INDEX = "generator.safetensors", "training.safetensors", "checkpoint.json"
AVERAGE = "average."  # the prefix of the averaged generator in TrainState.tensors()

# Keys that may change between a run and its continuation: they move no gradient.
FREE_KEYS = frozenset(
    {
        "data.uri",  # the digest says whether it is the same data
        "data.read_ahead",
        "data.threads",
        "data.cache_bytes",
        "data.cache_dir",
        "data.on_corrupt",
        "model.max_pixels_in_flight",
        "train.total_kimg",
        "train.accumulation",
        "train.recompute",
        "train.cuda_graphs",
        "train.tick_kimg",
        "train.checkpoint_kimg",
        "train.keep_checkpoints",
        "train.evaluate_kimg",
        "train.grid",
    }
)
DECIDING = ("run.seed", "data.", "model.", "train.")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another training."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What `checkpoint.json` says."""

    images_seen: int
    config: dict[str, Any]
    """The whole resolved configuration, nested."""
    dataset_digest: str
    results: list[dict[str, Any]] = field(default_factory=list)
    """Distances measured at this point, each with its protocol."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Bytes and sha256 of each file beside it."""
    torch_version: str = torch.__version__


def checkpoints_folder(run_folder: str) -> str:
    return join(run_folder, "checkpoints")


def checkpoint_folder(run_folder: str, images_seen: int) -> str:
    return join(checkpoints_folder(run_folder), f"{images_seen:010d}")


def files_of(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """The state's tensors by the file that holds them, without copies."""
    tensors = state.tensors()
    rest = {name: value for name, value in tensors.items() if not name.startswith(AVERAGE)}
    return {GENERATOR: select(tensors, AVERAGE), TRAINING: rest}


def write_checkpoint(
    run_folder: str,
    images_seen: int,
    contents: Mapping[str, bytes | memoryview],
    *,
    config: dict[str, Any],
    dataset_digest: str,
    results: list[dict[str, Any]],
    storage: StorageConfig,
) -> CheckpointInfo:
    """Writes the files of a state (`Snapshot.take`) under its count of images; `checkpoint.json` is the commit."""
    folder = checkpoint_folder(run_folder, images_seen)
    files = {}
    for name, content in contents.items():
        write_bytes(join(folder, name), content, storage)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    info = CheckpointInfo(images_seen, config, dataset_digest, results, files)
    write_bytes(join(folder, INDEX), json.dumps(asdict(info), indent=1).encode(), storage)
    return info


def save_checkpoint(
    run_folder: str,
    state: TrainState,
    *,
    config: dict[str, Any],
    dataset_digest: str,
    results: list[dict[str, Any]],
    storage: StorageConfig,
) -> CheckpointInfo:
    """Writes the state and returns when it stands; training has `CheckpointWriter`, which does not stop it."""
    return write_checkpoint(
        run_folder,
        state.images_seen,
        Snapshot().take(files_of(state)),
        config=config,
        dataset_digest=dataset_digest,
        results=results,
        storage=storage,
    )


def list_checkpoints(run_folder: str, storage: StorageConfig) -> list[int]:
    """Images seen of every complete checkpoint, ascending."""
    return [images_seen for images_seen, complete in _folders(run_folder, storage).items() if complete]


def _folders(run_folder: str, storage: StorageConfig) -> dict[int, bool]:
    """Images seen of every checkpoint's folder, ascending, and whether the checkpoint is complete."""
    folder = checkpoints_folder(run_folder)
    found = sorted(int(name) for name in list_names(folder, storage) if name.isdigit())
    return {number: INDEX in list_names(checkpoint_folder(run_folder, number), storage) for number in found}


def read_info(folder: str, storage: StorageConfig) -> CheckpointInfo:
    """Reads `checkpoint.json` of a checkpoint's folder."""
    try:
        return CheckpointInfo(**json.loads(read_bytes(join(folder, INDEX), storage)))
    except MissingError:
        raise CheckpointError(f"no complete checkpoint at {folder}: it has no {INDEX}") from None
    except (ValueError, TypeError) as cause:
        raise CheckpointError(
            f"{join(folder, INDEX)} is damaged ({cause}); delete {folder} to go on without it"
        ) from cause


def read_tensors(folder: str, name: str, info: CheckpointInfo, storage: StorageConfig) -> dict[str, Tensor]:
    """Reads one file of a checkpoint and checks it against its hash."""
    path = join(folder, name)
    try:
        data = read_bytes(path, storage)
    except MissingError as cause:
        raise CheckpointError(f"{path} is missing; delete {folder} to go on from an earlier checkpoint") from cause
    if hashlib.sha256(data).hexdigest() != info.files[name]["sha256"]:
        expected = info.files[name]["bytes"]
        raise CheckpointError(
            f"{path} is damaged ({len(data)} bytes, {expected} written); "
            f"delete {folder} to go on from an earlier checkpoint"
        )
    return safetensors.torch.load(data)


def load_checkpoint(folder: str, state: TrainState, info: CheckpointInfo, storage: StorageConfig) -> None:
    """Puts a checkpoint's tensors into the state."""
    average = read_tensors(folder, GENERATOR, info, storage)
    rest = read_tensors(folder, TRAINING, info, storage)
    state.load(rest | {AVERAGE + name: value for name, value in average.items()}, info.images_seen)


def find_best(run_folder: str, storage: StorageConfig) -> int | None:
    """Images seen of the checkpoint with the lowest distance, under the protocol of the last one that was measured.

    None where no checkpoint was measured.
    """
    measured = []
    for images_seen in list_checkpoints(run_folder, storage):
        with contextlib.suppress(CheckpointError):  # an old one that is damaged has no say
            info = read_info(checkpoint_folder(run_folder, images_seen), storage)
            measured += [(result["protocol"], result["value"], images_seen) for result in info.results]
    scored = [(value, images_seen) for protocol, value, images_seen in measured if protocol == measured[-1][0]]
    return min(scored)[1] if scored else None


def prune_checkpoints(run_folder: str, keep: int, best: int | None, storage: StorageConfig) -> None:
    """Deletes all but the last `keep` checkpoints and the best one; a failure only leaves more of them."""
    try:
        for images_seen in list_checkpoints(run_folder, storage)[:-keep]:
            if images_seen != best:
                folder = checkpoint_folder(run_folder, images_seen)
                # First the index: a half-deleted checkpoint must not look complete.
                delete(join(folder, INDEX), storage)
                delete(folder, storage)
    except StorageError as cause:
        print(f"could not delete an old checkpoint: {cause}", flush=True)


def delete_unfinished(run_folder: str, up_to: int, storage: StorageConfig) -> None:
    """Deletes what failed checkpoints left, up to a count of images; a failure only leaves it there."""
    try:
        for images_seen, complete in _folders(run_folder, storage).items():
            if not complete and images_seen <= up_to:
                delete(checkpoint_folder(run_folder, images_seen), storage)
    except StorageError as cause:
        print(f"could not delete what a failed checkpoint left: {cause}", flush=True)


def check_same_training(info: CheckpointInfo, config: dict[str, Any], dataset_digest: str, folder: str) -> None:
    """Refuses to go on with another data set or with another value of any key that moves a gradient.

    Raises:
        CheckpointError: naming each differing key with both values.
    """
    if info.dataset_digest != dataset_digest:
        raise CheckpointError(
            f"{folder} was trained on the data set {info.dataset_digest[:12]}, but data.uri holds "
            f"{dataset_digest[:12]}; use the same data, or another run.name to start anew"
        )
    saved, wanted = flat(with_defaults(info.config)), flat(config)
    differing = [
        f"{key}: {saved.get(key)!r} in the checkpoint, {wanted.get(key)!r} now"
        for key in sorted(saved.keys() | wanted.keys())
        if key.startswith(DECIDING) and key not in FREE_KEYS and saved.get(key) != wanted.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{folder} was trained with another configuration; take its values, or another run.name to start anew\n  "
            + "\n  ".join(differing)
        )


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the defaults of keys that are younger than it."""
    sections: dict[str, type[Section]] = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig}
    filled = {
        name: section.model_validate(config[name]).model_dump(mode="json")
        for name, section in sections.items()
        if name in config
    }
    return config | filled


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} to {'a.b': 1}; lists stay values."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def load_average(folder: str, storage: StorageConfig) -> Generator:
    """The averaged generator of a checkpoint, on the CPU, ready to draw."""
    info = read_info(folder, storage)
    generator = build_generator(ModelConfig.model_validate(info.config["model"]))
    generator.load_state_dict(read_tensors(folder, GENERATOR, info, storage))
    return generator.eval().requires_grad_(False)
