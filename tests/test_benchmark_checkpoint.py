"""The benchmark of checkpoints: its table holds what was measured, and nothing is left behind."""

import argparse
from pathlib import Path

import pytest
import torch

from pipeline.benchmark import checkpoint
from pipeline.benchmark.checkpoint import Cost, conclusions, table_rows, whole_state
from pipeline.layering import ConfigError
from pipeline.training.state import build_state
from tests.small import SMALL_MODEL, small_train

SMALL = """
model: {size: 16, width: 8, latent: 8, mapping_layers: 2, discriminator: {channel_base: 128, channel_max: 16}}
train: {batch_size: 8}
"""


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    checkpoint.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "QUIET_S", 0.05)
    monkeypatch.setattr(checkpoint, "SIDE", 64)


def test_both_ways_stand_side_by_side(tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    target = tmp_path / "disk"
    target.mkdir()
    words = ["--config", str(tmp_path / "small.yaml"), "--folder", str(target), "--rounds", "2", "--tick-seconds", "30"]
    checkpoint.run(options(*words))
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| local disk")]
    assert [row.split("|")[1].strip() for row in rows] == ["local disk, synchronous", "local disk, background"]
    assert "of a 30 s tick" in out and "median of 2" in out and "within 5% of a tick of 30 s" in out
    assert list(target.iterdir()) == []


def test_shares_are_those_of_the_tick() -> None:
    costs = [Cost(0.2, 1.0, 2.0, 3.2, pause, 0.6) for pause in (0.1, 0.3, 9.0)]  # the median counts
    synchronous, background = table_rows("disk", costs, 60.0)
    assert synchronous == ["disk, synchronous", "0.20", "1.00", "2.00", "3.200", "5.33%", "0.00", "5.33%"]
    assert background == ["disk, background", "0.20", "1.00", "2.00", "0.300", "0.50%", "0.60", "1.50%"]
    assert "within 5% of a tick of 60 s" in next(conclusions("disk", 10**9, 0.5, costs, 60.0))
    assert "ABOVE 5% of a tick of 5 s; it would be 5% of a tick of 6.0 s" in next(
        conclusions("disk", 10**9, 0.5, costs, 5.0)
    )


def test_the_state_is_whole() -> None:
    state = whole_state(build_state(SMALL_MODEL, small_train(), 0, torch.device("cpu")))
    names = {name.split(".")[0] + "." + name.split(".")[1] for name in state.tensors() if name.startswith("adam")}
    assert names == {"adam.generator", "adam.discriminator"}
    moments = sum(value.numel() for name, value in state.tensors().items() if ".exp_avg_sq." in name)
    trained = [*state.generator.parameters(), *state.discriminator.parameters()]
    assert moments == sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--tick-seconds", "no"]])
def test_numbers_that_cannot_be_used_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*words)
    assert "expected a" in capsys.readouterr().err


def test_an_address_that_is_not_s3_is_refused() -> None:
    with pytest.raises(ConfigError, match="--s3 is 'bucket': expected s3://BUCKET/PREFIX"):
        checkpoint.run(options("--s3", "bucket"))
