"""Numbers to pictures and back."""

import io

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.pictures import encode_png, tile, to_float, to_uint8


def test_every_byte_survives_the_way_there_and_back() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    floats = to_float(bytes_)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), bytes_)


def test_values_beyond_the_range_are_clamped() -> None:
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_each_picture_stands_in_its_cell(count: int, columns: int, side: int) -> None:
    images = np.stack([np.full((side, side, 3), number, np.uint8) for number in range(count)])
    sheet = tile(images, columns)
    rows = -(-count // columns)
    assert sheet.shape == (rows * (side + 1) - 1, columns * (side + 1) - 1, 3)
    for number in range(count):
        top, left = number // columns * (side + 1), number % columns * (side + 1)
        assert (sheet[top : top + side, left : left + side] == number).all()
    if count % columns:
        assert (sheet[-side:, -side:] == 255).all()


def test_png_round_trip_and_scale() -> None:
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    decoded = np.asarray(Image.open(io.BytesIO(encode_png(image))))
    assert np.array_equal(decoded, image)
    with Image.open(io.BytesIO(encode_png(image, scale=4))) as large:
        assert large.size == (12, 8)
        assert np.array_equal(np.asarray(large)[::4, ::4], image)
