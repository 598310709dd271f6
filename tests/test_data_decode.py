import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.decode import DaliDecoder, DecodeError, Decoder, PillowDecoder, TurboDecoder, make_decoder
from pipeline.data.views import Augmentation, Views
from pipeline.packages import MissingPackageError
from tests.pictures import encoded, land, pixels

CPU = torch.device("cpu")
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "jpeg 4:4:4": ("JPEG", {"quality": 95, "subsampling": "4:4:4"}),
    "jpeg 4:2:0": ("JPEG", {"quality": 85, "subsampling": "4:2:0"}),
    "webp": ("WEBP", {"quality": 80}),
    "webp lossless": ("WEBP", {"lossless": True}),
}


def kind_of(stored: int, size: int | None = None) -> Augmentation:
    """Whole pictures of `stored` pixels, or squares of `size` pixels cut from them."""
    return Augmentation(stored, stored, size or stored, crop=size is not None, rotate=True, flip=True)


def dali(size: int, batch_size: int, crop: int | None = None) -> Decoder:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    return DaliDecoder(kind_of(size, crop), batch_size, 1, CPU)


def pillow(size: int, batch_size: int, crop: int | None = None) -> Decoder:
    return PillowDecoder(kind_of(size, crop), CPU)


def turbo(size: int, batch_size: int, crop: int | None = None) -> Decoder:
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    return TurboDecoder(kind_of(size, crop), 2, CPU)


both = pytest.mark.parametrize("make", [dali, turbo, pillow])
Make = Callable[..., Decoder]
PLAIN = Views()


def flipped(*flips: bool) -> Views:
    return Views(flips_B=np.array(flips))


def batch(count: int, size: int, name: str = "png") -> list[np.ndarray]:
    kind, options = FORMATS[name]
    return [np.frombuffer(encoded(number, size, kind, **options), dtype=np.uint8) for number in range(count)]


@pytest.mark.parametrize("name", FORMATS)
def test_dali_and_pillow_agree(name: str) -> None:
    pictures = batch(8, 48, name)
    views = flipped(*[False, True] * 4)
    difference = dali(48, 8).decode(pictures, views).int() - pillow(48, 8).decode(pictures, views).int()
    assert difference.abs().float().mean() <= (0 if "png" in name or "lossless" in name else 2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("crop", [None, 32])
def test_turbo_gives_pillows_pixels(name: str, crop: int | None) -> None:
    pictures = batch(9, 48, name)
    corners = np.arange(18, dtype=np.int32).reshape(9, 2) % 17 if crop else None
    views = Views(corners, np.arange(9) % 4, np.arange(9) % 2 > 0)
    difference = turbo(48, 9, crop).decode(pictures, views).int() - pillow(48, 9, crop).decode(pictures, views).int()
    assert difference.abs().max() <= (2 if "jpeg" in name else 0)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@both
def test_jpegs_of_other_colours_become_rgb(make: Make, mode: str) -> None:
    buffer = io.BytesIO()
    land(3, 32).convert(mode).save(buffer, "JPEG", quality=95)
    picture = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    decoded = make(32, 2).decode([picture, *batch(1, 32)], PLAIN).numpy().astype(int)
    assert np.abs(decoded[0] - pixels(picture)).mean() <= 3


@both
def test_pixels_and_flips_are_right(make: Make) -> None:
    pictures = batch(5, 32)
    flips = [False, True, True, False, True]
    decoder = make(32, 5)
    decoded = decoder.decode(pictures, flipped(*flips))
    assert decoded.dtype == torch.uint8 and decoded.shape == (5, 32, 32, 3)
    for one, picture, flip in zip(decoded.numpy(), pictures, flips, strict=True):
        expected = pixels(picture)
        assert np.array_equal(one, expected[:, ::-1] if flip else expected)
        assert not np.array_equal(one, expected if flip else expected[:, ::-1])


@both
def test_smaller_batches_and_earlier_results(make: Make) -> None:
    pictures = batch(6, 32)
    decoder = make(32, 6)
    results = [decoder.decode(pictures[:count], PLAIN) for count in (6, 1, 4, 6)]
    whole = np.stack([pixels(picture) for picture in pictures])
    for count, result in zip((6, 1, 4, 6), results, strict=True):  # the decoder has not written over them
        assert np.array_equal(result.numpy(), whole[:count])
    decoder.close()
    assert np.array_equal(results[0].numpy(), whole)


def test_more_pictures_than_agreed_are_refused() -> None:
    with pytest.raises(ValueError, match="3 pictures.*built for 2"):
        dali(32, 2).decode(batch(3, 32), PLAIN)


@both
@pytest.mark.parametrize("name", FORMATS)
def test_a_corrupt_picture_is_named_and_the_next_batch_is_fine(make: Make, name: str) -> None:
    pictures = batch(5, 32, name)
    decoder = make(32, 5)
    for bad in (pictures[3][: len(pictures[3]) // 3], np.frombuffer(b"no picture at all", dtype=np.uint8)):
        with pytest.raises(DecodeError, match="cannot be decoded") as caught:
            decoder.decode([*pictures[:3], bad, pictures[4]], PLAIN)
        assert caught.value.position == 3
    assert decoder.decode(pictures, PLAIN).shape == (5, 32, 32, 3)


@both
def test_a_picture_of_another_size_is_named(make: Make) -> None:
    pictures = [*batch(2, 32), *batch(1, 40), *batch(1, 32)]
    for crop in (None, 24):
        with pytest.raises(DecodeError, match="is 40x40, the manifest says 32x32") as caught:
            make(32, 4, crop).decode(pictures, PLAIN)
        assert caught.value.position == 2


@both
def test_squares_are_cut_turned_and_mirrored(make: Make) -> None:
    pictures = batch(6, 48)
    corners = np.array([[0, 0], [5, 11], [16, 16], [0, 16], [16, 0], [7, 7]], dtype=np.int32)
    turns, flips = np.array([0, 1, 2, 3, 1, 0]), np.array([False, False, True, True, True, True])
    decoded = make(48, 6, 32).decode(pictures, Views(corners, turns, flips)).numpy()
    for one, picture, (x, y), turn, flip in zip(decoded, pictures, corners, turns, flips, strict=True):
        square = np.rot90(pixels(picture)[y : y + 32, x : x + 32], turn)
        assert np.array_equal(one, square[:, ::-1] if flip else square)


def test_batches_that_are_kept_are_not_written_over() -> None:
    """DALI hands its buffers over without a copy: many of them, kept at once, must stay what they were."""
    pictures = batch(64, 32)
    decoder = dali(32, 4)
    kept = [decoder.decode(pictures[start : start + 4], PLAIN) for start in range(0, 64, 4)]
    for start in range(0, 64, 4):  # the pictures again, in another order
        decoder.decode(pictures[60 - start : 64 - start], PLAIN)
    assert np.array_equal(torch.cat(kept).numpy(), np.stack([pixels(picture) for picture in pictures]))


@pytest.mark.parametrize("name, package", [("dali", "nvidia.dali"), ("turbo", "simplejpeg")])
def test_an_absent_decoder_says_what_to_do(monkeypatch: pytest.MonkeyPatch, name: Any, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"cips-pipeline\[{name}\].*data.decoder=pillow"):
        make_decoder(name, kind_of(8), 1, 1, CPU)
    assert isinstance(make_decoder("pillow", kind_of(8), 1, 1, CPU), PillowDecoder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FORMATS)
def test_dali_on_the_gpu_agrees_with_pillow(name: str) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    device = torch.device("cuda", 0)
    pictures, views = batch(8, 48, name), Views(None, np.arange(8) % 4, np.arange(8) > 3)
    decoder = make_decoder("dali", kind_of(48), 8, 1, device)
    results = [decoder.decode(pictures, views) for _ in range(3)]
    assert results[0].device == device
    expected = pillow(48, 8).decode(pictures, views).int()
    for result in results:
        assert (result.cpu().int() - expected).abs().float().mean() <= (0 if "png" in name else 2)
