"""G's forward and its backward as CUDA graphs: two launches instead of some hundred.

It pays where pictures are so small that the GPU waits for Python, 32x32 say. A graph is a recording: it computes in
the same memory each time, for inputs of the recorded shapes. All gradients are ready at its end, so with several
workers their sums no longer begin during the backward pass.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 0.01
"""Of the largest number, between a module and its recording: sums may take another order, and bfloat16 rounds them."""

REMEDY = "set train.cuda_graphs=false"

Inputs = tuple[Tensor, ...]
Context = Callable[[], AbstractContextManager[Any]]


class GraphError(RuntimeError):
    """A module cannot be recorded, or its recording computes something else."""


class Called(nn.Module):
    """A module in the context that training calls it in, which its backward pass is not in."""

    def __init__(self, module: nn.Module, context: Context) -> None:
        super().__init__()
        self.module, self.context = module, context

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.context():
            return self.module(*inputs)


def record(module: nn.Module, draw: Callable[[int], Inputs], context: Context) -> None:
    """From now on the module's forward replays a recording for inputs of one kind, and computes as before for others.

    draw: inputs by number, of one kind, on CUDA; draw(0) is recorded and must be nobody else's, draw(1) is compared.
    context: what training calls the module in; autocast there must not cache.
    A replay writes over the result of the one before, over its gradients as well: none may be added to another's.
    The parameters have to stay where they are in memory. Differentiable once.

    Raises:
        GraphError: it cannot be recorded, or computes something else. What torch began is not undone: this process
            should not go on.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def results() -> list[Tensor]:
        result = called(*draw(1))
        found = [result, *torch.autograd.grad(result, parameters, torch.ones_like(result))]
        return [tensor.detach().clone() for tensor in found]

    computed, called, inputs = module.forward, Called(module, context), draw(0)
    expected = results()  # and whatever is chosen or compiled at first use
    gc.collect()  # what is left of that pass would be waited for in the recording
    try:
        torch.cuda.make_graphed_callables(called, inputs)
        found = results()
    except Exception as error:
        raise GraphError(f"the generator cannot be recorded as CUDA graphs: {error}; {REMEDY}") from error
    if not all(_alike(one, other) for one, other in zip(found, expected, strict=True)):
        raise GraphError(f"the generator's CUDA graphs compute something else than the generator; {REMEDY}")
    module.forward = by_kind(inputs, called.forward, computed)


def by_kind(inputs: Inputs, replayed: Callable[..., Any], computed: Callable[..., Any]) -> Callable[..., Any]:
    """`replayed` for inputs of these shapes and dtypes on this device and nothing by keyword, `computed` for others."""
    wanted = _kind(inputs)

    def forward(*given: Any, **options: Any) -> Any:
        return replayed(*given) if not options and _kind(given) == wanted else computed(*given, **options)

    return forward


def _kind(inputs: tuple[Any, ...]) -> list[Any]:
    return [(one.shape, one.dtype, one.device) if isinstance(one, Tensor) else one for one in inputs]


def _alike(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().amax() <= TOLERANCE * expected.abs().amax())
