"""Memory on a CPU: what tensors have freed is kept for the next ones instead of given back to the system."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names and numbers of glibc's `mallopt`, see its manual page."""


def keep_freed_memory() -> bool:
    """From now on this process keeps what it has freed; True where the C library can be told so (glibc).

    glibc maps every large block anew and gives it back when it is freed, and the system zeroes its pages each time:
    the activations of a step, freed and wanted again a moment later. `jobs.benchmark generator` shows what it costs.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
    return False
