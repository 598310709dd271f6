"""Encoded pictures to pixels: NVIDIA DALI on CPU or GPU, and Pillow as the reference twin.

Both only decode and cut out the square that is asked for; turning and mirroring come after, the same for both.
"""

import importlib
import io
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.picture import READABLE
from pipeline.data.views import Augmentation, Views, turned_
from pipeline.packages import MissingPackageError

DecoderName = Literal["dali", "pillow"]


class DecodeError(RuntimeError):
    """A picture that cannot be decoded; `position` is its place in the list that was given."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"picture {position} {reason}")
        self.position, self.reason = position, reason


class Decoder(Protocol):
    """Stateless from call to call; used by one thread."""

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> Tensor:
        """Pictures (uint8, one array each) to uint8 RGB (B, size, size, 3), each in its view.

        Any number up to the decoder's largest batch. Raises DecodeError, also for a picture of another size than the
        data set's.
        """
        ...

    def close(self) -> None:
        """Free its threads and memory; the tensors it gave out stay valid."""
        ...


def make_decoder(name: DecoderName, kind: Augmentation, batch_size: int, threads: int, device: torch.device) -> Decoder:
    """batch_size: the most pictures ever decoded at once. Raises MissingPackageError with what to install."""
    if name == "pillow":
        return PillowDecoder(kind, device)
    return DaliDecoder(kind, batch_size, threads, device)


class PillowDecoder:
    """Slow and simple: what every other decoder is compared with."""

    def __init__(self, kind: Augmentation, device: torch.device) -> None:
        self._kind, self._device = kind, device

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> Tensor:
        kind = self._kind
        height, width = (kind.size, kind.size) if kind.crop else (kind.height, kind.width)
        pixels_BHWC = np.empty((len(encoded), height, width, 3), dtype=np.uint8)
        for position, one in enumerate(encoded):
            picture = self._open(position, one)
            x, y = (0, 0) if views.corners_B2 is None else views.corners_B2[position].tolist()
            pixels_BHWC[position] = picture[y : y + height, x : x + width]
        return turned_(torch.from_numpy(pixels_BHWC).to(self._device), views)

    def _open(self, position: int, encoded: np.ndarray) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(encoded.data), formats=READABLE) as picture:
                pixels_HWC = np.asarray(picture.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise nearly any kind on damaged input
            raise DecodeError(position, f"cannot be decoded ({type(error).__name__}: {error})") from error
        _check_shape(position, pixels_HWC.shape[:2], self._kind)
        return pixels_HWC

    def close(self) -> None:
        pass


class DaliDecoder:
    """DALI in pipeline mode. On CUDA it decodes there; otherwise it needs neither GPU nor driver."""

    def __init__(self, kind: Augmentation, batch_size: int, threads: int, device: torch.device) -> None:
        self._kind, self._device = kind, device
        self._batch_size, self._threads = batch_size, threads
        self._pipeline = self._build()

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> Tensor:
        if len(encoded) > self._batch_size:
            raise ValueError(f"{len(encoded)} pictures were given to a decoder built for {self._batch_size} at once")
        try:
            pictures, shapes = self._run(encoded, views.corners_B2)
        except RuntimeError:
            self._pipeline = self._build()  # one bad picture makes a pipeline unusable
            self._blame(encoded)
            raise
        for position, shape in enumerate(shapes):
            _check_shape(position, shape[:2], self._kind)
        # Without a copy: the dynamic executor hands its buffers over, and takes new ones for the next run.
        return turned_(torch.from_dlpack(pictures.as_tensor()), views)

    def _run(self, encoded: Sequence[np.ndarray], corners_B2: np.ndarray | None) -> tuple[Any, Sequence[Any]]:
        """The decoded squares, and the sizes (height, width, ...) of the pictures that they were cut from."""
        self._pipeline.feed_input("encoded", list(encoded))
        if self._kind.crop:
            corners = np.zeros((len(encoded), 2), dtype=np.int32) if corners_B2 is None else corners_B2
            self._pipeline.feed_input("corners", np.ascontiguousarray(corners))
        outputs = self._pipeline.run()
        return outputs[0], outputs[1].as_array().tolist() if self._kind.crop else outputs[0].shape()

    def _blame(self, encoded: Sequence[np.ndarray]) -> None:
        """DALI does not say which picture of a batch it could not decode: they are tried one by one."""
        for position, one in enumerate(encoded):
            try:
                self._run([one], None)
            except RuntimeError as error:
                self._pipeline = self._build()
                cause = " ".join(str(error).split("encountered:")[-1].split("Current pipeline")[0].split())
                raise DecodeError(position, f"cannot be decoded by DALI ({cause})") from error

    def _build(self) -> Any:
        return _dali_pipeline(self._kind, self._batch_size, self._threads, self._device)

    def close(self) -> None:
        self._pipeline = None


def _check_shape(position: int, shape: Sequence[int], kind: Augmentation) -> None:
    height, width = shape
    if (height, width) != (kind.height, kind.width):
        raise DecodeError(position, f"is {width}x{height}, the manifest says {kind.width}x{kind.height}")


def _dali_pipeline(kind: Augmentation, batch_size: int, threads: int, device: torch.device) -> Any:
    try:
        dali = importlib.import_module("nvidia.dali")
        fn, types = importlib.import_module("nvidia.dali.fn"), importlib.import_module("nvidia.dali.types")
    except ImportError as error:
        raise MissingPackageError(
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
        exec_dynamic=True,  # its outputs stay ours, see `decode`
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
        pictures = fn.decoders.image(encoded, device="mixed" if cuda else "cpu", output_type=types.RGB)
        if kind.crop:
            corners = fn.external_source(name="corners", batch=True, dtype=types.INT32, ndim=1)
            square = fn.slice(pictures, start=corners, shape=[kind.size, kind.size], axis_names="WH")
            pipeline.set_outputs(square, fn.peek_image_shape(encoded))
        else:
            pipeline.set_outputs(pictures)
    pipeline.build()
    return pipeline
