"""G and D for several workers: how their gradients are summed, decided once for all backends.

- `DistributedDataParallel`, each module wrapped once for the whole training: the first update of a run and the
  first after a restart then sum alike.
- Gradients are views of the buckets: no second copy of them, and none to make.
- Buffers are never broadcast: G's and D's are constants, and the mean style is summed by hand.
- No parameter is unused, and DDP is told so: otherwise each backward searches the graph and sends a map of what
  was used. `r1_penalty` adds zero times the logits for the one bias that the penalty does not touch.
- DDP lays its buckets out anew after the first backward, in the order in which gradients became ready, and with
  three workers or more the layout decides in which order numbers are summed. A run that was restarted would
  differ in the last bit from one that was not (promise 5). So each wrapped module is rehearsed before training:
  one backward of nothing, after which the layout is final.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.training.world import World


def distribute(
    module: nn.Module, world: World, device: torch.device, rehearsal: Callable[[nn.Module], Tensor]
) -> nn.Module:
    """The module itself for one worker, else wrapped so that gradients are averaged over the workers.

    A collective call.

    rehearsal: calls the module as training does, on anything small; all parameters take part in what it returns.
    """
    if world.size == 1:
        return module
    device_ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, 2.11 knows no other
        wrapped = DistributedDataParallel(
            module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # DDP says so once, in any later backward, of a weight with a single row: its strides can be written in two ways.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    (rehearsal(wrapped).sum() * 0.0).backward()  # the next forward lays out the buckets anew, for good
    module.zero_grad(set_to_none=True)
    return wrapped


@contextlib.contextmanager
def synchronise(module: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward and backward of one part: gradients are summed over the workers in the last only."""
    if last or not isinstance(module, DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield
