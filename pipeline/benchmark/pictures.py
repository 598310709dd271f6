"""The benchmark's pictures: JPEGs of the size and texture of photographs, the same on every machine.

Made from the package's Blue Marble, so that nothing has to be downloaded: squares of 1 to 2.5 times the size,
turned and mirrored, sharpened and grained until they compress like camera pictures (at 256x256, quality 90 and
4:2:0 about 24 kB; a smooth picture would decode faster than the ones that people train on).
"""

import functools
import io
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

SEED = 256
QUALITY = 90
LARGEST_ZOOM = 2.5
SHARPENING_PERCENT = 150
GRAIN = 4.0  # grey levels, standard deviation
LEAST_DEVIATION = 18.0  # grey levels: not the open sea
LATITUDES = (0.15, 0.85)  # of the height: the poles are white


def make_pictures(folder: Path, count: int, size: int, progress: bool = True) -> float:
    """Writes `00000.jpg` and on into the folder; returns their mean size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for number in tqdm(range(count), "pictures", unit=" pictures", disable=None if progress else True):
        encoded = make_picture(number, size)
        (folder / f"{number:05d}.jpg").write_bytes(encoded)
        total += len(encoded)
    return total / count


def make_picture(number: int, size: int) -> bytes:
    """The number-th picture as JPEG: a pure function, apart from the version of the JPEG library."""
    random = np.random.default_rng([SEED, number])
    square = _square(random, size).resize((size, size), Image.Resampling.LANCZOS)
    square = square.transpose(Image.Transpose(int(random.integers(len(Image.Transpose)))))
    sharp = np.asarray(square.filter(ImageFilter.UnsharpMask(1.5, SHARPENING_PERCENT, 0)), dtype=np.float32)
    # Grain is mostly grey, as a sensor's is after the camera has cleaned the colours.
    grain = random.normal(0, GRAIN, (size, size, 1)) + random.normal(0, GRAIN / 2, (size, size, 3))
    pixels = (sharp + grain).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return buffer.getvalue()


def _square(random: np.random.Generator, size: int) -> Image.Image:
    """A square of the Earth that shows something."""
    earth = _earth()
    lowest, highest = (int(part * earth.height) for part in LATITUDES)
    largest = min(LARGEST_ZOOM, (highest - lowest) / size)
    while True:
        side = int(size * np.exp(random.uniform(0, np.log(largest))))
        left = int(random.integers(earth.width - side + 1))
        top = int(random.integers(lowest, highest - side + 1))
        square = earth.crop((left, top, left + side, top + side))
        if np.asarray(square.resize((32, 32))).std(axis=(0, 1)).mean() >= LEAST_DEVIATION:
            return square


@functools.cache
def _earth() -> Image.Image:
    file = resources.files("pipeline") / "presets/data/earth-blue-marble.jpg"
    with file.open("rb") as stream, Image.open(stream) as picture:
        return picture.convert("RGB")
