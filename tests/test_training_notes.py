"""Words beside a run's log: kept in order over restarts, within bounds, and never in training's way."""

import threading
import time
from pathlib import Path

import pytest

from pipeline.storage import StorageConfig
from pipeline.training import notes
from pipeline.training.notes import Word, kept_words, note_restart, one_line, read_restarts, read_words

STORAGE = StorageConfig()


def texts(folder: Path, rank: int = 0) -> list[str]:
    return [word.text for word in read_words(str(folder), STORAGE) if word.rank == rank]


def wait_until_kept(folder: Path, text: str, deadline_s: float = 10) -> None:
    deadline = time.monotonic() + deadline_s
    while text not in texts(folder):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{text!r} was not kept within {deadline_s:g} s")
        time.sleep(0.02)


def test_what_is_printed_is_kept_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.time()
    with kept_words(str(tmp_path), STORAGE, 0):
        print("the store is away")
        wait_until_kept(tmp_path, "the store is away")  # soon, not only at the end
        print("and back", "again", end="\n\n")
    print("not this")
    assert capsys.readouterr().out == "the store is away\nand back again\n\nnot this\n"
    words = read_words(str(tmp_path), STORAGE)
    assert [(word.rank, word.number, word.text) for word in words] == [
        (0, 1, "the store is away"),
        (0, 2, "and back again"),
    ]
    assert all(began - 0.01 <= word.time <= time.time() for word in words)


def test_each_worker_has_a_file_and_a_restarted_one_goes_on(tmp_path: Path) -> None:
    for rank, text in [(0, "first"), (1, "other"), (0, "second")]:
        with kept_words(str(tmp_path), STORAGE, rank):
            print(text)
    found = [(word.rank, word.number, word.text) for word in read_words(str(tmp_path), STORAGE)]
    assert found == [(0, 1, "first"), (0, 2, "second"), (1, 1, "other")]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    def talk(name: str) -> None:
        for number in range(30):
            print(f"{name} says {number}")

    with kept_words(str(tmp_path), STORAGE, 0):
        threads = [threading.Thread(target=talk, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(texts(tmp_path)) == sorted(f"{name} says {number}" for name in "abc" for number in range(30))


def test_only_the_latest_lines_stay(tmp_path: Path) -> None:
    for _ in range(2):
        with kept_words(str(tmp_path), STORAGE, 0):
            for number in range(notes.KEPT_LINES - 100):
                print(number)
    words = read_words(str(tmp_path), STORAGE)
    assert len(words) == notes.KEPT_LINES
    assert (words[-1].number, words[-1].text) == (2 * notes.KEPT_LINES - 200, str(notes.KEPT_LINES - 101))


def test_words_wait_for_a_store_that_is_away(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.write_text("in the way")
    with kept_words(str(run), STORAGE, 0):
        print("said while it was away")
        time.sleep(0.2)  # a try or more fails
        run.unlink()
        print("said when it was back")
        wait_until_kept(run, "said when it was back")
    assert texts(run) == ["said while it was away", "said when it was back"]


def test_a_damaged_file_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "rank-0.log").write_bytes(b"\xff\xfe nothing of ours\n")
    with kept_words(str(tmp_path), STORAGE, 0):
        print("good")
    assert texts(tmp_path) == ["good"]


def test_a_line_is_one_line() -> None:
    assert one_line("evaluate 10%\revaluate 100%\r\n") == "evaluate 100%"
    assert one_line("a\u2028b\tc\x0bd") == "a b c d"
    assert len(one_line("x" * 10_000)) == notes.LONGEST_LINE


def test_words_of_any_kind_come_back(tmp_path: Path) -> None:
    word = Word(3, 12, 1_700_000_000.125, "no checkpoint at 400 images: s3://b/k: ü 7 8")
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "rank-3.log").write_text(word.line() + "\n")
    (tmp_path / "workers" / ".rank-3.log.partial-7").write_text("half")
    assert read_words(str(tmp_path), STORAGE) == [word]
    assert read_words(str(tmp_path / "nothing"), STORAGE) == []


def test_restarts_are_noted_with_their_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.time()
    assert read_restarts(str(tmp_path), STORAGE) == []
    for cause in ("worker 1: killed", "resized: 1 to 2 workers"):
        note_restart(str(tmp_path), STORAGE, cause)
    found = read_restarts(str(tmp_path), STORAGE)
    assert [restart["cause"] for restart in found] == ["worker 1: killed", "resized: 1 to 2 workers"]
    assert all(began <= restart["time"] <= time.time() for restart in found)
    (tmp_path / "file").write_text("in the way")
    note_restart(str(tmp_path / "file" / "run"), STORAGE, "worker 0: killed")  # said, not raised
    assert "could not note the restart (worker 0: killed)" in capsys.readouterr().out
