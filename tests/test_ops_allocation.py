"""A process of its own for each case: what the C library was told cannot be taken back."""

import os
import platform
import subprocess
import sys

import pytest

from pipeline.ops.allocation import ENVIRONMENT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no mallopt")
STORY = """
import sys, threading, torch
from pipeline.benchmark.memory import current_bytes
from pipeline.ops.allocation import keep_freed_memory

def story():
    before = current_bytes()
    tensors = [torch.ones(20 << 20) for _ in range(3)]
    held = current_bytes() - before
    tensors.clear()
    print(held, current_bytes() - before)

if "keep" in sys.argv:
    assert keep_freed_memory()
if "thread" in sys.argv:
    thread = threading.Thread(target=story)
    thread.start()
    thread.join()
else:
    story()
"""


def share_left(*words: str, **environment: str) -> float:
    """Of 240 MB in three tensors that a process has freed, the share that it still holds."""
    command = [sys.executable, "-c", STORY, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    held, left = (int(word) for word in done.stdout.split())
    assert held >= 3 * 80 << 20
    return left / held


def test_freed_memory_stays_with_the_main_thread_that_asks_for_it() -> None:
    assert share_left() < 0.1
    assert share_left("keep") > 0.9


def test_freed_memory_stays_with_all_threads_of_a_process_that_is_started_so() -> None:
    assert share_left("thread", "keep") < 0.1
    assert share_left("thread", **ENVIRONMENT) > 0.9
