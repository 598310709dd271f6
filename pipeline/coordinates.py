"""Every grid of coordinates that a generator is asked for.

Coordinates are in pixels of the generator's native grid, x first, from 0 to size - 1. int64 tensors name
pixels; float tensors may lie between them. P counts the points of a grid, row by row.
"""

import torch
from torch import Tensor


def full_grid(size: int, device: torch.device | str | None = None) -> Tensor:
    """All pixels of a size x size picture, row by row: int64 (size * size, 2)."""
    return _grid(torch.arange(size, device=device), torch.arange(size, device=device))


def patch_grid(corners_B2: Tensor, patch: int, stride: int) -> Tensor:
    """Patches of patch x patch pixels, `stride` apart, by their top left corners (x, y): int64 (B, P, 2)."""
    if corners_B2.ndim != 2 or corners_B2.shape[1] != 2 or corners_B2.dtype != torch.int64:
        raise ValueError(f"corners must be int64 (B, 2), got {corners_B2.dtype} {tuple(corners_B2.shape)}")
    steps = torch.arange(patch, device=corners_B2.device) * stride
    return corners_B2[:, None, :] + _grid(steps, steps)


def dense_grid(size: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """height x width points that span the native grid from corner to corner: float32 (height * width, 2).

    With height = width = size they are the pixels; with more, a picture is drawn denser than trained.
    """
    if size < 1 or height < 1 or width < 1:
        raise ValueError(f"size, height and width must be at least 1, got {size}, {height}, {width}")
    y = torch.linspace(0, size - 1, height, dtype=torch.float64, device=device)
    x = torch.linspace(0, size - 1, width, dtype=torch.float64, device=device)
    return _grid(x, y).to(torch.float32)


def sample_pixels(images_BHWC: Tensor, coordinates: Tensor) -> Tensor:
    """The pixels of pictures at int64 coordinates (P, 2) or (B, P, 2): (B, P, C), in the pictures' dtype.

    The same coordinates make the generator draw the same pixels, so real and synthesised patches match.
    """
    batch, height, width, _ = images_BHWC.shape
    check_pixels(coordinates, height, width)
    if coordinates.ndim == 3 and coordinates.shape[0] != batch:
        raise ValueError(f"{batch} pictures but coordinates for {coordinates.shape[0]}; pass one list a picture")
    x, y = coordinates.unbind(-1)
    index = y * width + x
    if index.ndim == 1:
        return images_BHWC.flatten(1, 2).index_select(1, index)
    rows = torch.arange(batch, device=index.device)[:, None]
    return images_BHWC.flatten(1, 2)[rows, index]


def normalised(coordinates: Tensor, size: int) -> Tensor:
    """Pixels to [-1, 1], corner to corner: the paper's x' = 2x / (W - 1) - 1. int64 gives float32."""
    dtype = coordinates.dtype if coordinates.dtype.is_floating_point else torch.float32
    return coordinates.to(dtype) * (2.0 / (size - 1)) - 1.0


def bilinear_neighbours(coordinates: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The four pixels (int64 (..., 2)) around each point and their bilinear weights (...), which sum to 1.

    Points outside the picture count as its border. At a pixel the first neighbour is that pixel, and its
    weight exactly 1.
    """
    inside = coordinates.clamp(0, size - 1)
    low = inside.floor()
    fraction = inside - low
    low = low.to(torch.int64)
    (x0, y0), (fx, fy) = low.unbind(-1), fraction.unbind(-1)
    x1, y1 = (x0 + 1).clamp(max=size - 1), (y0 + 1).clamp(max=size - 1)
    corners = [
        (x0, y0, (1 - fx) * (1 - fy)),
        (x1, y0, fx * (1 - fy)),
        (x0, y1, (1 - fx) * fy),
        (x1, y1, fx * fy),
    ]
    return [(torch.stack([x, y], dim=-1), weight) for x, y, weight in corners]


def check_pixels(coordinates: Tensor, height: int, width: int) -> None:
    """Raise ValueError unless these are int64 (..., P, 2) pixels of a height x width picture.

    The range is checked on the CPU only: elsewhere the check would wait for the device.
    """
    if coordinates.dtype != torch.int64 or coordinates.ndim not in (2, 3) or coordinates.shape[-1] != 2:
        raise ValueError(
            f"pixel coordinates must be int64 (P, 2) or (B, P, 2), x first, got {coordinates.dtype} "
            f"{tuple(coordinates.shape)}"
        )
    if coordinates.device.type != "cpu" or coordinates.numel() == 0 or torch.compiler.is_compiling():
        return
    low_x, low_y = coordinates.flatten(0, -2).amin(0).tolist()
    high_x, high_y = coordinates.flatten(0, -2).amax(0).tolist()
    if low_x < 0 or low_y < 0 or high_x >= width or high_y >= height:
        raise ValueError(
            f"coordinates must be pixels with 0 <= x < {width} and 0 <= y < {height}, "
            f"got x from {low_x} to {high_x} and y from {low_y} to {high_y}"
        )


def _grid(x: Tensor, y: Tensor) -> Tensor:
    """(height * width, 2) points (x, y), row by row."""
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1)
