"""How busy the machine is: real numbers of this one, and never a reason to stop."""

import sys
import threading
import time

import pytest

from pipeline.tracking.system import SystemMetrics

psutil = pytest.importorskip("psutil", reason="psutil is not installed")


def test_the_machine_is_seen() -> None:
    system = SystemMetrics(sample_s=0.05)
    try:
        busy_until = time.monotonic() + 0.5
        while time.monotonic() < busy_until:
            pass
        found = system.take()
    finally:
        system.close()
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    used = found["system/system_memory_usage_megabytes"]
    assert used == pytest.approx(psutil.virtual_memory().used / 1e6, rel=0.2)
    assert {"system/disk_usage_percentage", "system/network_receive_megabytes"} <= found.keys()
    assert system.take().keys() == found.keys()  # also just after the last
    assert not [thread for thread in threading.enumerate() if thread.name == "system-metrics"]


def test_what_cannot_be_measured_is_left_out() -> None:
    system = SystemMetrics()
    try:
        del system.monitors[0]._metrics  # what a broken driver looks like from here
        assert "system/disk_usage_percentage" in system.take()
    finally:
        system.close()


def test_without_psutil_there_is_a_word_and_no_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("mlflow.system_metrics.metrics.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psutil", None)
    system = SystemMetrics()
    assert system.take() == {}
    system.close()
    assert "pip install psutil" in capsys.readouterr().out
