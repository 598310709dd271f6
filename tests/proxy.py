"""A TCP proxy in front of an HTTP server that logs requests and spoils answers as a network or a busy store does.

Requests are forwarded byte by byte as they came: S3 signatures cover the Host header, which stays the proxy's.
"""

import contextlib
import http.client
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    query: str
    range: str
    """The Range header, or empty."""


@dataclass(frozen=True)
class Fault:
    """What happens to one answer.

    status: the proxy answers with an error itself. delay: the answer comes after `seconds`. stall: it stops
    for good after a share of its body. reset: the connection is reset there; truncate: it is closed there.
    short: Content-Length names only that share, and the connection lives on. unmeasured: the same share, with
    no Content-Length at all and the end of the connection as the end of the body. endless: the same, but that end
    never comes. garbage: what comes is no HTTP.
    flip: one bit of the body is wrong.
    """

    kind: Literal["status", "delay", "stall", "reset", "truncate", "short", "unmeasured", "endless", "garbage", "flip"]
    share: float = 0.5
    """Of the body that is sent; with 0 a stall, reset or truncate sends nothing, not even the head."""
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0


@dataclass(frozen=True)
class _Answer:
    status_line: str
    headers: list[tuple[str, str]]
    body: bytes

    def encoded(self, share: float = 1.0, length: int | None = -1) -> bytes:
        """The bytes of the answer; `length` is what it claims to have, None no claim, -1 the truth."""
        claimed = len(self.body) if length == -1 else length
        headers = [f"{name}: {value}" for name, value in self.headers]
        headers.append("Connection: close" if claimed is None else f"Content-Length: {claimed}")
        return "\r\n".join([self.status_line, *headers, "", ""]).encode("latin-1") + self.part(share)

    def part(self, share: float) -> bytes:
        return self.body[: int(len(self.body) * share)]


