"""Encoded pictures to pixels: NVIDIA DALI on CPU or GPU, libjpeg-turbo for CPUs, and Pillow as the reference twin.

All only decode and cut out the square that is asked for; turning and mirroring come after, the same for all.
"""

import functools
import importlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.picture import READABLE
from pipeline.data.views import Augmentation, Views, on_device, turned_
from pipeline.packages import MissingPackageError

DecoderName = Literal["dali", "turbo", "pillow"]
DECODED_TOGETHER: dict[DecoderName, int] = {"dali": 24 << 20, "turbo": 4 << 20, "pillow": 4 << 20}
"""Bytes of pixels at most that are decoded in one go, if that is more than a batch.

DALI's cost of a run is shared; the others have none, and what they decoded is mirrored while it is in the cache."""


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
    if name == "turbo":
        return TurboDecoder(kind, threads, device)
    return DaliDecoder(kind, batch_size, threads, device)


class PillowDecoder:
    """Slow and simple: what every other decoder is compared with."""

    def __init__(self, kind: Augmentation, device: torch.device) -> None:
        self._kind, self._device = kind, device

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> Tensor:
        pixels_BHWC = _empty(len(encoded), self._kind)
        for position, one in enumerate(encoded):
            pixels_BHWC[position] = _cut(_open(position, one, self._kind), self._kind, views, position)
        return turned_(on_device(torch.from_numpy(pixels_BHWC), self._device), views)

    def close(self) -> None:
        pass


class TurboDecoder:
    """libjpeg-turbo straight into the batch's memory, the fastest on a CPU; what is no JPEG goes through Pillow."""

    def __init__(self, kind: Augmentation, threads: int, device: torch.device) -> None:
        self._kind, self._device, self._threads = kind, device, threads
        self._decode_jpeg = _simplejpeg().decode_jpeg
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="turbo") if threads > 1 else None

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> Tensor:
        pixels_BHWC = _empty(len(encoded), self._kind)
        share = -(-len(encoded) // self._threads)
        parts = [range(start, min(start + share, len(encoded))) for start in range(0, len(encoded), share)]
        decode = functools.partial(self._decode_part, encoded, views, pixels_BHWC)
        # In order, so that the first bad picture is blamed whichever thread met one first.
        for _ in self._pool.map(decode, parts) if self._pool else map(decode, parts):
            pass
        return turned_(on_device(torch.from_numpy(pixels_BHWC), self._device), _still_to_turn(views))

    def _decode_part(
        self, encoded: Sequence[np.ndarray], views: Views, pixels_BHWC: np.ndarray, part: Iterable[int]
    ) -> None:
        kind = self._kind
        flips = [False] * len(encoded) if views.flips_B is None else views.flips_B.tolist()
        whole_HWC = np.empty((kind.height, kind.width, 3), dtype=np.uint8)
        for position in part:
            target_HWC, flip = pixels_BHWC[position], flips[position]
            direct = not flip and not kind.crop
            found_HWC = target_HWC if direct else whole_HWC
            try:
                decoded = self._decode_jpeg(encoded[position], "BGR" if flip else "RGB", buffer=found_HWC)
                done = decoded.shape == found_HWC.shape
            except ValueError:  # no JPEG, one in CMYK, a larger or a damaged one
                done = False
            if not done:
                found_HWC[:] = _open(position, encoded[position], kind)[:, :, :: -1 if flip else 1]
            if flip:
                _reverse_rows(_cut(found_HWC, kind, views, position), target_HWC)
            elif not direct:
                target_HWC[:] = _cut(found_HWC, kind, views, position)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()


def _reverse_rows(bgr_HWC: np.ndarray, rgb_HWC: np.ndarray) -> None:
    """Mirrors: a row's bytes in reverse are its pixels in reverse and RGB for BGR; eight at once where they fit."""
    height, row = bgr_HWC.shape[0], 3 * bgr_HWC.shape[1]
    read, write = ("<u8", ">u8") if row % 8 == 0 else ("u1", "u1")
    # Views, also of a square cut from wider rows: pixels of one row lie side by side.
    bytes_in, bytes_out = bgr_HWC.reshape(height, row), rgb_HWC.reshape(height, row)
    bytes_out.view(write)[:] = bytes_in.view(read)[:, ::-1]


def _still_to_turn(views: Views) -> Views:
    """Pictures that are mirrored already turn the other way, to be what turning and then mirroring gives."""
    if views.turns_B is None or views.flips_B is None:
        return Views(turns_B=views.turns_B)
    return Views(turns_B=np.where(views.flips_B, -views.turns_B, views.turns_B) % 4)


def _empty(count: int, kind: Augmentation) -> np.ndarray:
    height, width = (kind.size, kind.size) if kind.crop else (kind.height, kind.width)
    return np.empty((count, height, width, 3), dtype=np.uint8)


def _open(position: int, encoded: np.ndarray, kind: Augmentation) -> np.ndarray:
    """A whole picture (H, W, 3) by Pillow."""
    try:
        with Image.open(io.BytesIO(encoded.data), formats=READABLE) as picture:
            pixels_HWC = np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise nearly any kind on damaged input
        raise DecodeError(position, f"cannot be decoded ({type(error).__name__}: {error})") from error
    _check_shape(position, pixels_HWC.shape[:2], kind)
    return pixels_HWC


def _cut(whole_HWC: np.ndarray, kind: Augmentation, views: Views, position: int) -> np.ndarray:
    """The square that is asked for."""
    if not kind.crop:
        return whole_HWC
    x, y = (0, 0) if views.corners_B2 is None else views.corners_B2[position].tolist()
    return whole_HWC[y : y + kind.size, x : x + kind.size]


def _simplejpeg() -> Any:
    try:
        return importlib.import_module("simplejpeg")
    except ImportError as error:
        raise MissingPackageError(
            f"data.decoder=turbo needs simplejpeg ({error}); pip install 'cips-pipeline[turbo]', or set "
            f"data.decoder=pillow"
        ) from error


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
        pictures = fn.decoders.image(
            encoded,
            device="mixed" if cuda else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # of chroma, on a GPU as on a CPU: evaluation and training see the same pixels
        )
        if kind.crop:
            corners = fn.external_source(name="corners", batch=True, dtype=types.INT32, ndim=1)
            square = fn.slice(pictures, start=corners, shape=[kind.size, kind.size], axis_names="WH")
            pipeline.set_outputs(square, fn.peek_image_shape(encoded))
        else:
            pipeline.set_outputs(pictures)
    pipeline.build()
    return pipeline
