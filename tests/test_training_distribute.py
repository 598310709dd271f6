"""How gradients of several workers are summed: DDP's settings, and the layout of its buckets."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.benchmark.team import run_team
from pipeline.training.distribute import distribute, synchronise
from pipeline.training.state import build_state
from pipeline.training.step import Updates
from pipeline.training.world import World
from tests.small import SMALL_MODEL, small_train
from tests.test_training_step import CPU, pictures


def test_one_worker_is_not_wrapped() -> None:
    module = torch.nn.Linear(2, 2)
    assert distribute(module, World(), CPU, lambda wrapped: torch.zeros(1)) is module
    with synchronise(module, last=False):
        pass


def observed(folder: Path, world: World, device: torch.device) -> dict[str, Any]:
    """Which parameters lay in which bucket, in which order, at each sum of three updates."""
    settings = small_train(batch_size=16, r1_interval=3, accumulation=2)
    run = Updates(settings, SMALL_MODEL, 3, build_state(SMALL_MODEL, settings, 3, device), world, device)
    moments = len(run.state.optimizer_generator.state)
    sums: dict[str, list[list[str]]] = {"generator": [], "discriminator": []}
    for kind, module in (("generator", run.generator), ("discriminator", run.discriminator)):
        assert isinstance(module, DistributedDataParallel)
        names = {id(parameter): name for name, parameter in module.named_parameters()}

        def hook(seen: tuple[str, dict[int, str]], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            sums[seen[0]].append([seen[1][id(parameter)] for parameter in bucket.parameters()])
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]

        module.register_comm_hook((kind, names), hook)
    for number in range(3):
        run(pictures(16, seed=number)[run.share.start : run.share.stop])
    parameter = run.state.generator.first.weight
    assert parameter.grad is not None
    return {"moments": moments, "sums": sums, "view": parameter.grad._is_view()}


def test_the_layout_is_final_from_the_first_update_on(tmp_path: Path) -> None:
    for found in run_team(observed, tmp_path, size=2):
        assert found["moments"] == 0  # the rehearsal moves nothing
        assert found["view"]
        assert len(found["sums"]["generator"]) == 3 and len(found["sums"]["discriminator"]) == 4  # with R1's
        for layouts in found["sums"].values():
            assert all(layout == layouts[0] for layout in layouts)
            assert layouts[0][0] != "module.mapping.layers.0.weight"  # as gradients come, not as parameters stand
