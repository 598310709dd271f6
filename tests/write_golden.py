"""Golden losses: what a tiny training in float64 on the CPU comes to, update by update, as text in tests/golden.

    python -m tests.write_golden    writes the files anew (see their header for when that is right)

Pictures come from integer arithmetic, weights and losses are float64: no decoder, file or thread has a say. Only the
draws of latents and noise are float32, whose last bits are each processor's own.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.models.layers import ModulatedLinear
from pipeline.randomness import flips
from pipeline.training.state import TrainState, build_state
from pipeline.training.step import SCALARS, Updates
from pipeline.training.world import World
from tests.ddp import default_dtype, one_thread
from tests.small import SMALL_MODEL, small_train

FOLDER = Path(__file__).parent / "golden"
VARIANTS: dict[str, dict[str, Any]] = {"whole": {}, "patches": {"patch": {"size": 8, "strides": [1, 2]}}}
UPDATES, BATCH, SEED = 50, 8, 3
TOLERANCE = 1e-6
COLUMNS = (*SCALARS, "average/distance", "average/mean_w")
"""Losses and scores of an update, then what no loss sees: how far the averaged G is from G, and its mean style."""
HEADER = f"""\
# {UPDATES} updates of a tiny training in float64 on the CPU ({{name}}), held by tests/test_training_golden.py.
# Write anew with `python -m tests.write_golden`, and only in a commit that means to change the numerics of training,
# saying there why, and what it does to losses, memory and speed. A refactoring, a faster kernel, another machine,
# more workers or other sums must not need it: they differ by far less than {TOLERANCE:g}.
"""

Row = dict[str, float]


def record(updates: int = UPDATES, **changes: Any) -> list[Row]:
    """The columns of each update of a training whose settings `changes` are; R1's only where it was due."""
    train = small_train(**{"batch_size": BATCH, "r1_interval": 4} | changes)
    rows = []
    with default_dtype(torch.float64), one_thread():
        state = build_state(SMALL_MODEL, train, SEED, torch.device("cpu"))
        with torch.no_grad():
            for module in state.generator.modules():
                if isinstance(module, ModulatedLinear):
                    module.noise_strength.fill_(0.3)
        run = Updates(train, SMALL_MODEL, SEED, state, World(), torch.device("cpu"))
        for _ in range(updates):
            run(pictures(state.images_seen))
            rows.append(run.scalars() | average_columns(state))
    return rows


def average_columns(state: TrainState) -> Row:
    """Euclidean distance of the averaged G's parameters from G's, and the norm of the mean style."""
    pairs = zip(state.average.parameters(), state.generator.parameters(), strict=True)
    squares = sum(float((averaged - newest).detach().square().sum()) for averaged, newest in pairs)
    return {"average/distance": math.sqrt(squares), "average/mean_w": float(state.average.mean_w.norm())}


def pictures(images_seen: int) -> Tensor:
    """Smooth colour fields, half of them mirrored: uint8 (BATCH, 16, 16, 3)."""
    corner = torch.arange(BATCH * 5 * 5 * 3).reshape(BATCH, 5, 5, 3) + images_seen * 5 * 5 * 3
    corner = corner * 2654435761 & 0xFFFFFFFF
    corner = (corner ^ corner >> 15) * 2246822519 & 0xFFFFFFFF
    coarse = (corner ^ corner >> 13) >> 8 & 0xFF
    place = torch.arange(16)
    cell, part = place // 4, place % 4
    rows = coarse[:, cell] * (4 - part)[:, None, None] + coarse[:, cell + 1] * part[:, None, None]
    fields = (rows[:, :, cell] * (4 - part)[:, None] + rows[:, :, cell + 1] * part[:, None]) // 16
    mirrored = flips(SEED, images_seen, torch.arange(BATCH))
    return torch.where(mirrored[:, None, None, None], fields.flip(2), fields).to(torch.uint8)


def to_text(name: str, rows: list[Row]) -> str:
    """One line an update, 17 significant digits, a dash where R1 was not due."""
    lines = [" ".join(["update", *COLUMNS])]
    for number, row in enumerate(rows):
        lines.append(" ".join([str(number), *(f"{row[key]:.16e}" if key in row else "-" for key in COLUMNS)]))
    return HEADER.format(name=name) + "\n".join(lines) + "\n"


def from_text(text: str) -> list[Row]:
    """What `to_text` wrote."""
    names, *lines = [line.split() for line in text.splitlines() if not line.startswith("#")]
    return [
        {name: float(word) for name, word in zip(names[1:], words[1:], strict=True) if word != "-"} for words in lines
    ]


def first_difference(rows: list[Row], golden: list[Row], tolerance: float = TOLERANCE) -> str | None:
    """The first number that is not the golden one, in words; None where all agree."""
    for number, (row, expected) in enumerate(zip(rows, golden, strict=True)):
        if row.keys() != expected.keys():
            return f"update {number} has {sorted(row)}, the golden one {sorted(expected)}"
        for name in COLUMNS:
            if name in row and not math.isclose(row[name], expected[name], rel_tol=tolerance):
                return (
                    f"update {number}: {name} is {row[name]:.17g}, the golden one {expected[name]:.17g} "
                    f"({abs(row[name] / expected[name] - 1):.1e} apart, {tolerance:g} allowed)"
                )
    return None


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, changes in VARIANTS.items():
        path = FOLDER / f"{name}.txt"
        path.write_text(to_text(name, record(**changes)))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
