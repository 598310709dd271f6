"""Ranged reads from S3: one GET each, and one loop that decides what is tried again and for how long.

s3fs knows the credentials, the region and the addresses, and signs; the transfer is plain HTTP in the thread that
reads, straight into the bytes that it returns. That takes less than half of the CPU time of a read through s3fs,
whose other half is as much as decoding a tenth of a row group. It also leaves no other retries than those here:
three loops inside each other would multiply their attempts and hide how long a read really waited.
"""

import contextlib
import html
import http.client
import logging
import os
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit, urlunsplit

import botocore.exceptions as boto  # type: ignore[import-untyped]
import pyarrow.fs as pafs
import tenacity

from pipeline.data.fetch_errors import ClosedError, truncated
from pipeline.storage import StorageConfig, StorageError, endpoint_of, explained, fsspec_filesystem, join, region_of

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
"""Waits are drawn evenly from 0 to a bound that doubles between these: clients that failed together spread out."""
TELL_AT_ATTEMPT = 4
SIGNED_FOR_S = 3600
ERROR_BYTES = 65536

PASSING_STATUS = {307, 408, 429, 500, 502, 503, 504}
PASSING_CODES = {
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}

log = logging.getLogger(__name__)


class ShortAnswer(Exception):
    """An answer with fewer or more bytes than were asked for, though the object holds them."""


class Refusal(Exception):
    """An answer of S3 that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "", size: int | None = None) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code = status, code
        self.size = size
        """Of the object, where the answer tells it."""


class S3Ranges:
    """What `Fetcher` does for s3://."""

    def __init__(self, uri: str, storage: StorageConfig, connections: int) -> None:
        with explained(uri, storage):
            self._filesystem, folder = fsspec_filesystem(uri, _with_region(uri, storage), attempts=1)
        self._bucket, _, self._folder = folder.partition("/")
        self._storage, self._connections = storage, connections
        self._tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(connections)
        self._idle: list[http.client.HTTPConnection] = []
        self._under_way: set[socket.socket] = set()
        self.requests = 0
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_passing),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            stop=tenacity.stop_before_delay(storage.total_timeout_s),
            sleep=tenacity.sleep_using_event(self._closing),
            before_sleep=self._tell,
            reraise=True,
        )

    def read(self, file: str, offset: int, length: int, counted: bool) -> bytes:
        key = join(self._folder, file) if self._folder else file
        began, attempts = time.monotonic(), 0
        deadline = began + self._storage.total_timeout_s

        def once() -> bytes:
            nonlocal attempts
            attempts += 1
            with self._free_slot(deadline):
                return self._once(key, offset, length, max(deadline - time.monotonic(), 0.001), counted)

        try:
            return self._retrying(once)
        except Exception as error:
            if self._closing.is_set():  # whatever broke, `close` broke it
                raise ClosedError(f"s3://{self._bucket}/{key}: the fetcher was closed") from error
            if is_passing(error):
                place = f"key {key!r}, bytes {offset} to {offset + length - 1}"
                raise self._gave_up(place, attempts, time.monotonic() - began, error) from error
            self._raise_definite(error, key, offset, length)

    def close(self) -> None:
        """Safe from any thread. Reads that wait end with ClosedError; one that connects, when that is decided."""
        self._closing.set()
        with self._lock:
            for sock in self._under_way:
                _break_off(sock)
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    @contextlib.contextmanager
    def _free_slot(self, deadline: float) -> Iterator[None]:
        """Waits until fewer reads than `connections` are under way."""
        if not self._slots.acquire(timeout=max(deadline - time.monotonic(), 0)):
            raise TimeoutError(f"none of {self._connections} connections was free")
        try:
            if self._closing.is_set():
                raise ClosedError("closed")
            yield
        finally:
            self._slots.release()

    def _once(self, key: str, offset: int, length: int, seconds: float, counted: bool) -> bytes:
        """One attempt of at most so many seconds."""
        address = urlsplit(self._filesystem.sign(f"{self._bucket}/{key}", SIGNED_FOR_S))
        target = urlunsplit(("", "", address.path, address.query, ""))
        with self._connection(address, seconds) as connection:
            with self._lock:
                self.requests += counted
            wanted = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
            connection.request("GET", target, headers=wanted)
            answer = connection.getresponse()
            if answer.status != http.client.PARTIAL_CONTENT:
                raise _refusal(answer)
            data = answer.read(length)
            more = b"" if answer.isclosed() else answer.read(1)
            if len(data) == length and not more:
                return data
            size = _total(answer.headers["Content-Range"])
            if size is not None and len(data) < length and size < offset + length:
                raise truncated(f"s3://{self._bucket}/{key}", offset, length, size)
            raise ShortAnswer(f"{len(data)} bytes{' and more' if more else ''} came instead of {length}")

    @contextlib.contextmanager
    def _connection(self, address: SplitResult, seconds: float) -> Iterator[http.client.HTTPConnection]:
        """One that no other thread uses, and that is broken off after so many seconds."""
        connection = self._idle_connection() or self._new_connection(address, seconds)
        sock = connection.sock  # the connection forgets it at an answer which says that it is the last
        expired = threading.Event()
        # A socket's own limit is for each piece of an answer: one that drips would never reach it.
        limit = threading.Timer(seconds, _break_off, (sock, expired))
        limit.daemon = True
        limit.start()
        clean = False
        try:
            with self._lock:
                self._under_way.add(sock)
            if self._closing.is_set():  # it closed before it could see this connection
                raise ClosedError("closed")
            yield connection
            if expired.is_set() or self._closing.is_set():  # whatever came meanwhile, nobody vouches for it
                raise ClosedError("broken off")
            clean = True
        except Exception as error:
            if expired.is_set():
                raise TimeoutError(f"no complete answer in the last {seconds:.1f} s") from error
            raise
        finally:
            limit.cancel()
            with self._lock:
                self._under_way.discard(sock)
                if clean and not self._closing.is_set():
                    self._idle.append(connection)
                else:
                    connection.close()

    def _idle_connection(self) -> http.client.HTTPConnection | None:
        """One that is still open: servers close those that were idle for long."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if not _ended(connection):
                return connection
            connection.close()

    def _new_connection(self, address: SplitResult, seconds: float) -> http.client.HTTPConnection:
        limit = min(self._storage.connect_timeout_s, seconds)
        if address.scheme == "https":
            connection: http.client.HTTPConnection
            connection = http.client.HTTPSConnection(address.netloc, timeout=limit, context=self._tls)
        else:
            connection = http.client.HTTPConnection(address.netloc, timeout=limit)
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        connection.sock.settimeout(self._storage.request_timeout_s)
        return connection

    def _tell(self, state: tenacity.RetryCallState) -> None:
        """One line for a read that keeps failing, so that a training that waits is seen to wait for what."""
        if state.attempt_number == TELL_AT_ATTEMPT and state.outcome is not None:
            error, seconds = state.outcome.exception(), self._storage.total_timeout_s
            log.warning("%s keeps failing (%s); reads are retried for %g s", self._service(), told(error), seconds)

    def _gave_up(self, place: str, attempts: int, seconds: float, error: Exception) -> StorageError:
        return StorageError(
            f"bucket {self._bucket!r}, {place}: {self._service()} failed in {attempts} attempts over {seconds:.1f} s, "
            f"at last with {told(error)}; check that it runs, storage.endpoint (now "
            f"{endpoint_of(self._storage) or 'not set'}) and the network, or raise storage.total_timeout_s (now "
            f"{self._storage.total_timeout_s:g})"
        )

    def _raise_definite(self, error: Exception, key: str, offset: int, length: int) -> NoReturn:
        """Raises what will not pass in the words of `pipeline.storage`."""
        uri = f"s3://{self._bucket}/{key}"
        with explained(uri, self._storage):
            if isinstance(error, Refusal):
                if error.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise truncated(uri, offset, length, error.size) from error
                if error.code == "NoSuchBucket":
                    raise OSError(told(error)) from error
                if error.status == http.client.NOT_FOUND:
                    raise FileNotFoundError(told(error)) from error
                if error.status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
                    raise PermissionError(told(error)) from error
                raise OSError(told(error)) from error
            if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
                raise PermissionError(told(error)) from error
            if isinstance(error, boto.BotoCoreError | ssl.SSLError):
                raise OSError(told(error)) from error
        raise error

    def _service(self) -> str:
        return endpoint_of(self._storage) or "AWS S3"


def _with_region(uri: str, storage: StorageConfig) -> StorageConfig:
    """A signature names the bucket's region: where nobody has told it, AWS is asked, once."""
    if region_of(storage) is not None:
        return storage
    return storage.model_copy(update={"region": pafs.resolve_s3_region(urlsplit(uri).netloc)})


