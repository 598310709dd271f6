"""Training in one process without Ray, for a debugger, a profiler or a bare GPU machine.

Needs torch, numpy, pyarrow, fsspec, pillow, pydantic, safetensors and tqdm only.
"""

from collections.abc import Sequence

import torch

from pipeline.training.live import Display
from pipeline.training.loop import Evaluate, Outcome, Plan, train
from pipeline.training.observers import Observer
from pipeline.training.world import World


def local_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def train_here(plan: Plan, observers: Sequence[Observer] = (), evaluate: Evaluate | None = None) -> Outcome:
    """Trains in this process as the only worker, showing a live line, or a plain one a tick."""
    with Display("the first tick: reading the data, the first batches") as display:
        return train(plan, World(), local_device(), [display, *observers], evaluate)