class FaultProxy:
    """Stands at `endpoint` in front of `target`. `plan` says which answers are spoiled."""

    def __init__(self, target: str, tls: ssl.SSLContext | None = None) -> None:
        """target: http://host:port. tls: what clients are served with, else plain HTTP."""
        parts = urlsplit(target)
        self._target = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._tls = tls
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[Request] = []
        self.unreachable = threading.Event()
        """Set when the target could not be reached or broke off."""
        self.stalled = threading.Event()
        """Set when an answer has come to the place where it stalls."""
        self.connections = 0
        """Made so far by clients."""
        self._faults: deque[Fault] = deque()
        self._matches: Callable[[Request], bool] = lambda request: True
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._clients: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def plan(self, faults: list[Fault], matches: Callable[[Request], bool] = lambda request: True) -> None:
        """The next requests that match meet these faults, one each; then all goes well again."""
        with self._lock:
            self._faults, self._matches = deque(faults), matches

    @property
    def pending(self) -> int:
        """Planned faults that have not happened yet."""
        return len(self._faults)

    def close(self) -> None:
        """Ends all connections, and takes no more."""
        self._closing.set()
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Ends all connections, as servers do with idle ones."""
        with self._lock:
            for client in self._clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                with self._lock:
                    self._clients.add(client)
                    self.connections += 1
                threading.Thread(target=self._serve, args=(client,), name="proxy", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """All requests of one connection, until either side or a fault ends it."""
        with client, contextlib.suppress(OSError):
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            while (raw := _read_request(client)) is not None and self._answer(client, raw):
                pass
        with self._lock:
            self._clients.discard(client)

    def _answer(self, client: socket.socket, raw: bytes) -> bool:
        """Whether the connection may go on."""
        request = _parsed(raw)
        with self._lock:
            self.requests.append(request)
            fault = self._faults.popleft() if self._faults and self._matches(request) else None
        if fault is not None and fault.kind == "status":
            client.sendall(_error(fault.status, fault.code).encoded())
            return True
        if fault is not None and fault.kind == "delay":
            self._closing.wait(fault.seconds)
        try:
            answer = self._ask(request, raw)
        except (OSError, http.client.HTTPException):
            self.unreachable.set()
            return False
        if request.method == "HEAD":  # its Content-Length is that of a body which does not follow
            client.sendall(answer.encoded(0, int(dict(answer.headers).get("X-Length", 0))))
            return True
        if fault is None or fault.kind == "delay":
            client.sendall(answer.encoded())
            return True
        return self._spoil(client, answer, fault)

    def _ask(self, request: Request, raw: bytes) -> _Answer:
        with socket.create_connection(self._target) as server:
            server.sendall(raw)
            found = http.client.HTTPResponse(server, method=request.method)
            found.begin()
            body = found.read()
            version = "HTTP/1.1"
            skipped = {"content-length", "transfer-encoding", "connection"}
            headers = [(name, value) for name, value in found.getheaders() if name.lower() not in skipped]
            if request.method == "HEAD":
                headers.append(("X-Length", found.getheader("Content-Length") or "0"))
            return _Answer(f"{version} {found.status} {found.reason}", headers, body)

    def _spoil(self, client: socket.socket, answer: _Answer, fault: Fault) -> bool:
        """Sends what the fault lets through; whether the connection goes on."""
        part = answer.part(fault.share)
        if fault.kind == "garbage":
            client.sendall(b"\x00\x01 nothing that is HTTP\r\n\r\n")
            return False
        if fault.kind == "flip":
            middle = len(answer.body) // 2
            wrong = answer.body[:middle] + bytes([answer.body[middle] ^ 1]) + answer.body[middle + 1 :]
            client.sendall(_Answer(answer.status_line, answer.headers, wrong).encoded())
            return True
        if fault.kind in ("short", "unmeasured"):
            client.sendall(answer.encoded(fault.share, len(part) if fault.kind == "short" else None))
            return fault.kind == "short"
        if fault.share > 0:
            client.sendall(answer.encoded(fault.share, None if fault.kind == "endless" else -1))
        if fault.kind in ("stall", "endless"):
            self.stalled.set()
            with contextlib.suppress(OSError):
                client.recv(1)  # until the client goes away
        if fault.kind == "reset":
            time.sleep(0.02)  # a reset throws away what the client has not yet taken: let it see the part
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False


@contextlib.contextmanager
def fault_proxy(target: str, tls: ssl.SSLContext | None = None) -> Iterator[FaultProxy]:
    """A proxy that ends with the block."""
    proxy = FaultProxy(target, tls)
    try:
        yield proxy
    finally:
        proxy.close()


def is_shard(request: Request) -> bool:
    """For `plan`: requests for row groups."""
    return request.method == "GET" and ".parquet" in request.path


def _read_request(client: socket.socket) -> bytes | None:
    """One request with its body, of a known length or in chunks; None where the client has ended the connection."""
    raw = b""
    while HEAD_END not in raw:
        more = client.recv(65536)
        if not more:
            return None
        raw += more
    head, _, body = raw.partition(HEAD_END)
    if _header(head, "expect").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    chunked, length = "chunked" in _header(head, "transfer-encoding"), int(_header(head, "content-length") or 0)
    while not _all_chunks(body) if chunked else len(body) < length:
        more = client.recv(65536)
        if not more:
            return None
        body += more
    return head + HEAD_END + body


def _all_chunks(body: bytes) -> bool:
    """Whether a body in chunks has come to its end: a chunk of no bytes, trailers, and an empty line."""
    start = 0
    while (end := body.find(b"\r\n", start)) >= 0:
        size = int(body[start:end].partition(b";")[0], 16)
        if size == 0:
            return body.find(HEAD_END, start) >= 0
        start = end + 2 + size + 2
        if start > len(body):
            return False
    return False


def _parsed(raw: bytes) -> Request:
    head = raw.partition(HEAD_END)[0]
    method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    parts = urlsplit(path)
    return Request(method, parts.path, parts.query, _header(head, "range"))


def _header(head: bytes, name: str) -> str:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        found, _, value = line.partition(":")
        if found.strip().lower() == name:
            return value.strip()
    return ""


def _error(status: int, code: str) -> _Answer:
    """As S3 words it."""
    message = "Please reduce your request rate." if code == "SlowDown" else "We encountered an internal error."
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return _Answer(f"HTTP/1.1 {status} {code}", [("Content-Type", "application/xml")], text.encode())
