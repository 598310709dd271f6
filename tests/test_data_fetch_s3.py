import functools
import http.client
import http.server
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.exceptions as boto  # type: ignore[import-untyped]
import pyarrow.fs as pafs
import pytest

from pipeline.data import fetch_s3
from pipeline.data.fetch import Fetcher
from pipeline.data.fetch_errors import ClosedError, TruncatedError
from pipeline.storage import MissingError, StorageConfig, StorageError, write_bytes
from tests.proxy import Fault, FaultProxy, fault_proxy
from tests.servers import S3Server, free_ports

CONTENT = os.urandom(400_000)
START, LENGTH = 1_000, 300_000


@pytest.mark.parametrize(
    "error",
    [
        *(fetch_s3.Refusal(status) for status in (307, 408, 429, 500, 502, 503, 504)),
        fetch_s3.Refusal(400, "RequestTimeout"),
        fetch_s3.Refusal(400, "SlowDown"),
        boto.CredentialRetrievalError(provider="x", error_msg="x"),
        boto.EndpointConnectionError(endpoint_url="x"),
        boto.ReadTimeoutError(endpoint_url="x"),
        http.client.IncompleteRead(b"", 5),
        http.client.BadStatusLine("x"),
        ConnectionResetError(),
        socket.gaierror(),
        TimeoutError(),
        ssl.SSLError(),
        fetch_s3.ShortAnswer(),
    ],
)
def test_what_passes_is_tried_again(error: Exception) -> None:
    assert fetch_s3.is_passing(error)


@pytest.mark.parametrize(
    "error",
    [
        *(fetch_s3.Refusal(status) for status in (200, 301, 400, 401, 403, 404, 416, 501)),
        boto.NoCredentialsError(),
        boto.SSLError(endpoint_url="x", error="certificate"),
        ssl.SSLCertVerificationError(),
        StorageError("x"),
        MissingError("x"),
        ClosedError("x"),
        ValueError("a bug"),
    ],
)
def test_what_stays_is_not(error: Exception) -> None:
    assert not fetch_s3.is_passing(error)


@pytest.mark.parametrize(
    "header, size", [("bytes 4-99/100", 100), ("bytes */7", 7), ("bytes 4-99/*", None), ("", None), (None, None)]
)
def test_the_size_in_a_content_range(header: str | None, size: int | None) -> None:
    assert fetch_s3._total(header) == size


@pytest.fixture(scope="module")
def folder(s3: S3Server) -> str:
    uri = f"s3://{s3.new_bucket()}/data"
    write_bytes(f"{uri}/file", CONTENT, StorageConfig())
    return uri


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint) as proxy:
        yield proxy


def patient(proxy: FaultProxy) -> StorageConfig:
    return short_tempered(proxy, request_timeout_s=30, total_timeout_s=60)


def short_tempered(proxy: FaultProxy, **changes: Any) -> StorageConfig:
    values = {"endpoint": proxy.endpoint, "request_timeout_s": 0.3, "total_timeout_s": 20} | changes
    return StorageConfig.model_validate(values)


@pytest.fixture
def fetcher(folder: str, proxy: FaultProxy) -> Iterator[Fetcher]:
    """One that counts: no moment in which the machine is busy makes it ask twice."""
    one = Fetcher(folder, patient(proxy), 4)
    yield one
    one.close()


@pytest.fixture
def hasty(folder: str, proxy: FaultProxy) -> Iterator[Fetcher]:
    one = Fetcher(folder, short_tempered(proxy), 4)
    yield one
    one.close()


@pytest.mark.integration
def test_a_read_is_one_request_and_nothing_else(fetcher: Fetcher, proxy: FaultProxy) -> None:
    ranges = [(0, 1), (START, LENGTH), (len(CONTENT) - 1, 1), (0, len(CONTENT))]
    for offset, length in ranges:
        assert fetcher.read("file", offset, length) == CONTENT[offset : offset + length]
    assert [(request.method, request.range) for request in proxy.requests] == [
        ("GET", f"bytes={offset}-{offset + length - 1}") for offset, length in ranges
    ]
    assert fetcher.requests == len(ranges) and fetcher.bytes_read == sum(length for _, length in ranges)


