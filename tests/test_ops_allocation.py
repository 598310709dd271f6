"""A process of its own for each case: what the C library was told cannot be taken back."""

import platform
import subprocess
import sys

import pytest

STORY = """
import torch
from pipeline.benchmark.memory import current_bytes
from pipeline.ops.allocation import keep_freed_memory

if {keep}:
    assert keep_freed_memory()
before = current_bytes()
tensors = [torch.ones(1 << 20) for _ in range(64)]
held = current_bytes() - before
tensors.clear()
print(held, current_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_stays_with_the_process(keep: bool) -> None:
    done = subprocess.run([sys.executable, "-c", STORY.format(keep=keep)], capture_output=True, text=True, check=True)
    held, left = (int(word) for word in done.stdout.split())
    assert held >= 64 << 22
    assert (left > 0.9 * held) is keep
