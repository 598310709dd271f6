"""How each picture is looked at: which square of it, turned how far, mirrored or not.

All of it is drawn by `randomness` (promise 3), so decoders hold no state and every worker draws the same.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.randomness import Purpose, crop_corners, flips, quarter_turns

# B pictures, H height, W width


@dataclass(frozen=True)
class Augmentation:
    """Which views are possible: what `data` says, resolved for one data set and one size."""

    height: int
    width: int
    """Of the stored pictures, in pixels."""
    size: int
    """Side of the square that is looked at; `height` and `width` where nothing is cropped."""
    crop: bool
    rotate: bool
    flip: bool

    def describe(self) -> str:
        """For a protocol: what of a picture counts as real, mirroring aside."""
        square = f"random {self.size} of {self.width}x{self.height}" if self.crop else "whole"
        return f"{square}, quarter turns" if self.rotate else square


@dataclass(frozen=True)
class Views:
    """One view for each picture of a batch; None where all are looked at alike."""

    corners_B2: np.ndarray | None = None
    """int32: (x, y) of the top left pixel of the square."""
    turns_B: np.ndarray | None = None
    """int64: quarter turns counter-clockwise, 0 .. 3; made before mirroring."""
    flips_B: np.ndarray | None = None
    """bool: mirrored left to right."""

    def part(self, rows: slice) -> "Views":
        """The views of some of the pictures."""
        return Views(*(None if one is None else one[rows] for one in (self.corners_B2, self.turns_B, self.flips_B)))

    @staticmethod
    def joined(parts: Sequence["Views"]) -> "Views":
        """Those of several batches of one stream, one after another."""
        columns = zip(*((one.corners_B2, one.turns_B, one.flips_B) for one in parts), strict=True)
        return Views(*(None if column[0] is None else np.concatenate(column) for column in columns))


def training_views(kind: Augmentation, seed: int, images_seen: int | Tensor, positions: Tensor) -> Views:
    """Views of the pictures at `positions` of the global batch that follows `images_seen` (int64 (B,) for several)."""
    return Views(
        _corners(kind, seed, Purpose.CROP, images_seen, positions) if kind.crop else None,
        quarter_turns(seed, Purpose.TURN, images_seen, positions).numpy() if kind.rotate else None,
        flips(seed, images_seen, positions).numpy() if kind.flip else None,
    )


def fixed_views(kind: Augmentation, indices: Tensor) -> Views:
    """One view for ever of each sample by its canonical index, unmirrored: what real pictures are measured in."""
    return Views(
        _corners(kind, 0, Purpose.REAL_CROP, 0, indices) if kind.crop else None,
        quarter_turns(0, Purpose.REAL_TURN, 0, indices).numpy() if kind.rotate else None,
    )


def _corners(
    kind: Augmentation, seed: int, purpose: Purpose, images_seen: int | Tensor, positions: Tensor
) -> np.ndarray:
    found = crop_corners(seed, purpose, images_seen, positions, kind.height, kind.width, kind.size)
    return found.numpy().astype(np.int32)


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on a GPU, in the order of its stream; from pageable memory it would wait for all that training queued."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def turned_(pictures_BHWC: Tensor, views: Views) -> Tensor:
    """Turns and mirrors a batch in place; all pictures are squares where any is turned."""
    if views.turns_B is not None:
        for count in (1, 2, 3):
            _move_(pictures_BHWC, views.turns_B == count, functools.partial(torch.rot90, k=count, dims=(1, 2)))
    if views.flips_B is not None:
        # In this layout torch's flip works on whole pixels, seven times as fast as on (B, H, W, C).
        _move_(pictures_BHWC, views.flips_B, lambda part: part.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1))
    return pictures_BHWC


def _move_(pictures: Tensor, chosen_B: np.ndarray, move: Callable[[Tensor], Tensor]) -> None:
    """Applies `move` to the chosen pictures: one by one on a CPU, where indexing copies slowly, else at once."""
    numbers = np.flatnonzero(chosen_B)
    if pictures.is_cuda:
        where = on_device(torch.from_numpy(numbers), pictures.device)
        pictures[where] = move(pictures[where])
        return
    for number in numbers.tolist():
        pictures[number : number + 1] = move(pictures[number : number + 1])
