"""From pictures to a distance: moments of generated and real pictures, their cache, a blurred reference.

Each part of a set may be done anywhere: moments add up, and a generated picture depends on its number alone.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.evaluation.features import FeatureNetwork
from pipeline.evaluation.metrics import Moments, frechet_distance
from pipeline.evaluation.protocol import Protocol, Result
from pipeline.models.cips import Generator
from pipeline.models.sampling import sample_images
from pipeline.randomness import Purpose
from pipeline.storage import MissingError, StorageConfig, join, read_bytes, write_bytes

Progress = Callable[[int], None]
"""Told how many pictures were done since the last call."""

# B batch, H height, W width, C channels


def share(count: int, rank: int, workers: int) -> range:
    """The contiguous part of `count` pictures that one of several workers does; every picture once."""
    return range(rank * count // workers, (rank + 1) * count // workers)


def generated_moments(
    generator: Generator,
    network: FeatureNetwork,
    protocol: Protocol,
    indices: Sequence[int],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Moments:
    """Moments of generated pictures `indices` (of 0 .. protocol.images - 1), on the feature network's device.

    Picture i is drawn from (protocol.seed, i) alone, with the model's own noise mode, quantised to uint8.
    Raises ValueError where `indices` is empty, or where the generator's weights are not finite: its pictures
    would become black and look like an ordinary bad result.
    """
    bad = [name for name, value in generator.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise ValueError(
            f"the generator has diverged: {', '.join(bad[:3])} hold NaN or infinity; take an earlier checkpoint"
        )
    device = generator.mean_w.device
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=protocol.precision == "bf16")

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(indices), batch_size):
            with half:
                images_BHWC = sample_images(
                    generator,
                    indices[start : start + batch_size],
                    seed=protocol.seed,
                    purpose=Purpose.EVALUATE,
                    noise_purpose=Purpose.EVALUATE_NOISE,
                    truncation=protocol.truncation,
                )
            yield images_BHWC

    training = generator.training
    generator.eval()
    try:
        return image_moments(batches(), network, progress)
    finally:
        generator.train(training)


def image_moments(batches: Iterable[Tensor], network: FeatureNetwork, progress: Progress | None = None) -> Moments:
    """Moments of uint8 batches (B, H, W, 3), real ones for example; ValueError where there are none."""
    moments: Moments | None = None
    for images_BHWC in batches:
        features_BD = network(images_BHWC)
        moments = Moments.of(features_BD) if moments is None else moments.update(features_BD)
        if progress is not None:
            progress(len(images_BHWC))
    if moments is None:
        raise ValueError("no pictures to take moments of: give each worker at least one")
    return moments


def measure(real: Moments, generated: Moments, protocol: Protocol) -> Result:
    """The distance between complete moments; raises ValueError where their counts are not the protocol's."""
    for name, moments, expected in (
        ("real", real, protocol.real_images),
        ("generated", generated, protocol.images),
    ):
        if moments.count != expected:
            raise ValueError(
                f"the protocol asks for {expected:,} {name} pictures, but {moments.count:,} were seen; "
                "merge the moments of all parts first"
            )
    return Result(frechet_distance(real, generated), protocol)


# ---- cache of the real pictures' moments -------------------------------------------------------------------


def read_real_moments(folder: str, protocol: Protocol, storage: StorageConfig) -> Moments | None:
    """The moments kept for this protocol's real pictures; None where there are none, or a damaged file."""
    uri = _cache_uri(folder, protocol)
    try:
        with np.load(io.BytesIO(read_bytes(uri, storage)), allow_pickle=False) as arrays:
            if str(arrays["key"]) != protocol.real_key():
                raise ValueError("it belongs to another protocol")
            return Moments.from_arrays(arrays)
    except MissingError:
        return None
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as cause:
        print(f"{uri} is damaged ({cause}); it is computed anew", flush=True)
        return None


def write_real_moments(folder: str, protocol: Protocol, moments: Moments, storage: StorageConfig) -> str:
    """Keeps the moments under everything that they depend on; returns the file's URI."""
    if moments.count != protocol.real_images:
        raise ValueError(f"moments of {moments.count:,} pictures cannot be kept as those of {protocol.real_images:,}")
    buffer = io.BytesIO()
    # Uncompressed: 34 MB for Inception; zipping doubles would save little.
    np.savez(buffer, key=np.asarray(protocol.real_key()), **moments.to_arrays())  # type: ignore[arg-type]
    uri = _cache_uri(folder, protocol)
    write_bytes(uri, buffer.getvalue(), storage)
    return uri


def _cache_uri(folder: str, protocol: Protocol) -> str:
    return join(folder, f"{protocol.metric}-{protocol.real_key()[:32]}.npz")


# ---- a reference that a generator has to beat --------------------------------------------------------------


def blurred(batches: Iterable[Tensor], sigma: float) -> Iterator[Tensor]:
    """The same uint8 batches (B, H, W, C) after a Gaussian blur of standard deviation `sigma` pixels.

    Separable, cut off at 4 sigma, reflecting borders, rounded to uint8. The distance of blurred real pictures
    to real ones says what a distance is worth: a generator should be closer. sigma 0 changes nothing.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a finite number of at least 0 pixels, got {sigma}")
    for images_BHWC in batches:
        yield images_BHWC if sigma == 0 else _blur(images_BHWC, sigma)


def _blur(images_BHWC: Tensor, sigma: float) -> Tensor:
    radius = math.ceil(4 * sigma)
    smallest = min(images_BHWC.shape[1:3])
    if radius >= smallest:
        raise ValueError(
            f"a blur of sigma {sigma:g} reaches {radius} pixels, too far for pictures of {smallest}; lower it"
        )
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=images_BHWC.device)
    taps = torch.exp(-offsets.square() / (2 * sigma**2))
    taps = taps / taps.sum()
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
    channels = x_BCHW.shape[1]
    x_BCHW = functional.pad(x_BCHW, (radius, radius, radius, radius), mode="reflect")
    x_BCHW = functional.conv2d(x_BCHW, taps.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    x_BCHW = functional.conv2d(x_BCHW, taps.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
    return x_BCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
