"""Tensors as they are at one moment, copied into memory that already is a safetensors file.

The one copy is what will be written: nothing is left to serialise, and a checkpoint costs its size in memory once.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Names that the format gives to dtypes.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8  # bytes of the widest dtype: data begins at a multiple of it


class Snapshot:
    """The memory of a checkpoint's files, kept from one to the next: new pages cost several times the copy itself."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, memoryview]:
        """Copies all tensors as they are now; from CUDA into pinned memory, all together, waited for once.

        Args:
            files: named tensors by the file that is to hold them, of any memory format.

        Returns: the bytes of each file, which hold until the next call.
        """
        devices = {value.device for tensors in files.values() for value in tensors.values() if value.is_cuda}
        contents = {}
        for file, tensors in files.items():
            head, places = layout(tensors)
            size = len(head) + sum(value.nbytes for value in tensors.values())
            buffer = self._buffer(file, size, pinned=bool(devices))
            content = buffer.numpy().data
            content[: len(head)] = head
            for name, value in tensors.items():
                start = places[name]
                place = buffer[start : start + value.nbytes].view(value.dtype).view(value.shape)
                place.copy_(value, non_blocking=True)
            contents[file] = content
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return contents

    def _buffer(self, file: str, size: int, pinned: bool) -> Tensor:
        known = self._buffers.get(file)
        if known is None or known.nbytes != size:
            self._buffers[file] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._buffers[file]


def layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file of these tensors, and the byte of the file at which each tensor begins.

    The head is 8 bytes with the length of the JSON after them, which says dtype, shape and place of each tensor.
    Tensors of wider dtypes come first, so that all are aligned.

    Raises:
        TypeError: a tensor's dtype has no name here.
    """
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} is {value.dtype}; a checkpoint holds {', '.join(map(str, DTYPES))}")
        start, end = end, end + value.nbytes
        entries[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + entry["data_offsets"][0] for name, entry in entries.items()}
