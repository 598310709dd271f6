"""What the threads of one process share: things made once for a key, and work on many items at once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Recent(Generic[Key, Value]):
    """Values by key, each made on first use; only the `keep` keys that were used last are held.

    A value that is let go lives on where a thread still uses it, so it must need no closing.
    """

    def __init__(self, make: Callable[[Key], Value], keep: int) -> None:
        self._make, self._keep = make, keep
        self._slots: OrderedDict[Key, _Slot[Value]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value:
        """The value; other threads wait for it only if they want the same key. Errors of making are not kept."""
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
            if len(self._slots) > self._keep:
                self._slots.popitem(last=False)
        with slot.lock:
            if not slot.values:
                slot.values.append(self._make(key))
            return slot.values[0]

    def clear(self) -> None:
        """Let all go."""
        with self._lock:
            self._slots.clear()


class _Slot(Generic[Value]):
    """Room for one value, empty until it is made."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: list[Value] = []


def concurrently(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Results in the order of the items. After an error, what has not begun is not begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