@pytest.mark.integration
def test_threads_share_a_pool_of_connections(fetcher: Fetcher, proxy: FaultProxy) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda at: fetcher.read("file", at, 1000), range(0, 60_000, 1000)))
    assert b"".join(found) == CONTENT[:60_000]
    assert len(proxy.requests) == 60 and proxy.connections <= 4


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for 127.0.0.1, in a file beside its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the command openssl, which makes the certificate, is missing")
    certificate = tmp_path_factory.mktemp("tls") / "certificate.pem"
    key = certificate.with_name("key.pem")
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    command += ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return certificate


def encrypting(certificate: Path) -> ssl.SSLContext:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, certificate.with_name("key.pem"))
    return server


@pytest.mark.integration
def test_encrypted_connections_are_checked(
    s3: S3Server, folder: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fault_proxy(s3.endpoint, encrypting(certificate)) as proxy:
        distrusting = Fetcher(folder, short_tempered(proxy), 1)
        with pytest.raises(StorageError, match="CERTIFICATE_VERIFY_FAILED"):
            distrusting.read("file", 0, 10)
        assert distrusting.requests == 0 and proxy.connections == 1
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        fetcher = Fetcher(folder, short_tempered(proxy), 1)
        assert fetcher.read("file", START, LENGTH) == CONTENT[START : START + LENGTH]
        for fault in (Fault("stall"), Fault("truncate")):
            proxy.plan([fault])
            assert fetcher.read("file", START, LENGTH) == CONTENT[START : START + LENGTH]
        proxy.plan([Fault("stall")] * 100)
        with ThreadPoolExecutor(1) as pool:
            hanging = pool.submit(fetcher.read, "file", 0, 1000)
            proxy.stalled.clear()
            assert proxy.stalled.wait(timeout=20)
            fetcher.close()
            with pytest.raises(ClosedError):
                hanging.result(timeout=10)


@pytest.mark.integration
@pytest.mark.parametrize("ended_by", ["time", "close"])
@pytest.mark.parametrize("encrypted", [True, False])
def test_what_was_broken_off_is_not_returned_and_never_as_ciphertext(
    s3: S3Server, folder: str, certificate: Path, monkeypatch: pytest.MonkeyPatch, encrypted: bool, ended_by: str
) -> None:
    """The end comes between the head of the first answer and its body, of which the most has arrived."""
    get_head, read = http.client.HTTPConnection.getresponse, http.client.HTTPResponse.read
    taken: list[bytes] = []

    def get_head_and_end(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        answer = get_head(connection)
        if fetcher.requests == 1:
            time.sleep(0.2)  # no event tells what lies in the kernel; without it the test shows less
            if ended_by == "close":
                fetcher.close()
            else:
                (limit,) = (one for one in threading.enumerate() if getattr(one, "function", None) is break_off)
                assert isinstance(limit, threading.Timer)
                limit.function(*limit.args)
        return answer

    def read_and_keep(answer: http.client.HTTPResponse, amount: int | None = None) -> bytes:
        taken.append(read(answer, amount))
        return taken[-1]

    break_off = fetch_s3._break_off
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    with fault_proxy(s3.endpoint, encrypting(certificate) if encrypted else None) as proxy:
        fetcher = Fetcher(folder, patient(proxy), 1)
        monkeypatch.setattr(http.client.HTTPConnection, "getresponse", get_head_and_end)
        monkeypatch.setattr(http.client.HTTPResponse, "read", read_and_keep)
        if ended_by == "close":
            with pytest.raises(ClosedError, match="was closed"):
                fetcher.read("file", 0, 50_000)
        else:
            assert fetcher.read("file", 0, 50_000) == CONTENT[:50_000]
            assert fetcher.requests == 2
        assert all(CONTENT.startswith(one) for one in taken if one), "what came through was not decrypted"
        fetcher.close()


@pytest.mark.integration
def test_connections_that_the_server_has_ended_are_not_used_again(fetcher: Fetcher, proxy: FaultProxy) -> None:
    fetcher.read("file", 0, 10)
    proxy.hang_up()
    fetcher.read("file", 0, 10)
    assert fetcher.requests == 2 and proxy.connections == 2


def test_without_a_region_aws_is_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pafs, "resolve_s3_region", lambda bucket: {"far": "eu-west-1"}[bucket])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    ranges = fetch_s3.S3Ranges("s3://far/data", StorageConfig(), 1)
    address = ranges._filesystem.sign("far/data/file", 60)
    assert address.startswith("https://far.s3.eu-west-1.amazonaws.com/data/file?X-Amz-Algorithm=AWS4-HMAC-SHA256&")
    open_to_all = fetch_s3.S3Ranges("s3://far/data", StorageConfig(anonymous=True), 1)
    assert open_to_all._filesystem.sign("far/data/a b", 60) == "https://far.s3.eu-west-1.amazonaws.com/data/a%20b"


FAULTS = [
    Fault("status", status=500, code="InternalError"),
    Fault("status", status=502, code="BadGateway"),
    Fault("status", status=503, code="SlowDown"),
    Fault("status", status=504, code="GatewayTimeout"),
    Fault("status", status=429, code="TooManyRequests"),
    Fault("delay", seconds=0.1),
    Fault("delay", seconds=0.6),
    Fault("stall", share=0),
    Fault("stall"),
    Fault("reset", share=0),
    Fault("reset"),
    Fault("truncate", share=0),
    Fault("truncate"),
    Fault("short"),
    Fault("unmeasured"),
    Fault("garbage"),
]


@pytest.mark.integration
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind}-{fault.share or fault.status}")
def test_one_fault_is_survived(hasty: Fetcher, proxy: FaultProxy, fault: Fault) -> None:
    proxy.plan([fault])
    began = time.monotonic()
    assert hasty.read("file", START, LENGTH) == CONTENT[START : START + LENGTH]
    assert time.monotonic() - began < 9, "longer than storage.request_timeout_s explains"
    assert proxy.pending == 0, "the fault did not happen"
    assert hasty.read("file", 0, 10) == CONTENT[:10], "the connection was left in disorder"
    assert {request.method for request in proxy.requests} == {"GET"}


