import pytest
import torch

from pipeline.ops.precision import full_fp32


def test_cudnn_stays_on_and_everything_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    with pytest.raises(ZeroDivisionError), full_fp32():
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.enabled == before[1]
        raise ZeroDivisionError
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == before
