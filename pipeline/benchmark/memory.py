"""Peak memory of this process (CPU) or of a device (CUDA), counted anew from a moment of one's choice."""

import contextlib
import ctypes
import re
from pathlib import Path

import torch

CPU = torch.device("cpu")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device = CPU) -> bool:
    """From now on `peak_bytes` tells the peak of what follows.

    Returns False where the system does not let the peak be forgotten: `peak_bytes` is then the whole process's.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps is no part of what is held
    try:
        _CLEAR_REFS.write_text("5")  # Linux: the high-water mark falls to what is resident now
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device = CPU) -> int:
    """Most bytes held at once since `reset_peak`: resident memory (CPU), or torch's tensors (CUDA)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def current_bytes(device: torch.device = CPU) -> int:
    """Bytes held at this moment, counted as `peak_bytes` counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes; 0 where there is no such file (not Linux)."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0
