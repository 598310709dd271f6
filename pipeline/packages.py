"""Packages that only some settings need."""


class MissingPackageError(ImportError):
    """One of them is not installed; the message says what needs it and how to get it."""
