"""What a person sees of a run: one line on a terminal, plain lines elsewhere."""

import contextlib
import os
from dataclasses import replace
from typing import Any

import pytest

from pipeline.training.live import Display, View, last_measured, live_line
from pipeline.training.observers import Tick
from tests.terminal import screen, terminal
from tests.test_training_observers import a_tick

PARTS = ["kimg 4.0/8", "0m12s ago", "restarts 2", "left 0m08s", "sec/kimg 5.00", "img/s 200.0", "wait 1.4%"]
PARTS += ["D 1.000 G 0.500 r1 0.100", "fid 12.5"]


def unmeasured(images_seen: int) -> Tick:
    return replace(a_tick(images_seen), results=[])


def test_the_line_says_all_where_there_is_room() -> None:
    line = live_line(View("", 12.0, unmeasured(4000), "fid 12.5", 2), 200)
    assert sorted(line.split("  ")) == sorted(PARTS)


@pytest.mark.parametrize("columns", range(1, 150, 7))
def test_a_narrow_terminal_leaves_whole_parts_out(columns: int) -> None:
    line = live_line(View("", 12.0, unmeasured(4000), "fid 12.5", 2), columns)
    assert len(line) <= columns
    assert line.startswith("kimg 4.0/8"[:columns])
    if columns > len("kimg 4.0/8"):
        assert set(line.split("  ")) <= set(PARTS)


def test_it_says_for_what_it_waits() -> None:
    assert live_line(View("the workers to start", 75.0), 80) == "waiting 1m15s for the workers to start"
    line = live_line(View("the workers to start", 3.0, unmeasured(4000), "", 1), 80)
    assert line == "kimg 4.0/8  waiting 0m03s for the workers to start  restarts 1"


def test_the_last_distance_of_a_log() -> None:
    log: list[dict[str, Any]] = [{"results": [{"metric": "fid", "value": 12.34}]}, {"results": []}]
    assert last_measured(log) == "fid 12.3"
    assert last_measured([]) == ""


def test_elsewhere_each_tick_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display("the first tick") as display:
        display.tick(unmeasured(0))
        display.tick(a_tick(1000))
        display.restarted("worker 1: died", "the workers to start")
        display.wait_for("the workers to start")
        display.tick(unmeasured(2000))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "waiting for the first tick"
    assert "kimg     0.0/8" in lines[1] and "restarts" not in lines[1]
    assert lines[2].endswith("fd_test 12.5")
    assert lines[3:5] == ["restart 1: worker 1: died", "waiting for the workers to start"]
    assert "kimg     2.0/8" in lines[5] and lines[5].endswith("last fd_test 12.5  restarts 1")
    assert len(lines) == 6
    assert "\r" not in "".join(lines)


def test_on_a_terminal_there_is_one_line_and_what_others_print_stays_above_it() -> None:
    with terminal(70) as term:
        with os.fdopen(os.dup(term.slave), "w", buffering=1) as out, contextlib.redirect_stdout(out):
            print("before")
            with Display("the first tick") as display:
                term.wait_for("wait", lambda text: "for the first tick" in text, 5)
                display.tick(unmeasured(1000))
                print("the store is away")
                display.tick(a_tick(2000))
                display.restarted("worker 1: died", "the workers to start")
                display.tick(unmeasured(3000))
                before = len(term.output)
                # It moves though nothing happens.
                term.wait_for("next second", lambda text: "kimg 3.0/8  0m01s ago" in text[before:], 5)
                live = screen(term.output)
                display.tick(unmeasured(4000))
            print("after")
    assert live[:2] == ["before", "the store is away"] and "kimg     2.0/8" in live[2]
    assert live[3] == "restart 1: worker 1: died"
    assert live[4].startswith("kimg 3.0/8  0m01s ago") and len(live) == 5
    assert len(live[4]) < 70
    after = term.screen()
    assert "kimg     4.0/8" in after[4] and after[5:] == ["after", ""]  # the live line is gone, the last tick stays


def test_a_terminal_that_does_not_know_its_size_gets_a_line_of_usual_width() -> None:
    with terminal(0, rows=0) as term:
        with os.fdopen(os.dup(term.slave), "w", buffering=1) as out, contextlib.redirect_stdout(out):
            with Display("the first tick, and much else " * 5):
                term.wait_for("line", lambda text: "for the first tick" in text, 5)
    assert max(len(piece.rstrip()) for piece in term.output.split("\r")) == 79