def is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed later."""
    if isinstance(error, Refusal):
        return error.status in PASSING_STATUS or error.code in PASSING_CODES
    if isinstance(error, StorageError | ssl.SSLCertVerificationError | boto.SSLError):
        return False
    # What botocore raises here comes from the service that it has the credentials from.
    credentials = (boto.CredentialRetrievalError, boto.HTTPClientError, boto.ConnectionError)
    return isinstance(error, (OSError, http.client.HTTPException, ShortAnswer, *credentials))


def told(error: BaseException | None) -> str:
    """The error in one line: S3's own status, code and message, or the kind of failure and its text."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Refusal) else f"{type(error).__name__}: {text}"


def _refusal(answer: http.client.HTTPResponse) -> Refusal:
    """What an answer other than the asked for bytes says. A whole object is left unread: it may be huge."""
    size = _total(answer.headers["Content-Range"])
    if answer.status == http.client.OK:
        return Refusal(answer.status, "RangeIgnored", "the service does not give parts of objects", size)
    text = answer.read(ERROR_BYTES).decode(errors="replace")
    found = [re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in ("Code", "Message")]
    code, message = (html.unescape(one[1]) if one else "" for one in found)
    return Refusal(answer.status, code or answer.reason, message, size)


def _total(content_range: str | None) -> int | None:
    """The object's size from a header like `bytes 4-99/100` or `bytes */100`."""
    size = (content_range or "").rpartition("/")[2]
    return int(size) if size.isdigit() else None


def _ended(connection: http.client.HTTPConnection) -> bool:
    """Whether the other side has closed an idle connection, or sends what nobody asked for."""
    if connection.sock is None:
        return True
    waiting = select.poll()
    waiting.register(connection.sock, select.POLLIN)
    return bool(waiting.poll(0))


def _break_off(sock: socket.socket, told: threading.Event | None = None) -> None:
    """Wakes a thread that waits for this socket: it finds its end; `told` is set before."""
    if told is not None:
        told.set()
    with contextlib.suppress(OSError):
        # Not SSLSocket.shutdown: that drops the encryption, and the thread would read on, ciphertext.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