@pytest.mark.integration
def test_a_row_of_faults_is_survived(fetcher: Fetcher, proxy: FaultProxy) -> None:
    proxy.plan([Fault("status"), Fault("reset"), Fault("truncate"), Fault("short")])
    assert fetcher.read("file", START, LENGTH) == CONTENT[START : START + LENGTH]
    assert fetcher.requests == 5 and fetcher.bytes_read == LENGTH


@pytest.mark.integration
def test_a_store_that_stays_down_is_given_up_in_bounded_time(folder: str, proxy: FaultProxy) -> None:
    fetcher = Fetcher(folder, short_tempered(proxy, total_timeout_s=3), 1)
    proxy.plan([Fault("status")] * 100)
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        fetcher.read("file", START, LENGTH)
    assert time.monotonic() - began < 10
    text = str(caught.value)
    bucket = folder.removeprefix("s3://").split("/")[0]
    for part in (f"bucket '{bucket}'", "key 'data/file'", "bytes 1000 to 300999", f"{fetcher.requests} attempts"):
        assert part in text
    # The last attempt may be cut by the end of the time.
    assert "at last with 503 SlowDown" in text or "at last with TimeoutError" in text
    assert "storage.total_timeout_s (now 3)" in text
    assert fetcher.requests > 2
    fetcher.close()


@pytest.mark.integration
@pytest.mark.parametrize("fault", [Fault("stall"), Fault("endless")], ids=lambda fault: fault.kind)
def test_bytes_that_only_drip_are_given_up_too(folder: str, proxy: FaultProxy, fault: Fault) -> None:
    fetcher = Fetcher(folder, short_tempered(proxy, total_timeout_s=1, request_timeout_s=30), 1)
    proxy.plan([fault] * 100)
    began = time.monotonic()
    with pytest.raises(StorageError, match="in 1 attempts over .* TimeoutError"):
        fetcher.read("file", START, LENGTH)
    assert time.monotonic() - began < 10
    fetcher.close()


