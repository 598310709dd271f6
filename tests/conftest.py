"""Fixtures that several rooms share."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import ddp
from tests.servers import S3Server, s3_server

# The same examples on every run, and no limit of time for one: a busy machine is not a failure.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# A shell starts what it puts in the background deaf to Ctrl-C, and all its children inherit that; tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray reads its token mode once a process: a cluster with another mode than the first loses its actors. So it is set for
# all tests; those with tokens have processes of their own.
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server; the environment of the session points to it, so `StorageConfig()` reaches it."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def ray_address(s3: S3Server) -> Iterator[str]:
    """Of a cluster, a head and two nodes of one CPU, for all tests that break none of its nodes.

    Starting one takes ten seconds. The store's keys are in the environment before, so that its nodes have them.
    """
    from tests.ray_nodes import ray_nodes  # most tests do without Ray

    with ray_nodes(2, cpus=1) as address:
        yield address


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors as small as tests have, more threads only wait for each other."""
    with ddp.one_thread():
        yield
