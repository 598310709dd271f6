"""Pictures as numbers: floats in [-1, 1] and uint8, sheets of them, PNG bytes."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(rgb: Tensor) -> Tensor:
    """Maps [-1, 1] to 0..255, rounded and clamped (the mapping behind published distances)."""
    return (rgb.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Maps uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def tile(images_BHWC: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Lays uint8 pictures out as one sheet with thin white gaps; missing cells stay white."""
    count, height, width, _ = images_BHWC.shape
    rows = -(-count // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for number, picture in enumerate(images_BHWC):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def encode_png(image_HWC: np.ndarray, scale: int = 1) -> bytes:
    """A uint8 picture as PNG, each pixel drawn as `scale` x `scale`."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC.repeat(scale, axis=0).repeat(scale, axis=1)).save(buffer, format="PNG")
    return buffer.getvalue()
