"""The training loop, the same in one process and in every worker of a cluster.

Images seen is the only clock (promise 1): ticks, checkpoints and evaluations fall on counts of images.
"""

import contextlib
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.stream import DataConfig, DataStream, augmentation, read_images
from pipeline.models.build import ModelConfig
from pipeline.models.cips import Generator
from pipeline.models.sampling import sample_sheet
from pipeline.pictures import tile
from pipeline.storage import StorageConfig, patiently
from pipeline.training.checkpoint import (
    CheckpointInfo,
    check_same_training,
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    read_info,
)
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.observers import Observer, RunFolder, Tick
from pipeline.training.saving import Saving
from pipeline.training.settings import TrainConfig
from pipeline.training.state import TrainState, build_state
from pipeline.training.step import Updates
from pipeline.training.world import World

Evaluate = Callable[[Generator, int], dict[str, Any]]
"""Measures the averaged generator at a count of images; all workers call it together and get the same result."""


class PlanError(ValueError):
    """The plan does not fit this process."""


class TrainingDiverged(RuntimeError):
    """A loss became infinite or not a number."""


@dataclass(frozen=True)
class Plan:
    """All that a training is: plain data, the same for every worker."""

    folder: str
    """<run.dir>/<run.name>, local or s3://."""
    seed: int
    train: TrainConfig
    model: ModelConfig
    data: DataConfig
    storage: StorageConfig
    resolved: dict[str, Any]
    """The whole configuration, for the checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """What a training came to."""

    images_seen: int
    checkpoint: str
    """Folder of the last checkpoint."""
    seconds: float
    """Time in the loop of this process, evaluations and checkpoints included."""
    resumed_from: int
    results: list[dict[str, Any]]
    """The last distances, each with its protocol; empty if none was asked for."""


def train(
    plan: Plan,
    world: World,
    device: torch.device,
    observers: Sequence[Observer] = (),
    evaluate: Evaluate | None = None,
    leaving: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains from the latest checkpoint in the run's folder, or from nothing, to `train.total_kimg`.

    Args:
        observers: told by rank 0 what happens.
        evaluate: called where `train.evaluate_kimg` asks for it.
        leaving: whether a machine of this training will be taken away; rank 0 asks after each update.

    Raises:
        DataError: the data set is not finished or damaged, or its pictures do not fit the model's size.
        CheckpointError: the folder holds another training.
        TrainingDiverged: a loss is not finite.
    """
    if plan.train.evaluate_kimg is not None and evaluate is None:
        raise PlanError("train.evaluate_kimg is set, but this process was given nothing to evaluate with")
    manifest = patiently(lambda: read_manifest(plan.data.uri, plan.storage), "reading the data set", plan.storage)
    augmentation(manifest, plan.data, plan.model.size)
    state = build_state(plan.model, plan.train, plan.seed, device)
    resumed = resume(plan, state, manifest.digest, world)
    return _Loop(plan, world, device, list(observers), evaluate, manifest, state, leaving).run(resumed)


def check_plan(plan: Plan) -> None:
    """Refuses, before anything is started or written, what the first step of training would refuse.

    Raises:
        DataError, CheckpointError: no finished data set, another size, another training in the folder.
    """
    manifest = read_manifest(plan.data.uri, plan.storage)
    augmentation(manifest, plan.data, plan.model.size)  # refuses pictures of another size
    for images_seen in list_checkpoints(plan.folder, plan.storage)[-1:]:
        folder = checkpoint_folder(plan.folder, images_seen)
        check_same_training(read_info(folder, plan.storage), plan.resolved, manifest.digest, folder)


def resume(plan: Plan, state: TrainState, digest: str, world: World) -> CheckpointInfo | None:
    """Loads the latest complete checkpoint; returns what its index says, None where there is none."""
    storage, latest = plan.storage, -1
    if world.rank == 0:
        found = patiently(lambda: list_checkpoints(plan.folder, storage), "looking for checkpoints", storage)
        latest = max(found, default=-1)
    latest = world.agree(latest)  # workers may see a bucket at different moments
    if latest < 0:
        return None
    folder = checkpoint_folder(plan.folder, latest)
    info = patiently(lambda: read_info(folder, storage), "reading a checkpoint", storage)
    check_same_training(info, plan.resolved, digest, folder)
    patiently(lambda: load_checkpoint(folder, state, info, storage), "reading a checkpoint", storage)
    return info


