"""Which precision is taken, and the sentence that says why."""

import pytest
import torch

from pipeline.training import precision
from pipeline.training.precision import (
    agreed_precision,
    forbid_tf32_for,
    native_bf16,
    precision_sentence,
    resolve_precision,
)
from pipeline.training.world import World

CPU = torch.device("cpu")


def test_precision_is_a_dtype() -> None:
    assert resolve_precision("fp32", CPU) == torch.float32
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    assert resolve_precision("auto", CPU) == (torch.bfloat16 if native_bf16(CPU) else torch.float32)
    assert agreed_precision("bf16", CPU, World()) == torch.bfloat16


@pytest.mark.parametrize(
    ("setting", "processor", "agreed", "sentence"),
    [
        ("auto", "the processor has avx512_bf16", torch.bfloat16, "bf16: the processor has avx512_bf16"),
        ("auto", None, torch.float32, "fp32: the processor has no bf16"),
        ("auto", "the processor has avx512_bf16", torch.float32, "fp32: not every worker has bf16"),
        ("bf16", None, torch.bfloat16, "bf16: train.precision=bf16"),
        ("fp32", "the processor has avx512_bf16", torch.float32, "fp32: train.precision=fp32"),
    ],
)
def test_the_sentence_gives_the_reason(
    monkeypatch: pytest.MonkeyPatch, setting: str, processor: str | None, agreed: torch.dtype, sentence: str
) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda device: processor)
    assert precision_sentence(setting, CPU, agreed) == f"matrix products in {sentence}"


def test_fp32_is_no_tf32_in_convolutions_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    forbid_tf32_for(torch.bfloat16)
    assert torch.backends.cudnn.allow_tf32
    forbid_tf32_for(torch.float32)
    assert not torch.backends.cudnn.allow_tf32
