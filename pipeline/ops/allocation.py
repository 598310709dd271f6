"""Memory on a CPU: what tensors have freed is kept for the next ones instead of given back to the system.

glibc maps every block of more than 32 MiB (at first of 128 KiB) anew and unmaps it when it is freed, and the system
zeroes its pages each time: the activations of a step, freed and wanted again a moment later. `jobs.benchmark generator`
shows what that costs.
"""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names and numbers of glibc's `mallopt`, see its manual page."""
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For a process to be started, all of whose threads then share one heap: those of their own are unmapped when empty."""


def keep_freed_memory() -> bool:
    """The main thread of this process keeps what it has freed, from now on; True where that can be had (glibc)."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
    return False
