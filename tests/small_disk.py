"""A disk so small that a test can fill it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """Mounts a disk of that size in memory (decimal MB); skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={int(megabytes * 1e6)}"
    if os.geteuid() != 0:
        pytest.skip("only root can mount the small disk that this fills")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine mounts no small disk to fill: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Takes all room that is left on a disk, with one file; deleting it gives the room back."""
    filler = disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], capture_output=True)
    return filler
