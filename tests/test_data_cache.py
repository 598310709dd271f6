import errno
import hashlib
import logging
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.cache import LOCK, DiskCache


def content(number: int, size: int = 1000) -> tuple[str, bytes]:
    """The number-th of many different contents, and its key."""
    data = random.Random(number).randbytes(size)
    return hashlib.sha256(data).hexdigest(), data


def held(folder: Path) -> int:
    """Bytes in the folder, also of what is being written."""
    total = 0
    for path in folder.iterdir():
        if path.name != LOCK:
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def counted(folder: Path) -> int:
    return int((folder / LOCK).read_bytes())


def test_round_trip_also_by_another_process_s_cache(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "deep" / "cache", 10_000)
    key, data = content(1)
    assert cache.get(key) is None
    cache.put(key, data)
    cache.put(key, data)
    assert cache.get(key) == data and (cache.hits, cache.misses) == (1, 1)
    other = DiskCache(tmp_path / "deep" / "cache", 10_000)
    assert other.get(key) == data
    assert held(tmp_path / "deep" / "cache") == counted(tmp_path / "deep" / "cache") == 1000


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    DiskCache("~/cache", 10)
    assert (tmp_path / "cache" / LOCK).exists()


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 4_000)
    keys = [content(number)[0] for number in range(6)]
    for number in range(4):
        cache.put(*content(number))
    assert cache.get(keys[0]) is not None  # now 1 is the oldest
    cache.put(*content(4))
    # What is needed and a twentieth of the cache more: two entries.
    assert [cache.get(key) is not None for key in keys] == [True, False, False, True, True, False]
    cache.put(*content(5))
    assert [cache.get(key) is not None for key in keys] == [True, False, False, True, True, True]


@given(st.lists(st.tuples(st.integers(0, 15), st.booleans()), max_size=40), st.integers(1, 5_000))
def test_the_cap_holds_and_what_is_given_is_right(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[int, bool]], capacity: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = DiskCache(folder, capacity)
    for number, put in operations:
        key, data = content(number, 100 * number)
        if put:
            cache.put(key, data)
            fits = len(data) <= capacity
            assert (cache.get(key) == data) if fits else (cache.get(key) is None)
        else:
            assert cache.get(key) in (None, data)
        assert held(folder) <= capacity and counted(folder) == held(folder)


def test_a_flipped_bit_or_a_missing_end_is_found_and_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    key, data = content(1)
    for damaged in (data[:500] + bytes([data[500] ^ 1]) + data[501:], data[:-1], b""):
        cache.put(key, data)
        (tmp_path / key).write_bytes(damaged)
        assert cache.get(key) is None
        assert not (tmp_path / key).exists()
        cache.put(key, data)
        assert cache.get(key) == data


def test_a_wrong_total_is_counted_anew_before_anything_goes(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 3_000)
    for number in range(2):
        cache.put(*content(number))
    (tmp_path / LOCK).write_bytes(b"%020d" % 3_000)  # as a writer leaves it that died
    cache.put(*content(2))
    assert all(cache.get(content(number)[0]) for number in range(3))
    (tmp_path / LOCK).write_bytes(b"torn")
    DiskCache(tmp_path, 3_000)
    assert counted(tmp_path) == 3_000


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("thesis.partial", "notes.txt"):
        (tmp_path / name).write_bytes(b"x" * 5_000)
    cache = DiskCache(tmp_path, 2_000)
    for number in range(5):
        cache.put(*content(number))
    assert all((tmp_path / name).stat().st_size == 5_000 for name in ("thesis.partial", "notes.txt"))
    assert counted(tmp_path) <= 2_000


@pytest.mark.parametrize("capacity", [0, -5])
def test_a_cache_without_room_is_refused(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(ValueError, match=f"cache of {capacity} bytes"):
        DiskCache(tmp_path, capacity)


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "A" * 64, "a" * 63])
def test_a_key_that_is_no_hash_is_refused(tmp_path: Path, key: str) -> None:
    cache = DiskCache(tmp_path, 10)
    with pytest.raises(ValueError, match="not a SHA-256"):
        cache.get(key)
    with pytest.raises(ValueError, match="not a SHA-256"):
        cache.put(key, b"x")


CAPACITY, ENTRIES, WRITERS = 20_000, 40, 4


