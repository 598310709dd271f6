"""What is said when a file or a bucket cannot be used: the place, the cause in the user's words, and the fix."""

import errno
import os
import shutil
from pathlib import Path


class StorageError(RuntimeError):
    """A file or bucket could not be used; the message names it, the cause and the fix."""


class MissingError(StorageError, FileNotFoundError):
    """Nothing is stored under this URI, though its bucket can be reached."""


class UnavailableError(StorageError):
    """The store does not answer or cannot cope just now: the same call may succeed later."""


def explain_local(error: Exception, uri: str, path: Path, size: int | None) -> StorageError:
    """For a file of this machine. size: bytes that were to be written, where it was a write."""
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{uri}: there is no such file or folder; check the path")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        mount, free = disk_of(path)
        wanted = "" if size is None else f"{megabytes(size)} were to be written, "
        return StorageError(
            f"{uri}: the disk at {mount} is full: {wanted}{megabytes(free)} are free; "
            "make room there, or move to a larger disk"
        )
    return StorageError(f"{uri}: {' '.join(str(error).split())}; check the path")


def explain_remote(error: Exception, uri: str, bucket: str, endpoint: str | None, attempts: int) -> StorageError:
    """For an object on S3. Arrow tells S3's errors apart only in its text."""
    text, service = " ".join(str(error).split()), endpoint or "AWS S3"

    def says(*words: str) -> bool:
        return any(word in text for word in words)

    if says("NO_SUCH_BUCKET", "NoSuchBucket"):
        return StorageError(
            f"{uri}: there is no bucket {bucket!r} at {service}; create it, or check the URI, "
            f"storage.endpoint and storage.region"
        )
    denied = says("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE", "TOKEN", "HTTP status 403")
    if denied or isinstance(error, PermissionError):
        given = "AWS_ACCESS_KEY_ID" in os.environ and "AWS_SECRET_ACCESS_KEY" in os.environ
        fix = (
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what that key may do in the bucket"
            if given
            else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.anonymous=true if it is public"
        )
        return StorageError(f"{uri}: {service} refused access to bucket {bucket!r} ({text}); {fix}")
    if says("NETWORK_CONNECTION", "curlCode", "Could not connect", "REQUEST_TIMEOUT"):
        return UnavailableError(
            f"{uri}: {service} did not answer in {attempts} attempts ({text}); check that it runs, "
            f"storage.endpoint (now {endpoint or 'not set'}) and the network"
        )
    if says("SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "HTTP status 5"):
        return UnavailableError(
            f"{uri}: {service} failed in {attempts} attempts ({text}); it is overloaded, or there is no room "
            f"for bucket {bucket!r}: check its logs and its disks"
        )
    if isinstance(error, FileNotFoundError) or says("NO_SUCH_KEY"):
        return MissingError(f"{uri}: nothing is stored in bucket {bucket!r} under that key; check the URI")
    return StorageError(f"{uri}: {text}; check the URI, storage.region and the state of {service}")


def disk_of(path: Path) -> tuple[Path, int]:
    """Where the disk of a file is mounted, and the bytes that are free on it; the file need not exist."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    while not place.is_mount():
        place = place.parent
    return place, free


def megabytes(size: int) -> str:
    """1500 to `1.5 kB`, 2000000 to `2 MB`."""
    value, unit = (size / 1e6, "MB") if size >= 1e6 else (size / 1e3, "kB")
    return f"{value:,.1f}".removesuffix(".0") + f" {unit}"
