import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.coordinates import (
    bilinear_neighbours,
    dense_grid,
    full_grid,
    normalised,
    patch_grid,
    sample_pixels,
)


def picture_of_places(batch: int, height: int, width: int) -> Tensor:
    """(B, H, W, 3) whose pixels hold (x, y, picture)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y, torch.zeros_like(x)], dim=-1).repeat(batch, 1, 1, 1)
    places[..., 2] = torch.arange(batch)[:, None, None]
    return places.to(torch.uint8)


def test_full_grid_is_row_major_with_x_first() -> None:
    grid = full_grid(3)
    assert grid.dtype == torch.int64
    assert grid.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 2], [1, 2], [2, 2]]


def test_full_grid_reads_a_picture_in_order() -> None:
    pictures = picture_of_places(2, 5, 5)
    assert torch.equal(sample_pixels(pictures, full_grid(5)), pictures.flatten(1, 2))


@settings(deadline=None, max_examples=40)
@given(patch=st.integers(1, 4), stride=st.integers(1, 3), data=st.data())
def test_patches_of_real_pictures_are_strided_slices(patch: int, stride: int, data: st.DataObject) -> None:
    size = 12
    corner = st.integers(0, size - (patch - 1) * stride - 1)
    corners = data.draw(st.lists(st.tuples(corner, corner), min_size=1, max_size=3))
    pictures = picture_of_places(len(corners), size, size)
    grid = patch_grid(torch.tensor(corners), patch, stride)
    pixels = sample_pixels(pictures, grid)
    assert grid.dtype == torch.int64 and pixels.dtype == torch.uint8
    assert torch.equal(pixels[..., :2].long(), grid)
    for index, (x, y) in enumerate(corners):
        span = (patch - 1) * stride + 1
        expected = pictures[index, y : y + span : stride, x : x + span : stride]
        assert torch.equal(pixels[index], expected.reshape(-1, 3))


def test_a_patch_as_large_as_the_picture_is_the_full_grid() -> None:
    grid = patch_grid(torch.zeros(2, 2, dtype=torch.int64), 8, 1)
    assert torch.equal(grid, full_grid(8).expand(2, -1, -1))


def test_dense_grid_spans_corner_to_corner() -> None:
    grid = dense_grid(8, 3, 5)
    assert grid.dtype == torch.float32 and grid.shape == (15, 2)
    assert grid[:5].tolist() == [[0, 0], [1.75, 0], [3.5, 0], [5.25, 0], [7, 0]]
    assert grid[-1].tolist() == [7, 7]
    assert dense_grid(8, 1, 1).tolist() == [[0, 0]]


@pytest.mark.parametrize("size", [8, 32, 256, 1024])
def test_dense_grid_at_native_size_is_the_pixels_exactly(size: int) -> None:
    assert torch.equal(dense_grid(size, size, size), full_grid(size).float())


def test_normalised_runs_from_minus_one_to_one() -> None:
    pixels = torch.tensor([[0, 255], [255, 0]])
    assert normalised(pixels, 256).tolist() == [[-1, 1], [1, -1]]
    torch.testing.assert_close(normalised(torch.tensor([[127.5, 51.0]]), 256), torch.tensor([[0.0, -0.6]]))


@settings(deadline=None, max_examples=60)
@given(x=st.floats(-3, 12, width=32), y=st.floats(-3, 12, width=32))
def test_bilinear_neighbours_reproduce_any_linear_function(x: float, y: float) -> None:
    neighbours = bilinear_neighbours(torch.tensor([[x, y]]), 10)
    weights = torch.stack([weight for _, weight in neighbours])
    pixels = torch.stack([pixel for pixel, _ in neighbours])
    assert pixels.min() >= 0 and pixels.max() <= 9 and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(1))
    expected = torch.tensor([[x, y]]).clamp(0, 9)
    torch.testing.assert_close((pixels * weights[..., None]).sum(0), expected, atol=1e-5, rtol=1e-6)


def test_bilinear_neighbours_at_a_pixel_are_that_pixel_alone() -> None:
    neighbours = bilinear_neighbours(full_grid(4).float(), 4)
    assert torch.equal(neighbours[0][0], full_grid(4))
    assert (neighbours[0][1] == 1.0).all()
    assert all((weight == 0.0).all() for _, weight in neighbours[1:])


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        (torch.tensor([[0, 5]]), "0 <= y < 5, got x from 0 to 0 and y from 5 to 5"),
        (torch.tensor([[-1, 0]]), "0 <= x < 4"),
        (torch.tensor([[4, 0]]), "0 <= x < 4"),
        (torch.tensor([[0.0, 1.0]]), "must be int64"),
        (torch.tensor([0, 1]), r"\(P, 2\) or \(B, P, 2\)"),
        (torch.zeros(3, 4, 2, dtype=torch.int64), "2 pictures but coordinates for 3"),
    ],
)
def test_coordinates_outside_the_picture_are_named(coordinates: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_pixels(torch.zeros(2, 5, 4, 3, dtype=torch.uint8), coordinates)


@pytest.mark.parametrize("corners", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2), torch.zeros(2).long()])
def test_bad_corners_are_named(corners: Tensor) -> None:
    with pytest.raises(ValueError, match=r"corners must be int64 \(B, 2\)"):
        patch_grid(corners, 4, 1)


def test_empty_dense_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        dense_grid(8, 0, 4)
