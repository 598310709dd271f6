import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from pipeline.data.picture import (
    PictureError,
    any_size,
    deviation,
    encode,
    fit,
    fit_bytes,
    open_rgb,
    tile_corners,
    upright_size,
)
from tests.pictures import encoded, land, pixels


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def kept(data: bytes, size: int = 16) -> bytes:
    return fit_bytes(data, size, "keep", 95, "lanczos", False)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
        ("JPEG", {"quality": 80, "subsampling": "4:2:0"}),
        ("WEBP", {"quality": 80}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_plain_pictures_are_kept_byte_for_byte(kind: str, options: dict[str, Any]) -> None:
    data = encoded(1, 16, kind, **options)
    assert kept(data) == data


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(land(0, 16), "JPEG", exif=exif)


def deep() -> bytes:
    """A 16-bit RGB PNG, by hand: Pillow does not write them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(range(96)) for _ in range(16))
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


ODD = {
    "grey": lambda: saved(land(0, 16).convert("L"), "PNG"),
    "palette": lambda: saved(land(0, 16).convert("P"), "PNG"),
    "alpha": lambda: saved(land(0, 16).convert("RGBA"), "PNG"),
    "transparent colour": lambda: saved(land(0, 16), "PNG", transparency=(1, 2, 3)),
    "16 bits": deep,
    "cmyk": lambda: saved(land(0, 16).convert("CMYK"), "JPEG"),
    "progressive": lambda: saved(land(0, 16), "JPEG", progressive=True),
    "turned by EXIF": turned,
    "animated": lambda: saved(land(0, 16), "WEBP", save_all=True, append_images=[land(1, 16)], lossless=True),
    "several in one file": lambda: saved(land(0, 16), "MPO", save_all=True, append_images=[land(1, 16)]),
    "other size": lambda: encoded(0, 20),
}


@pytest.mark.parametrize("oddity", ODD)
def test_odd_pictures_become_plain_png(oddity: str) -> None:
    data = ODD[oddity]()
    assert open_rgb(data)[1] is (oddity == "other size")
    result = kept(data)
    with Image.open(io.BytesIO(result)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (16, 16))
    assert kept(result) == result


def test_exif_orientation_is_applied() -> None:
    upright = np.asarray(Image.open(io.BytesIO(turned())).convert("RGB").rotate(-90))
    assert np.array_equal(pixels(kept(turned())), upright)


@pytest.mark.parametrize("bits", ["I;16", "F"])
def test_pixels_of_more_than_8_bits_are_refused_not_clipped(bits: str) -> None:
    picture = Image.fromarray(np.full((16, 16), 300, dtype=np.uint16 if bits == "I;16" else np.float32))
    data = saved(picture, "PNG") if bits == "I;16" else saved(picture, "TIFF")
    with pytest.raises(PictureError, match="8 bits|cannot be decoded"):
        open_rgb(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_truncated_pictures_are_refused(kind: str, share: float) -> None:
    data = encoded(3, 64, kind)
    with pytest.raises(PictureError, match="cannot be decoded"):
        open_rgb(data[: int(len(data) * share)])


def test_other_formats_are_refused() -> None:
    with pytest.raises(PictureError, match="cannot be decoded"):
        open_rgb(saved(land(0, 16), "BMP"))


def test_fit_takes_the_middle() -> None:
    wide = land(0, 40, 20)
    assert np.array_equal(np.asarray(fit(wide, 20, "lanczos", False)), np.asarray(wide)[:, 10:30])
    tall = land(0, 20, 41)
    assert np.array_equal(np.asarray(fit(tall, 20, "lanczos", False)), np.asarray(tall)[10:30])


def test_box_filter_is_the_mean_of_blocks() -> None:
    picture = land(5, 64)
    blocks = np.asarray(picture, dtype=np.float64).reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(fit(picture, 16, "box", False)) - blocks).max() <= 1  # rounded twice: rows, columns
    assert np.abs(np.asarray(fit(picture, 16, "lanczos", False)) - blocks).max() > 1


def test_enlarging_needs_permission() -> None:
    with pytest.raises(PictureError, match="16x20, smaller than ingest.size 32.*ingest.upscale"):
        fit(land(0, 16, 20), 32, "lanczos", False)
    assert fit(land(0, 16, 20), 32, "lanczos", True).size == (32, 32)


def test_jpeg_is_baseline_without_subsampling() -> None:
    data = fit_bytes(encoded(0, 64), 32, "jpeg", 90, "lanczos", False)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "JPEG" and JpegImagePlugin.get_sampling(picture) == 0
        assert not picture.info.get("progressive")
    assert kept(data, 32) == data


def test_metadata_is_left_out() -> None:
    picture = land(0, 16)
    picture.info["icc_profile"] = b"x" * 1000
    picture.info["exif"] = b"Exif\0\0" + b"y" * 1000
    for kind in ("png", "jpeg"):
        with Image.open(io.BytesIO(encode(picture, kind, 95))) as read:
            assert not {"icc_profile", "exif"} & set(read.info)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(1, 64), st.floats(1, 90))
def test_tiles_lie_inside_the_picture_and_the_latitudes(
    width: int, height: int, size: int, stride: int, latitude: float
) -> None:
    corners = tile_corners(width, height, size, stride, latitude)
    assert len(set(corners)) == len(corners)
    assert corners == sorted(corners, key=lambda corner: (corner[1], corner[0]))
    for x, y in corners:
        assert x % stride == 0 and y % stride == 0
        assert 0 <= x <= width - size and 0 <= y <= height - size
        assert 90 - y / height * 180 <= latitude + 1e-9
        assert 90 - (y + size) / height * 180 >= -latitude - 1e-9
    everywhere = tile_corners(width, height, size, stride, 90)
    columns, rows = ((extent - size) // stride + 1 if extent >= size else 0 for extent in (width, height))
    assert len(everywhere) == columns * rows


def test_deviation_is_that_of_numpy_averaged_over_channels() -> None:
    for number in range(5):
        pixels_HWC = np.asarray(land(number, 32))
        expected = pixels_HWC.reshape(-1, 3).astype(np.float64).std(axis=0).mean()
        assert deviation(pixels_HWC) == pytest.approx(expected, rel=1e-12)
    assert deviation(np.full((8, 8, 3), 200, dtype=np.uint8)) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_header_tells_the_size_that_decoding_gives(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(land(3, 40, 24), kind, exif=exif)
    assert upright_size(data) == open_rgb(data)[0].size == ((24, 40) if orientation > 4 else (40, 24))


def test_a_header_that_is_none_is_explained() -> None:
    with pytest.raises(PictureError, match="cannot be decoded"):
        upright_size(b"no picture")


def test_very_large_pictures_are_refused_unless_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(1, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(PictureError, match="DecompressionBomb"):
        open_rgb(data)
    with any_size():
        assert open_rgb(data)[0].size == upright_size(data) == (64, 64)
    with pytest.raises(PictureError, match="DecompressionBomb"):
        open_rgb(data)
