"""Recorded modules: replayed for the inputs they were recorded for, refused where the recording is wrong."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.graphs import Called, GraphError, by_kind, record
from pipeline.training.state import build_state
from pipeline.training.step import Updates
from pipeline.training.world import World
from tests.small import SMALL_MODEL, small_train
from tests.test_training_step import CPU, PATCHES, pictures

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")


def test_only_the_recorded_kind_is_replayed() -> None:
    recorded = (torch.zeros(4, 8), torch.zeros(2, dtype=torch.int64))
    forward = by_kind(recorded, lambda *given: "replayed", lambda *given, **options: "computed")
    assert forward(torch.ones(4, 8), torch.ones(2, dtype=torch.int64)) == "replayed"
    others: list[tuple[Any, ...]] = [
        (torch.ones(3, 8), recorded[1]),
        (torch.ones(4, 8).double(), recorded[1]),
        (recorded[0].to("meta"), recorded[1]),
        (recorded[0], None),
        recorded[:1],
    ]
    assert {forward(*other) for other in others} == {"computed"}
    assert forward(*recorded, truncation=0.5) == "computed"


def updates(device: torch.device, **train: Any) -> tuple[Updates, dict[str, Tensor]]:
    """A training before its first update, and where the generator's gradients of each update will be."""
    settings = small_train(batch_size=16, **train)
    state, found = build_state(SMALL_MODEL, settings, 3, device), dict[str, Tensor]()

    def note(*_: Any) -> None:
        for name, parameter in state.generator.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.clone()

    state.optimizer_generator.register_step_pre_hook(note)
    return Updates(settings, SMALL_MODEL, 3, state, World(), device), found


@pytest.mark.parametrize("train", [{}, {"accumulation": 2}])
def test_without_cuda_training_says_so_and_is_the_same(
    train: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, expected = updates(CPU, **train)
    plain(pictures(16))
    capsys.readouterr()
    asked, found = updates(CPU, cuda_graphs=True, **train)
    asked(pictures(16))
    assert "CUDA graphs: none, since training is on cpu" in capsys.readouterr().out
    assert found and found.keys() == expected.keys()
    assert [name for name, gradient in found.items() if not torch.equal(gradient, expected[name])] == []


def test_the_backward_pass_is_not_in_the_context() -> None:
    """Autocast of another dtype would be at work in it."""

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return gradients[0]

    seen: list[bool] = []
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda module, inputs, result: Noting.apply(result))
    called = Called(module, lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    called(torch.ones(1, 2)).sum().backward()
    assert seen == [True, False]
    assert dict(called.named_parameters()).keys() == {"module.weight", "module.bias"}


class Counting(nn.Module):
    """What a recording cannot know: a number of Python's that changes with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(2)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight * self.calls


@pytest.mark.gpu
@needs_gpu
def test_a_recording_that_computes_something_else_is_refused() -> None:
    module = Counting().cuda()
    with pytest.raises(GraphError, match="something else.*train.cuda_graphs=false"):
        record(module, lambda number: (torch.full((2,), number + 1.0, device="cuda"),), contextlib.nullcontext)
    assert "forward" not in vars(module)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recompute", ["none", "layer", "segment"])
@pytest.mark.parametrize("train", [{}, PATCHES], ids=["whole", "patches"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_training_by_recordings_has_the_same_gradients(
    precision: str, tolerance: float, train: dict[str, Any], recompute: str
) -> None:
    device = torch.device("cuda", 0)
    # Weights stay where they are: each update compares the gradients of other latents and noise.
    more = {"precision": precision, "recompute": recompute, "learning_rate": 1e-30, **train}
    (plain, expected), (recorded, found) = updates(device, **more), updates(device, cuda_graphs=True, **more)
    assert "forward" in vars(recorded.state.generator)
    for number in range(3):
        for run in (plain, recorded):
            run(pictures(16, seed=number).to(device))
        assert found and found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().amax() <= tolerance * gradient.abs().amax(), (number, name)
    theirs = plain.scalars()
    assert all(abs(value - theirs[name]) < 1e-2 for name, value in recorded.scalars().items())


@pytest.mark.gpu
@needs_gpu
def test_other_kinds_are_computed_as_before() -> None:
    run, _ = updates(torch.device("cuda", 0), cuda_graphs=True)
    generator, grid_P2 = run.state.generator, run.grid_P2
    z_BZ, keys_B2 = torch.randn(16, SMALL_MODEL.latent, device="cuda"), torch.ones(16, 2, device="cuda").long()
    with torch.no_grad():
        whole = generator(z_BZ, grid_P2, keys_B2).clone()
        part = generator(z_BZ[:3], grid_P2[:100], keys_B2[:3])
    torch.testing.assert_close(part, whole[:3, :100], rtol=1e-3, atol=1e-4)