def test_a_refused_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    storage = StorageConfig(endpoint=f"http://127.0.0.1:{free_ports(1)[0]}", total_timeout_s=0.8)
    fetcher = Fetcher("s3://bucket/data", storage, 1)
    with pytest.raises(StorageError, match="bucket 'bucket', key 'data/file'.*Connection refused"):
        fetcher.read("file", 0, 10)
    fetcher.close()


@pytest.mark.integration
@pytest.mark.parametrize("offset, length", [(len(CONTENT) - 5, 10), (len(CONTENT), 10), (10**9, 1)])
def test_a_file_that_is_too_short_is_no_fault_of_the_network(fetcher: Fetcher, offset: int, length: int) -> None:
    with pytest.raises(TruncatedError, match=f"has {len(CONTENT)} bytes, fewer than the {offset + length}") as caught:
        fetcher.read("file", offset, length)
    assert caught.value.size == len(CONTENT) and fetcher.requests == 1


@pytest.mark.integration
def test_what_is_missing_or_forbidden_is_asked_for_once(
    fetcher: Fetcher, folder: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingError, match="data/absent: nothing is stored"):
        fetcher.read("absent", 0, 10)
    assert fetcher.requests == 1
    storage = patient(proxy)
    for uri, words in (
        ("s3://no-such-bucket/data", "no bucket 'no-such-bucket'.*create it"),
        (folder, "refused access"),
    ):
        if uri == folder:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
        other = Fetcher(uri, storage, 1)
        with pytest.raises(StorageError, match=words) as caught:
            other.read("file", 0, 10)
        assert not isinstance(caught.value, MissingError) and "not-the-secret" not in str(caught.value)
        assert other.requests == 1
        other.close()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Fetcher(folder, storage, 1).read("file", 0, 10)


def test_a_service_that_gives_no_parts_is_told(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "file").write_bytes(CONTENT)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        storage = StorageConfig(endpoint=f"http://127.0.0.1:{server.server_port}", anonymous=True)
        fetcher = Fetcher("s3://bucket", storage, 1)
        with pytest.raises(StorageError, match="bucket/file: 200 RangeIgnored: the service does not give parts"):
            fetcher.read("file", 0, 10)
        assert fetcher.requests == 1
        server.shutdown()


@pytest.mark.integration
def test_close_ends_a_read_that_hangs(folder: str, proxy: FaultProxy) -> None:
    waiter = Fetcher(folder, StorageConfig(endpoint=proxy.endpoint), 2)
    proxy.plan([Fault("stall")] * 10)
    with ThreadPoolExecutor(2) as pool:
        hanging = [pool.submit(waiter.read, "file", 0, 1000) for _ in range(2)]
        assert proxy.stalled.wait(timeout=20)
        began = time.monotonic()
        waiter.close()
        for one in hanging:
            with pytest.raises(ClosedError):
                one.result(timeout=10)
    assert time.monotonic() - began < 5
    with pytest.raises(ClosedError):
        waiter.read("file", 0, 1000)


@pytest.mark.integration
def test_close_ends_a_read_that_pauses_between_attempts(
    folder: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_s3, "FIRST_WAIT_S", 1e6)
    monkeypatch.setattr(fetch_s3, "LONGEST_WAIT_S", 1e6)
    pausing = threading.Event()
    waiter = Fetcher(folder, StorageConfig(endpoint=proxy.endpoint, total_timeout_s=1e9), 2)
    waiter._source._retrying.before_sleep = lambda state: pausing.set()  # type: ignore[union-attr]
    proxy.plan([Fault("status")])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waiter.read, "file", 0, 1000)
        assert pausing.wait(timeout=20)
        waiter.close()
        with pytest.raises(ClosedError):
            waiting.result(timeout=10)


@pytest.mark.integration
def test_a_long_trouble_is_told_once(
    folder: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetch_s3, "FIRST_WAIT_S", 0.001)
    fetcher = Fetcher(folder, patient(proxy), 1)
    proxy.plan([Fault("status")] * 7)
    assert fetcher.read("file", 0, 10) == CONTENT[:10]
    assert [record.getMessage().startswith(f"{proxy.endpoint} keeps failing (503 ") for record in caplog.records] == [
        True
    ]
    fetcher.close()
