"""A log's text on a terminal and elsewhere, as Ray hands it out: carriage returns come as ends of lines."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from pipeline.cluster.job_log import Screen

FRAMES = [f"ingest: {done:3d}%|{'#' * (done // 10)}| {done}/100 [00:01<00:02, 3.1it/s]" for done in (0, 50, 99)]
LINES = st.lists(st.sampled_from(["", "   ", "kimg   3.0/40  time 0m20s", *FRAMES]), max_size=12)


class Terminal(io.StringIO):
    """Says that it is one, and keeps what is written."""

    def isatty(self) -> bool:
        return True


def seen(written: str) -> list[str]:
    """The lines that stand on a terminal at the end."""
    lines = [""]
    for piece in re.split("(\n|\r\x1b\\[K)", written):
        if piece == "\n":
            lines.append("")
        elif piece == "\r\x1b[K":
            lines[-1] = ""
        else:
            lines[-1] += piece
    return lines


def shown(*pieces: str, out: io.StringIO | None = None) -> str:
    out = Terminal() if out is None else out
    screen = Screen(out)
    for piece in pieces:
        screen.write(piece)
    screen.end_line()
    return out.getvalue()


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted({min(place, len(text)) for place in places}), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def bar_text(**options: object) -> str:
    """What a real bar writes between two lines, as Ray tells it."""
    file = io.StringIO()
    file.write("before\n")
    for _ in tqdm(range(5), "ingest", file=file, mininterval=0, **options):  # type: ignore[call-overload]
        pass
    file.write("after\n")
    return file.getvalue().replace("\r", "\n")


@given(st.text(st.characters(exclude_characters="\r")), st.lists(st.integers(0, 50)))
def test_elsewhere_the_text_passes_as_it_is(text: str, places: list[int]) -> None:
    assert shown(*cut(text, places), out=io.StringIO()) == text


@given(LINES, st.booleans(), st.lists(st.integers(0, 400)))
def test_where_the_text_is_cut_does_not_matter(lines: list[str], ended: bool, places: list[int]) -> None:
    text = "\n".join(lines) + ("\n" if ended else "")
    assert shown(*cut(text, places)) == shown(text)


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)))
def test_lines_of_a_log_without_bars_pass_on_a_terminal_too(lines: list[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    assert shown(text) == text


def test_the_frames_of_a_bar_are_one_line_on_a_terminal() -> None:
    text = bar_text()
    written = shown(text)
    lines = seen(written)
    assert lines[0] == "before" and lines[2:] == ["after", ""]
    assert "100%|" in lines[1] and "5/5" in lines[1]
    assert written.count("\r\x1b[K") == text.count("ingest:") > 5, "each frame was shown in its turn"


def test_a_bar_that_takes_itself_away_leaves_nothing() -> None:
    assert seen(shown(bar_text(leave=False))) == ["before", "after", ""]


def test_a_bar_without_a_total_is_one_too() -> None:
    file = io.StringIO()
    for _ in tqdm(iter(range(3)), "list", file=file, mininterval=0):
        pass
    lines = seen(shown(file.getvalue().replace("\r", "\n")))
    assert len(lines) == 2 and "3it [00:00" in lines[0]


def test_elsewhere_each_frame_is_a_line() -> None:
    text = bar_text()
    written = shown(text, out=io.StringIO())
    assert written == text
    assert len([line for line in written.splitlines() if "%|" in line]) > 5
    assert "\r" not in written and "\x1b" not in written


def test_the_last_frame_stays_above_what_comes_next() -> None:
    assert seen(shown(f"\n{FRAMES[0]}\n{FRAMES[1]}\nworkers failed: x\n")) == [FRAMES[1], "workers failed: x", ""]
    assert seen(shown(f"{FRAMES[2]}\n\n{FRAMES[0]}\n")) == [FRAMES[2], FRAMES[0], ""]


def test_a_frame_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert seen(shown(FRAMES[1] + "\n")) == [FRAMES[1][:19], ""]


def test_carriage_returns_that_come_through_are_taken_as_ends() -> None:
    assert shown("a\rb\r\nc\n", out=io.StringIO()) == "a\nb\nc\n"
