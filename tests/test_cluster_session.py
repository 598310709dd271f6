"""Where Ray is looked for, and the time-outs that Ray Train is given."""

import os

import pytest

from pipeline.cluster.session import ELASTIC_TRY_S, is_local, set_timeouts
from pipeline.config import ClusterConfig
from pipeline.config_cluster import address_of

PREFIX = "RAY_TRAIN_"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test sets is taken back."""
    for name in ("RAY_ADDRESS", *(name for name in os.environ if name.startswith(PREFIX))):
        monkeypatch.delenv(name, raising=False)
    for name in ("WORKER_GROUP_START_TIMEOUT_S", "HEALTH_CHECK_INTERVAL_S", "WORKER_HEALTH_CHECK_TIMEOUT_S"):
        monkeypatch.setenv(PREFIX + name, "0")
    for name in ("PREEMPTION_POLL_INTERVAL_S", "COLLECTIVE_TIMEOUT_S"):
        monkeypatch.setenv(PREFIX + name, "0")


def train_settings() -> dict[str, float]:
    return {name.removeprefix(PREFIX): float(value) for name, value in os.environ.items() if name.startswith(PREFIX)}


def test_every_time_out_of_ray_train_is_set_on_purpose() -> None:
    set_timeouts(
        ClusterConfig(
            workers=2,
            worker_start_timeout_s=500,
            health_check_interval_s=1.5,
            health_check_timeout_s=99,
            collective_timeout_s=77,
        )
    )
    assert train_settings() == {
        "WORKER_GROUP_START_TIMEOUT_S": 500,
        "HEALTH_CHECK_INTERVAL_S": 1.5,
        "WORKER_HEALTH_CHECK_TIMEOUT_S": 99,
        "PREEMPTION_POLL_INTERVAL_S": 1.5,
        "COLLECTIVE_TIMEOUT_S": 77,
    }


def test_an_elastic_group_tries_a_size_for_seconds_only() -> None:
    set_timeouts(ClusterConfig(workers=2, min_workers=1, worker_start_timeout_s=500))
    assert train_settings()["WORKER_GROUP_START_TIMEOUT_S"] == ELASTIC_TRY_S
    set_timeouts(ClusterConfig(workers=2, min_workers=1, worker_start_timeout_s=3))
    assert train_settings()["WORKER_GROUP_START_TIMEOUT_S"] == 3
    set_timeouts(ClusterConfig(workers=2, min_workers=2, worker_start_timeout_s=500))
    assert train_settings()["WORKER_GROUP_START_TIMEOUT_S"] == 500


def test_the_config_wins_over_the_environment_and_both_over_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of(ClusterConfig()) == "local" and is_local(ClusterConfig())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert address_of(ClusterConfig()) == "10.0.0.1:6379" and not is_local(ClusterConfig())
    assert address_of(ClusterConfig(address="auto")) == "auto"