def hammer(folder: str, seed: int, operations: int) -> None:
    """One process of several that use a cache too small for what they want; exits with an error if it is wrong."""
    dice = random.Random(seed)
    cache = DiskCache(folder, CAPACITY)
    known = [content(number, 500 + 50 * number) for number in range(ENTRIES)]
    for _ in range(operations):
        key, data = dice.choice(known)
        found = cache.get(key)
        if found is None:
            cache.put(key, data)
        elif found != data:
            raise AssertionError("the cache gave something else")
    if not cache._usable or not cache.hits:
        raise AssertionError(f"{cache.hits} hits, usable: {cache._usable}")


def test_processes_hammering_one_small_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=hammer, args=(str(tmp_path), seed, 400)) for seed in range(WRITERS)]
    for worker in workers:
        worker.start()
    largest = 0
    while any(worker.is_alive() for worker in workers):
        largest = max(largest, held(tmp_path))
        workers[0].join(timeout=0.001)
        for worker in workers:
            worker.join(timeout=0.001)
    assert [worker.exitcode for worker in workers] == [0] * WRITERS
    # A look through the folder is no snapshot: it may count an entry under both of its names.
    assert largest <= CAPACITY + WRITERS * (500 + 50 * ENTRIES)
    assert held(tmp_path) <= CAPACITY
    cache = DiskCache(tmp_path, CAPACITY)
    assert counted(tmp_path) == held(tmp_path)
    for path in tmp_path.iterdir():
        assert path.name == LOCK or cache.get(path.name) == path.read_bytes()


WRITE_AND_HANG = """
import os, sys, time
from pipeline.data import cache as module
from tests.test_data_cache import content
cache = module.DiskCache(sys.argv[1], 10_000)
write = os.write
def half(descriptor, data):
    write(descriptor, data[: len(data) // 2])
    print("half", flush=True)
    time.sleep(600)
module.os.write = half
cache.put(*content(1))
"""


def test_a_writer_killed_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITE_AND_HANG, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"half\n"
    alive = DiskCache(tmp_path, 10_000)
    partial = [path for path in tmp_path.iterdir() if path.suffix == ".partial"]
    assert len(partial) == 1, "what a living process writes was swept"
    assert counted(tmp_path) == 1000
    key, data = content(1)
    assert alive.get(key) is None
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    after = DiskCache(tmp_path, 10_000)
    assert not partial[0].exists() and counted(tmp_path) == 0
    assert after.get(key) is None
    after.put(key, data)
    assert after.get(key) == data


def test_leftovers_make_room_before_entries_do(tmp_path: Path) -> None:
    """The sweep also runs when a cache that is open needs room."""
    cache = DiskCache(tmp_path, 3_000)
    cache.put(*content(1))
    leftover = tmp_path / f"{content(2)[0]}.0123abcd.partial"
    leftover.write_bytes(b"x" * 2_000)
    (tmp_path / LOCK).write_bytes(b"%020d" % 3_000)
    cache.put(*content(3))
    assert not leftover.exists()
    assert cache.get(content(1)[0]) and cache.get(content(3)[0])


def test_a_full_disk_makes_the_cache_step_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root can mount the small disk that this fills")
    try:
        cache = DiskCache(tmp_path, 1 << 20)
        with caplog.at_level(logging.WARNING):
            for number in range(20):
                cache.put(*content(number, 20_000))
        assert len(caplog.records) == 1
        assert os.strerror(errno.ENOSPC) in caplog.records[0].getMessage()
        assert str(tmp_path) in caplog.records[0].getMessage()
        assert cache.get(content(0, 20_000)[0]) is None, "it is out of use"
        assert not list(tmp_path.glob("*.partial")), "half of an entry was left on the full disk"
        assert DiskCache(tmp_path, 1 << 20).get(content(0, 20_000)[0]) == content(0, 20_000)[1]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_file_sizes_makes_it_step_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path, 1 << 20)
    cache.put(*content(1, 2_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    try:
        cache.put(*content(2, 9_000))
        cache.put(*content(3, 9_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record.args[1].errno for record in caplog.records] == [errno.EFBIG]  # type: ignore[index,union-attr]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("trouble", ["a file in the way", "gone"])
def test_a_folder_that_cannot_be_used_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    folder = tmp_path / "cache"
    if trouble == "gone":
        cache = DiskCache(folder, 5_000)
        (folder / LOCK).unlink()
        folder.rmdir()
    else:
        folder.write_text("x")
        cache = DiskCache(folder, 5_000)
    for number in range(3):
        cache.put(*content(number))
        assert cache.get(content(number)[0]) is None
    assert [record.getMessage().startswith(f"the cache in {folder} is not used") for record in caplog.records] == [True]
