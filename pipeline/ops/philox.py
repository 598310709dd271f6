"""Philox 4x32-10: a counter-based generator, written with integer operators only.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). A draw is a pure function of (counter,
key), so it needs no state, no rank and no order. The same lines serve torch tensors (CPU and CUDA), numpy
arrays and Python ints.
"""

from typing import Any

MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85

Words = tuple[Any, Any, Any, Any]


def philox4x32(counter: Words, key: tuple[Any, Any], rounds: int = 10) -> Words:
    """Four 32-bit words for each counter and key.

    Counter words and key words are int64 tensors, int64 arrays or Python ints with values in [0, 2^32); they
    broadcast against each other. Returns four int64 values of the common shape, in [0, 2^32). Not checked:
    this is the inner loop.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, yet all 64 bits are right: the shift gives the high word once it is masked. The
        # low words c1 and c3 are only ever XORed, so the same mask serves for them one round later.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = ((p1 >> 32) ^ (c1 ^ k0)) & MASK, p1, ((p0 >> 32) ^ (c3 ^ k1)) & MASK, p0
        k0, k1 = (k0 + _WEYL_0) & MASK, (k1 + _WEYL_1) & MASK
    return c0, c1 & MASK, c2, c3 & MASK
