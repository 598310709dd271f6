"""Encoded pictures to pixels: NVIDIA DALI on CPU or GPU, and Pillow as the reference twin."""

import importlib
import io
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.picture import READABLE

DecoderName = Literal["dali", "pillow"]


class DecodeError(RuntimeError):
    """A picture that cannot be decoded; `position` is its place in the list that was given."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"picture {position} {reason}")
        self.position, self.reason = position, reason


class Decoder(Protocol):
    """Stateless from call to call; used by one thread."""

    def decode(self, encoded: Sequence[np.ndarray], flips: np.ndarray) -> Tensor:
        """Pictures (uint8, one array each) to uint8 RGB (B, H, W, 3), mirrored where flips (bool) is set.

        All have one size; any number up to the decoder's largest batch. Raises DecodeError.
        """
        ...

    def close(self) -> None:
        """Free its threads and memory; the tensors it gave out stay valid."""
        ...


def make_decoder(
    name: DecoderName, height: int, width: int, batch_size: int, threads: int, device: torch.device
) -> Decoder:
    """batch_size: the most pictures ever decoded at once. Raises ImportError with what to install."""
    if name == "pillow":
        return PillowDecoder(height, width, device)
    return DaliDecoder(height, width, batch_size, threads, device)


class PillowDecoder:
    """Slow and simple: what every other decoder is compared with."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self._shape, self._device = (height, width, 3), device

    def decode(self, encoded: Sequence[np.ndarray], flips: np.ndarray) -> Tensor:
        pixels = np.empty((len(encoded), *self._shape), dtype=np.uint8)
        for position, (one, flip) in enumerate(zip(encoded, flips, strict=True)):
            picture = self._open(position, one)
            pixels[position] = picture[:, ::-1] if flip else picture
        return torch.from_numpy(pixels).to(self._device)

    def _open(self, position: int, encoded: np.ndarray) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(encoded.data), formats=READABLE) as picture:
                pixels = np.asarray(picture.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise nearly any kind on damaged input
            raise DecodeError(position, f"cannot be decoded ({type(error).__name__}: {error})") from error
        if pixels.shape != self._shape:
            raise DecodeError(position, f"has shape {pixels.shape}, the manifest says {self._shape}")
        return pixels

    def close(self) -> None:
        pass


class DaliDecoder:
    """DALI in pipeline mode. On CUDA it decodes there; otherwise it needs neither GPU nor driver."""

    def __init__(self, height: int, width: int, batch_size: int, threads: int, device: torch.device) -> None:
        self._shape, self._device = (height, width, 3), device
        self._batch_size, self._threads = batch_size, threads
        self._pipeline = self._build()

    def decode(self, encoded: Sequence[np.ndarray], flips: np.ndarray) -> Tensor:
        if len(encoded) > self._batch_size:
            raise ValueError(f"{len(encoded)} pictures were given to a decoder built for {self._batch_size} at once")
        try:
            pictures = self._run(encoded, flips)
        except RuntimeError:
            self._pipeline = self._build()  # one bad picture makes a pipeline unusable
            self._blame(encoded)
            raise
        for position, shape in enumerate(pictures.shape()):
            if shape != self._shape:
                raise DecodeError(position, f"has shape {shape}, the manifest says {self._shape}")
        # DALI may reuse its buffers in the next run: the copy makes the tensor the caller's.
        copied = torch.from_dlpack(pictures.as_tensor()).to(self._device, copy=True)
        if copied.is_cuda:  # the copy is queued, not done
            torch.cuda.current_stream(copied.device).synchronize()
        return copied

    def _run(self, encoded: Sequence[np.ndarray], flips: np.ndarray) -> Any:
        self._pipeline.feed_input("encoded", list(encoded))
        self._pipeline.feed_input("flips", flips.astype(np.int32))
        return self._pipeline.run()[0]

    def _blame(self, encoded: Sequence[np.ndarray]) -> None:
        """DALI does not say which picture of a batch it could not decode: they are tried one by one."""
        for position, one in enumerate(encoded):
            try:
                self._run([one], np.zeros(1, dtype=bool))
            except RuntimeError as error:
                self._pipeline = self._build()
                cause = " ".join(str(error).split("encountered:")[-1].split("Current pipeline")[0].split())
                raise DecodeError(position, f"cannot be decoded by DALI ({cause})") from error

    def _build(self) -> Any:
        return _dali_pipeline(self._batch_size, self._threads, self._device)

    def close(self) -> None:
        self._pipeline = None


def _dali_pipeline(batch_size: int, threads: int, device: torch.device) -> Any:
    try:
        dali = importlib.import_module("nvidia.dali")
        fn, types = importlib.import_module("nvidia.dali.fn"), importlib.import_module("nvidia.dali.types")
    except ImportError as error:
        raise ImportError(
            f"data.decoder=dali needs NVIDIA DALI ({error}); pip install 'cips-pipeline[dali]', or set "
            f"data.decoder=pillow"
        ) from error
    cuda = device.type == "cuda"
    device_id = (device.index if device.index is not None else torch.cuda.current_device()) if cuda else None
    pipeline = dali.Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,  # None, unlike the default, promises not to touch CUDA
        prefetch_queue_depth=1,  # the stream reads ahead itself
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
        flips = fn.external_source(name="flips", batch=True, dtype=types.INT32, ndim=0)
        pictures = fn.decoders.image(encoded, device="mixed" if cuda else "cpu", output_type=types.RGB)
        pipeline.set_outputs(fn.flip(pictures, horizontal=flips))
    pipeline.build()
    return pipeline
