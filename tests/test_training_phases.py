"""Phases: told in order to whoever measures, and without effect on training."""

import contextlib
from collections.abc import Iterator

import torch

from pipeline.training import phases as phase
from pipeline.training.state import build_state
from pipeline.training.step import Updates
from pipeline.training.world import World
from tests.small import SMALL_MODEL, small_train
from tests.test_training_step import CPU, pictures


class Diary:
    """Writes down which phases began, with their depth."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, str]] = []
        self.depth = 0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.entries.append((self.depth, name))
        self.depth += 1
        yield
        self.depth -= 1

    def outermost(self) -> list[str]:
        return [name for depth, name in self.entries if depth == 0]


def updated(diary: phase.Phases) -> dict[str, torch.Tensor]:
    settings = small_train(r1_interval=2)
    state = build_state(SMALL_MODEL, settings, 3, CPU)
    run = Updates(settings, SMALL_MODEL, 3, state, World(), CPU, diary)
    for number in range(2):
        run(pictures(8, seed=number))
    return state.tensors()


def test_an_update_goes_through_its_phases_in_order() -> None:
    diary = Diary()
    updated(diary)
    main = [phase.G_FOR_D, phase.D_MAIN, phase.D_MAIN, phase.OPTIMISERS]
    rest = [phase.G_FORWARD, phase.D_FOR_G, phase.G_BACKWARD, phase.OPTIMISERS, phase.EMA]
    assert diary.outermost() == [*main, phase.D_R1, *rest, *main, *rest]
    assert set(diary.outermost()) == set(phase.MEANING)


def test_watching_changes_nothing() -> None:
    watched, alone = updated(Diary()), updated(phase.unwatched)
    assert all(torch.equal(watched[name], alone[name]) for name in alone)


def test_unwatched_is_the_same_object_each_time() -> None:
    assert phase.unwatched(phase.EMA) is phase.unwatched(phase.D_MAIN)
