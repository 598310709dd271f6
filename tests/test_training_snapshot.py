"""The copy of a moment: byte for byte the file that the safetensors library would write, and nobody else's memory."""

from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.training.snapshot import DTYPES, Snapshot, layout

SHAPES = st.lists(st.integers(0, 3), max_size=4)


def a_tensor(dtype: torch.dtype, shape: list[int], seed: int = 0) -> Tensor:
    bits = torch.randint(0, 2, (*shape, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return bits.sum(-1).to(dtype)


def tensors_of(dtypes: list[torch.dtype]) -> st.SearchStrategy[dict[str, Tensor]]:
    one = st.builds(a_tensor, st.sampled_from(dtypes), SHAPES, st.integers(0, 99))
    names = st.text('ab."\\é', min_size=1, max_size=5)
    return st.dictionaries(names, one, max_size=5)


@given(tensors_of([torch.float32, torch.float64]))
def test_the_bytes_are_the_librarys(tensors: dict[str, Tensor]) -> None:
    assert bytes(Snapshot().take({"file": tensors})["file"]) == safetensors.torch.save(tensors)


@given(tensors_of(list(DTYPES)))
def test_every_dtype_comes_back(tensors: dict[str, Tensor]) -> None:
    loaded = safetensors.torch.load(bytes(Snapshot().take({"file": tensors})["file"]))
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value)


@given(tensors_of(list(DTYPES)))
def test_all_data_is_aligned(tensors: dict[str, Tensor]) -> None:
    head, places = layout(tensors)
    assert len(head) % 8 == 0
    assert all(place % tensors[name].element_size() == 0 for name, place in places.items())


def test_memory_formats_are_copied_as_shapes() -> None:
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    flipped = torch.randn(3, 4).T
    content = Snapshot().take({"file": {"flipped": flipped, "weight": weight}})["file"]
    loaded = safetensors.torch.load(bytes(content))
    assert torch.equal(loaded["weight"], weight) and torch.equal(loaded["flipped"], flipped)


def test_it_is_the_moment_and_not_the_future() -> None:
    value = torch.nn.Parameter(torch.zeros(5))
    content = Snapshot().take({"file": {"value": value}})["file"]
    with torch.no_grad():
        value.add_(1)
    assert torch.equal(safetensors.torch.load(bytes(content))["value"], torch.zeros(5))


def test_the_next_one_takes_the_same_memory() -> None:
    snapshot, value = Snapshot(), torch.zeros(1000)
    first = snapshot.take({"file": {"value": value}})["file"]
    second = snapshot.take({"file": {"value": value + 1}})["file"]
    assert bytes(first) == bytes(second)
    assert len(snapshot.take({"file": {"value": torch.zeros(2000)}})["file"]) > len(first)  # but not at any price


def test_a_dtype_that_is_not_known_is_named() -> None:
    tensors: dict[str, Any] = {"wave": torch.zeros(2, dtype=torch.complex64)}
    with pytest.raises(TypeError, match="wave is torch.complex64; a checkpoint holds torch.float64"):
        Snapshot().take({"file": tensors})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_copy_from_cuda_is_there_when_the_call_returns() -> None:
    value = torch.zeros(1 << 26, device="cuda")
    torch.cuda.synchronize()
    value += 1
    content = Snapshot().take({"file": {"value": value, "step": torch.ones((), device="cuda")}})["file"]
    value += 1
    loaded = safetensors.torch.load(bytes(content))
    assert torch.equal(loaded["value"], torch.ones(1 << 26)) and loaded["step"] == 1
