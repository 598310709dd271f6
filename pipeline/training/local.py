"""Training in one process without Ray, for a debugger, a profiler or a bare GPU machine.

Needs torch, numpy, pyarrow, fsspec, pillow, pydantic and safetensors only.
"""

from collections.abc import Sequence

import torch

from pipeline.training.loop import Evaluate, Outcome, Plan, train
from pipeline.training.observers import Observer, Printer
from pipeline.training.world import World


def local_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def train_here(plan: Plan, observers: Sequence[Observer] = (), evaluate: Evaluate | None = None) -> Outcome:
    """Trains in this process as the only worker, printing a status line a tick."""
    return train(plan, World(), local_device(), [Printer(), *observers], evaluate)