class _Loop:
    """The loop's few variables, so that each step of it is a short function."""

    def __init__(
        self,
        plan: Plan,
        world: World,
        device: torch.device,
        observers: list[Observer],
        evaluate: Evaluate | None,
        manifest: Manifest,
        state: TrainState,
        leaving: Callable[[], bool],
    ) -> None:
        self.plan, self.world, self.device, self.evaluate = plan, world, device, evaluate
        self.manifest, self.state = manifest, state
        self.updates = Updates(plan.train, plan.model, plan.seed, state, world, device)
        folder, storage = plan.folder, plan.storage
        self.log: list[dict[str, Any]] = []
        self.observers: list[Observer] = []
        before: Callable[[], None] | None = None
        if world.rank == 0:
            kept = patiently(lambda: RunFolder(folder, storage, state.images_seen), "reading the log", storage)
            self.log, self.observers = kept.lines, [*observers, kept]
            before = kept.write_log  # so that no checkpoint stands before the log up to it
        # Only rank 0 writes.
        writer = CheckpointWriter(folder, plan.resolved, manifest.digest, plan.train.keep_checkpoints, storage, before)
        self.saving = Saving(writer, self.observers, storage.total_timeout_s)
        self.leaving, self.noticed = leaving, False
        self.results: list[dict[str, Any]] = []
        self.began = self.tick_time = time.perf_counter()
        self.tick_images, self.tick_wait, self.tick_replaced = state.images_seen, 0.0, 0
        self.tick_pause = 0.0

    def run(self, resumed: CheckpointInfo | None) -> Outcome:
        plan, state = self.plan, self.state
        total = plan.train.total_images
        with contextlib.ExitStack() as stack:
            for observer in self.observers:
                stack.callback(observer.close)
            stack.callback(self.saving.leave)
            stream = stack.enter_context(self._stream())
            if resumed is None:
                self._show_reals()
                self._boundary(stream)
            else:
                for observer in self.observers:
                    observer.resumed(resumed.images_seen, self.log)
                    # Told again: the process that wrote it may have died before it could tell.
                    observer.checkpoint(
                        checkpoint_folder(plan.folder, resumed.images_seen), resumed.images_seen, resumed.results
                    )
            while state.images_seen < total:
                self.updates(next(stream))
                heard = self._hears_notice()
                if self._due(plan.train.tick_kimg, plan.train.checkpoint_kimg, plan.train.evaluate_kimg):
                    self._boundary(stream)
                elif heard and self._finite():
                    self.tick_pause += self.saving.begin(state, [])
            self.saving.finish(state, self.results if plan.train.evaluate_kimg is not None else [], self.world)
        return Outcome(
            state.images_seen,
            checkpoint_folder(plan.folder, state.images_seen),
            time.perf_counter() - self.began,
            resumed.images_seen if resumed else 0,
            resumed.results if resumed and resumed.images_seen == state.images_seen else self.results,
        )

    def _stream(self) -> DataStream:
        plan = self.plan
        return DataStream(
            self.manifest,
            plan.data,
            plan.storage,
            seed=plan.seed,
            batch_size=plan.train.batch_size,
            positions=self.updates.share,
            images_seen=self.state.images_seen,
            size=plan.model.size,
            device=self.device,
        )

    def _due(self, *periods_kimg: float | None) -> bool:
        """Whether one of the periods, or the training, ends here."""
        seen, train = self.state.images_seen, self.plan.train
        periods = [train.period(kimg) for kimg in periods_kimg if kimg is not None]
        return seen >= train.total_images or any(seen % period == 0 for period in periods)

    def _boundary(self, stream: DataStream) -> None:
        """Looks at the losses, then evaluates, tells and saves, as far as each is due here."""
        train, seen = self.plan.train, self.state.images_seen
        scalars = self.updates.scalars() | self._replaced(stream)
        if not all(math.isfinite(value) for value in scalars.values()):
            raise TrainingDiverged(self._divergence(scalars))
        evaluated = train.evaluate_kimg is not None and self._due(train.evaluate_kimg)
        if evaluated and self.evaluate is not None:
            self.results = [self.evaluate(self.state.average, seen)]
        results = self.results if evaluated else []
        if self.world.rank == 0:
            self.saving.look()
            # Told before it is saved: once a checkpoint stands, nothing before it will be told again.
            self._tell(stream, scalars, results)
        self.tick_time, self.tick_images, self.tick_wait = time.perf_counter(), seen, stream.wait_seconds
        self.tick_pause = 0.0
        unsaved = self.saving.unsaved or (self.noticed and not self.saving.writer.busy)
        if self.world.rank == 0 and (unsaved or self._due(train.checkpoint_kimg)):
            self.tick_pause = self.saving.begin(self.state, results)

    def _hears_notice(self) -> bool:
        """Whether rank 0 hears just now that a machine goes away: a checkpoint is due, and one at each tick."""
        if self.noticed or self.world.rank != 0 or not self.leaving():
            return False
        print("a node of this run will be taken away: a checkpoint now, and at each tick from here on", flush=True)
        self.noticed = self.saving.unsaved = True
        return True

    def _finite(self) -> bool:
        """Whether training has not diverged since the losses were looked at: that is not worth a checkpoint."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.state.generator.parameters())

    def _replaced(self, stream: DataStream) -> dict[str, float]:
        """How many pictures since the last tick stood in for damaged ones, over all workers; a collective call."""
        if self.plan.data.on_corrupt != "skip":
            return {}
        replaced = stream.replaced
        since, self.tick_replaced = replaced - self.tick_replaced, replaced
        return {"data/replaced": self.world.sum_(torch.tensor([float(since)], device=self.device)).item()}

    def _tell(self, stream: DataStream, scalars: dict[str, float], results: list[dict[str, Any]]) -> None:
        plan, seen = self.plan, self.state.images_seen
        columns, rows = plan.train.grid
        with self.updates.autocast():
            sheet = sample_sheet(self.state.average, columns, rows, seed=plan.seed)
        elapsed = time.perf_counter() - self.tick_time
        tick = Tick(
            images_seen=seen,
            total_images=plan.train.total_images,
            seconds=time.perf_counter() - self.began,
            images_per_second=(seen - self.tick_images) / elapsed,
            wait_share=(stream.wait_seconds - self.tick_wait) / elapsed,
            memory_gb=peak_memory_gb(self.device),
            scalars=scalars,
            results=results,
            checkpoint_seconds=self.tick_pause,
            time=time.time(),
        )
        for observer in self.observers:
            observer.tick(tick)
            observer.sheet("samples", seen, sheet)

    def _show_reals(self) -> None:
        columns, rows = self.plan.train.grid
        if self.world.rank == 0:
            count = min(columns * rows, self.manifest.samples)
            chosen = np.linspace(0, self.manifest.samples - 1, count).astype(np.int64)
            size = self.plan.model.size
            batches = read_images(self.manifest, self.plan.data, self.plan.storage, chosen, count, size)
            sheet = tile(np.concatenate([batch.cpu().numpy() for batch in batches]), columns)
            for observer in self.observers:
                observer.sheet("reals", 0, sheet)

    def _divergence(self, scalars: dict[str, float]) -> str:
        bad = ", ".join(f"{name}={value}" for name, value in scalars.items() if not math.isfinite(value))
        self.saving.leave()
        saved = list_checkpoints(self.plan.folder, self.plan.storage)
        good = (
            f"the last good checkpoint is {checkpoint_folder(self.plan.folder, saved[-1])}"
            if saved
            else ("there is no checkpoint yet")
        )
        return (
            f"the losses are not finite between {self.tick_images} and {self.state.images_seen} images ({bad}); "
            f"{good}. Try a larger train.r1_gamma, a smaller train.learning_rate or train.precision=fp32"
        )


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of the device (CUDA) or of this process (CPU), in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
