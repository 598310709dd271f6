"""What can be wrong with a ranged read, beside the store: the file is too short, or the reader was closed."""

from pipeline.storage import StorageError


class TruncatedError(StorageError):
    """A file ends before the bytes that were asked for."""

    def __init__(self, message: str, size: int | None = None) -> None:
        super().__init__(message)
        self.size = size
        """Of the file in bytes, where the store told it."""


class ClosedError(StorageError):
    """The read was given up because its fetcher was closed."""


def truncated(place: str, offset: int, length: int, size: int | None) -> TruncatedError:
    """The error for a file of `size` bytes that should hold `length` bytes from `offset` on."""
    held = "has fewer" if size is None else f"has {size} bytes, fewer"
    return TruncatedError(f"{place}: {held} than the {offset + length} needed; restore it from a copy", size)
