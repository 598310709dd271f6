"""What every peer does with one picture, and where its bytes come from on S3."""

import importlib
import io
import os
import random
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# The pixels are only read: nothing writes to what Pillow lent.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def decode(encoded: bytes) -> Tensor:
    """Whole picture to uint8 RGB (H, W, 3), mirrored at random. Pillow mirrors faster than NumPy or torch."""
    picture: Image.Image = Image.open(io.BytesIO(encoded))
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.asarray(picture))


def s3_client() -> Any:
    """boto3's client; endpoint and keys come from the environment."""
    return importlib.import_module("boto3").client("s3")


def split(uri: str) -> tuple[str, str]:
    """s3://bucket/key to bucket and key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def is_s3(uri: str) -> bool:
    """Whether the data lies on S3."""
    return uri.startswith("s3://")


def list_files(uri: str, suffix: str) -> list[str]:
    """Sorted paths or URIs of the files below a folder."""
    if not is_s3(uri):
        return sorted(os.path.join(uri, name) for name in os.listdir(uri) if name.endswith(suffix))
    bucket, key = split(uri)
    pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/")
    names = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return sorted(f"s3://{bucket}/{name}" for name in names if name.endswith(suffix))
