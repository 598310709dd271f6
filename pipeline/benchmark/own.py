"""What is measured of this package, each in a process of its own: the loader, and bare decoding.

    python -m pipeline.benchmark.own '{"what": "stream", ...}'      # prints one line of JSON

Bare decoding is the floor under every loader: the same bytes, already in memory, to pixels and nothing else.
"""

import contextlib
import importlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from pipeline.benchmark.peers._measure import Outcome, endless, report, steady
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.data.stream import DataConfig, DataStream
from pipeline.storage import StorageConfig, arrow_filesystem, join

TOGETHER = 128
"""Pictures of 256x256 that DALI decodes at the least cost each; fewer, and a run's own cost shows."""
PACKAGES = {"dali": "nvidia-dali-cuda130", "turbo": "simplejpeg", "pillow": "pillow"}
IN_MEMORY = 2048
"""Pictures that bare decoding goes round."""


def run(arguments: dict[str, Any]) -> Outcome:
    """Measures it as the arguments say."""
    torch.set_num_threads(1)
    decoder = arguments["decoder"]
    packages = ["torch", PACKAGES[decoder]]
    if arguments["what"] == "stream":
        with contextlib.ExitStack() as stack:
            return steady(lambda: _stream(arguments, stack), arguments, [*packages, "pyarrow"])
    storage = StorageConfig()
    encoded = read_encoded(read_manifest(arguments["uri"], storage), arguments["uri"], storage)
    batch = arguments["batch"]
    if decoder == "pillow":
        return steady(lambda: bare_pillow(encoded, batch), arguments, packages)
    if decoder == "turbo":
        return steady(lambda: bare_turbo(encoded, batch, arguments["size"]), arguments, packages)
    return steady(lambda: bare_dali(encoded, batch, arguments["parallel"]), arguments, packages)


def _stream(arguments: dict[str, Any], stack: contextlib.ExitStack) -> Iterator[Tensor]:
    """Ended by the stack."""
    storage = StorageConfig()
    manifest = read_manifest(arguments["uri"], storage)
    data = DataConfig(uri=arguments["uri"], decoder=arguments["decoder"], threads=arguments["parallel"])
    batch = arguments["batch"]
    stream = DataStream(manifest, data, storage, seed=0, batch_size=batch, positions=range(batch))
    return stack.enter_context(stream)


def read_encoded(manifest: Manifest, uri: str, storage: StorageConfig) -> list[np.ndarray]:
    """The first pictures of a data set as they are stored (uint8, one array each)."""
    filesystem, folder = arrow_filesystem(uri, storage)
    found: list[np.ndarray] = []
    for group in manifest.row_groups:
        with filesystem.open_input_file(join(folder, group.file)) as file:
            table = pq.ParquetFile(file).read_row_group(group.index, columns=["image.bytes"])
        for encoded in table.column("image").combine_chunks().field("bytes").to_pylist():
            found.append(np.frombuffer(encoded, dtype=np.uint8))
        if len(found) >= IN_MEMORY:
            break
    return found


def bare_pillow(encoded: list[np.ndarray], batch_size: int) -> Iterator[Tensor]:
    """Batches, uint8 (B, H, W, 3), decoded by Pillow."""

    def decode(part: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(one.data))) for one in part]))

    return endless(lambda _: map(decode, _parts(encoded, batch_size)))


def bare_turbo(encoded: list[np.ndarray], batch_size: int, size: int) -> Iterator[Tensor]:
    """Batches, uint8 (B, H, W, 3), decoded by libjpeg-turbo."""
    decode_jpeg = importlib.import_module("simplejpeg").decode_jpeg

    def decode(part: list[np.ndarray]) -> Tensor:
        batch_BHWC = np.empty((len(part), size, size, 3), dtype=np.uint8)
        for one, target_HWC in zip(part, batch_BHWC, strict=True):
            decode_jpeg(one, "RGB", buffer=target_HWC)
        return torch.from_numpy(batch_BHWC)

    return endless(lambda _: map(decode, _parts(encoded, batch_size)))


def bare_dali(encoded: list[np.ndarray], batch_size: int, threads: int) -> Iterator[Tensor]:
    """Batches, uint8 (B, H, W, 3), decoded by DALI on the CPU, as many in one go as suit it best.

    A batch lives until the next go.
    """
    together = max(1, TOGETHER // batch_size) * batch_size
    dali, fn = importlib.import_module("nvidia.dali"), importlib.import_module("nvidia.dali.fn")
    pipeline = dali.Pipeline(batch_size=together, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(name="encoded", batch=True), device="cpu"))
    pipeline.build()

    def decode(part: list[np.ndarray]) -> Tensor:
        pipeline.feed_input("encoded", part)
        return torch.from_dlpack(pipeline.run()[0].as_tensor())

    def batches() -> Iterator[Tensor]:
        for part in _parts(encoded, together):
            yield from decode(part).split(batch_size)

    return endless(lambda _: batches())


def _parts(encoded: list[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(encoded), size):
        yield encoded[start : start + size]


if __name__ == "__main__":
    report(run)
