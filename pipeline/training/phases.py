"""Which part of an update the program is in, told to those who measure it. Training itself watches nothing."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

Phases = Callable[[str], AbstractContextManager[None]]
"""Called with a phase's name; the phase lasts as long as the context. Of nested phases the outermost counts."""

G_FOR_D = "G for D"
D_MAIN = "D main"
D_R1 = "D R1"
G_FORWARD = "G forward"
D_FOR_G = "D for G"
G_BACKWARD = "G backward"
OPTIMISERS = "optimisers"
EMA = "EMA"

MEANING = {
    G_FOR_D: "G without gradients: the pictures that D learns from",
    D_MAIN: "D's loss, forward and backward, on real and generated pictures",
    D_R1: "R1 whole, with its double backward and its own step of Adam",
    G_FORWARD: "G with gradients, mapping to RGB",
    D_FOR_G: "D forward on G's pictures",
    G_BACKWARD: "backward of G's loss: through D to its input, then through G",
    OPTIMISERS: "Adam of D and of G",
    EMA: "the running average of G's weights and of its mean style",
}
"""What is in each phase, in the order of an update. With several workers a backward ends with its all-reduce."""

_NOTHING = contextlib.nullcontext()


def unwatched(name: str) -> AbstractContextManager[None]:
    """Watches nothing: a microsecond an update."""
    return _NOTHING
