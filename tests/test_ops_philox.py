from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.ops.philox import MASK, philox4x32

# Known answers of the authors' Random123 library, philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def torch_words(values: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value, value]) for value in values)


def numpy_words(values: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value, value], dtype=np.int64) for value in values)


def plain(values: tuple[int, ...]) -> tuple[int, ...]:
    return values


@pytest.mark.parametrize("convert", [torch_words, numpy_words, plain])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(
    convert: Callable[[tuple[int, ...]], Any],
    counter: tuple[int, ...],
    key: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    words = philox4x32(convert(counter), convert(key))
    for word, value in zip(words, expected, strict=True):
        if convert is plain:
            assert word == value
        else:
            assert word.tolist() == [value, value]


def test_torch_and_numpy_agree_and_broadcast() -> None:
    generator = np.random.default_rng(0)
    c0 = generator.integers(0, 1 << 32, (5, 1))
    c1 = generator.integers(0, 1 << 32, (1, 7))
    key = generator.integers(0, 1 << 32, (5, 1))
    of_numpy = philox4x32((c0, c1, 3, 4), (key, 9))
    of_torch = philox4x32((torch.from_numpy(c0), torch.from_numpy(c1), 3, 4), (torch.from_numpy(key), 9))
    for a, b in zip(of_numpy, of_torch, strict=True):
        assert a.shape == (5, 7)
        assert a.min() >= 0 and a.max() <= MASK
        np.testing.assert_array_equal(a, b.numpy())
    one = philox4x32((int(c0[2, 0]), int(c1[0, 3]), 3, 4), (int(key[2, 0]), 9))
    assert [int(word[2, 3]) for word in of_numpy] == list(one)


def test_each_bit_of_counter_and_key_changes_half_of_the_output() -> None:
    base = [0x12345678, 0x9ABCDEF0, 0x0F1E2D3C, 0x4B5A6978, 0xDEADBEEF, 0x8BADF00D]

    def draw(words: list[int]) -> tuple[int, ...]:
        c0, c1, c2, c3, k0, k1 = words
        return philox4x32((c0, c1, c2, c3), (k0, k1))

    start = draw(base)
    changed = []
    for word in range(6):
        for bit in range(32):
            other = list(base)
            other[word] ^= 1 << bit
            changed.append(sum((a ^ b).bit_count() for a, b in zip(start, draw(other), strict=True)))
    assert 62 < np.mean(changed) < 66  # 64 of 128 bits
    assert min(changed) > 40
