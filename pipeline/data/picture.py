"""One picture: bytes to checked RGB, cropped, resized, and back to bytes. No files, no config."""

import contextlib
import io
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin

Format = Literal["keep", "png", "jpeg"]
Filter = Literal["lanczos", "box"]
Crop = Literal["center"]

FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
# By their plugins, since Pillow's own loading of plugins at the first use is not safe between threads.
READABLE = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
    )
)
ORIENTATION = 0x0112  # EXIF
LYING = (5, 6, 7, 8)  # orientations that exchange width and height
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class PictureError(ValueError):
    """A picture that cannot be used; the message is the reason, without its name."""


def open_rgb(encoded: bytes) -> tuple[Image.Image, bool]:
    """Decode completely, turn upright (EXIF) and convert to RGB.

    Alpha is dropped and colour profiles are ignored. Returns the picture and whether the bytes themselves
    decode to exactly this picture in every decoder, so that they may be stored as they are. Raises
    PictureError.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=READABLE) as picture:
            picture.load()
            plain = _is_plain(picture, encoded)
            if picture.mode not in EIGHT_BIT_MODES:
                raise PictureError(f"has pixels of kind {picture.mode}; convert it to 8 bits per channel")
            upright = ImageOps.exif_transpose(picture)
            return (upright if upright.mode == "RGB" else upright.convert("RGB")), plain
    except PictureError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly any kind on damaged input
        raise _undecodable(error) from error


def upright_size(encoded: bytes) -> tuple[int, int]:
    """Width and height that `open_rgb` will give, from the header alone. Raises PictureError."""
    try:
        with Image.open(io.BytesIO(encoded), formats=READABLE) as picture:
            turned = picture.getexif().get(ORIENTATION, 1) in LYING
            return picture.size[::-1] if turned else picture.size
    except Exception as error:
        raise _undecodable(error) from error


@contextlib.contextmanager
def any_size() -> Iterator[None]:
    """Lifts Pillow's guard against very large pictures, for such as are meant to be. For one thread at a time."""
    guard, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = guard


def fit(picture: Image.Image, size: int, filter_name: Filter, upscale: bool) -> Image.Image:
    """Centre crop to a square, resized to `size` pixels. Raises PictureError where that would enlarge it."""
    width, height = picture.size
    side = min(width, height)
    if side < size and not upscale:
        raise PictureError(
            f"is {width}x{height}, smaller than ingest.size {size}; lower that or set ingest.upscale=true"
        )
    left, top = (width - side) // 2, (height - side) // 2
    square = picture if width == height else picture.crop((left, top, left + side, top + side))
    return square if side == size else square.resize((size, size), FILTERS[filter_name])


def encode(picture: Image.Image, file_format: Literal["png", "jpeg"], quality: int) -> bytes:
    """PNG, or baseline JPEG without chroma subsampling; metadata of the original is left out."""
    picture = picture.copy()
    picture.info = {}
    buffer = io.BytesIO()
    if file_format == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


def fit_bytes(
    encoded: bytes, size: int, file_format: Format, quality: int, filter_name: Filter, upscale: bool
) -> bytes:
    """A whole source picture to the bytes of one sample; "keep" keeps them where nothing has to change."""
    picture, plain = open_rgb(encoded)
    if file_format == "keep":
        if plain and picture.size == (size, size):
            return encoded
        file_format = "png"
    return encode(fit(picture, size, filter_name, upscale), file_format, quality)


def tile_corners(width: int, height: int, size: int, stride: int, latitude: float) -> list[tuple[int, int]]:
    """Corners (x, y) of all tiles, row by row, that lie wholly between `latitude` degrees north and south.

    The picture is taken to be equirectangular: its rows run evenly from 90 degrees north to 90 south; at 90
    nothing is left out.
    """
    top = math.ceil((90 - latitude) / 180 * height)
    bottom = math.floor((90 + latitude) / 180 * height)
    rows = [y for y in range(0, height - size + 1, stride) if y >= top and y + size <= bottom]
    return [(x, y) for y in rows for x in range(0, width - size + 1, stride)]


def deviation(pixels_HWC: np.ndarray) -> float:
    """Standard deviation over the pixels of a uint8 picture, averaged over channels, in grey levels.

    Sums are in integers, so that a tile at the threshold is judged alike on every machine.
    """
    values = pixels_HWC.reshape(-1, pixels_HWC.shape[-1]).astype(np.int64)
    count = len(values)
    variance = count * (values * values).sum(axis=0) - values.sum(axis=0) ** 2
    return math.fsum(math.sqrt(one) / count for one in variance.tolist()) / len(variance)


def _undecodable(error: Exception) -> PictureError:
    """The same words for the same bytes: Pillow's own name an address in memory where it knows no format."""
    if isinstance(error, UnidentifiedImageError):
        return PictureError("cannot be decoded (it is no JPEG, PNG or WebP, or its header is damaged)")
    return PictureError(f"cannot be decoded ({type(error).__name__}: {error})")


def _is_plain(picture: Image.Image, encoded: bytes) -> bool:
    """8-bit RGB, one frame, upright, baseline, opaque: no decoder has room for a reading of its own."""
    if picture.mode != "RGB" or picture.format not in ("JPEG", "PNG", "WEBP"):
        return False
    if getattr(picture, "n_frames", 1) > 1 or "transparency" in picture.info:
        return False
    if picture.getexif().get(ORIENTATION, 1) != 1:
        return False
    if picture.format == "JPEG":
        return not picture.info.get("progressive")
    if picture.format == "PNG":
        return encoded[24] == 8  # bit depth in IHDR; 16 bits are rounded differently by different decoders
    return True
