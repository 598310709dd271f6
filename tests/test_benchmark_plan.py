"""`jobs.benchmark plan`: options, where the size of pictures comes from, and the whole of its output."""

import argparse
import json
from pathlib import Path

import pytest

from pipeline.benchmark import plan
from pipeline.benchmark.plan_cards import CARDS
from pipeline.config import load_config, preset_names
from pipeline.data.manifest import read_manifest
from pipeline.layering import ConfigError
from pipeline.storage import StorageConfig
from tests.pictures import encoded, write_data_set


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plan", allow_abbrev=False)
    plan.add_arguments(parser)
    return parser.parse_args(words)


def test_the_papers_training_on_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(parsed("--config", "ffhq256", "--gpus", "8", "--gpu", "h200"))
    out = capsys.readouterr().out
    assert out.startswith("ffhq256 on h200 (989 TFLOP/s in bf16, 141 GB at 4,800 GB/s)")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.endswith(("compute", "groups"))}
    assert list(rows) == [str(2**power) for power in range(11)]
    assert rows["8"][1] == "32" and rows["8"][-1] == "compute"
    assert rows["16"][1] == "64*" and rows["1024"][1] == "4096*" and rows["1024"][-1] == "groups"
    assert "batch 32 has 8 minibatch-stddev groups of 4, so at most 8 GPUs" in " ".join(out.split())
    assert "16 need train.batch_size=64" in " ".join(out.split())
    assert "G backward" in out and "R1 in fp32, each 16 updates" in out
    assert "8 GPUs: a checkpoint has 1.08 GB" in out


@pytest.mark.parametrize(
    ("preset", "card"), [*(("ffhq256", card) for card in CARDS), ("demo", "cpu"), ("cifar10", "h200")]
)
def test_it_fits_the_page(preset: str, card: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(parsed("--config", preset, "--gpu", card, "--gpus", "1,3,8,1024"))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_planned_for_its_own_workers(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(parsed("--config", preset))
    out = capsys.readouterr().out
    workers = load_config(preset).workers
    assert f"- {workers} GPU" in out and "layer *" in out


def test_settings_and_measured_rates_reach_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    words = ["--config", "ffhq256", "--gpu", "h100", "--rate", "50", "--price", "2", "--picture-kb", "30"]
    plan.run(parsed(*words, "--gpus", "4,24", "--json", str(target), "train.batch_size=64", "train.total_kimg=1000"))
    content = json.loads(target.read_text())
    rows = {one["gpus"]: one for one in content["rows"]}
    assert 24 in rows and rows[1]["images_per_second"] == pytest.approx(50)
    assert rows[1]["usd"] == pytest.approx(2 * 1_000_000 / 50 / 3600)
    assert rows[4]["batch"] == 64
    assert rows[4]["bytes_per_second"] == pytest.approx(30_000 * rows[4]["images_per_second"])
    assert list(content["checkpoints"]) == ["4", "24"]
    out = " ".join(capsys.readouterr().out.split())
    assert "50 img/s on one GPU, measured (--rate)" in out and "2.00 USD for one GPU for one hour (--price)" in out


def test_a_share_below_leaves_less_speed(tmp_path: Path) -> None:
    rates = []
    for number, words in enumerate((["--share", "0.6"], ["--share", "0.3"], ["--matmul-tflops", "1"])):
        target = tmp_path / f"{number}.json"
        plan.run(parsed("--config", "ffhq256", *words, "--json", str(target)))
        rates.append(json.loads(target.read_text())["rows"][0]["images_per_second"])
    assert rates[0] > 1.3 * rates[1] > 100 * rates[2]


def test_unequal_shares_and_too_little_memory_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(parsed("--config", "ffhq256", "--gpu", "l4", "--gpus", "1,3"))
    out = " ".join(capsys.readouterr().out.split())
    assert "3 GPUs: 8 groups cannot be dealt evenly; the busiest has 12 pictures of 32" in out
    assert "1 GPU: does not fit with train.accumulation=1; train.accumulation=" in out


def test_a_card_without_bf16_is_planned_in_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    plan.run(parsed("--config", "ffhq256", "--gpu", "v100"))
    out = " ".join(capsys.readouterr().out.split())
    assert "125 TFLOP/s in fp16" in out and "products in fp32" in out and "nothing here trains in fp16" in out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--gpu", "h300"], "'h300': expected one of h200, h100, a100-80gb"),
        (["--gpus", "0"], "'0': expected a whole number from 1 on"),
        (["--gpus", "8,eight"], "'eight': expected a whole number from 1 on"),
        (["--rate", "-1"], "'-1': expected a number above 0"),
        (["--share", "1.5"], "'1.5': expected a share above 0 and at most 1"),
        (["--share-r1", "nan"], "'nan': expected a share above 0"),
        (["--storage-gbps", "inf"], "'inf': expected a number above 0"),
    ],
)
def test_an_option_that_makes_no_sense_is_explained(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--config", "ffhq256", *words)
    assert ended.value.code == 2
    assert answer in capsys.readouterr().err


def test_the_planned_gpus_stand_in_for_the_configured_workers(capsys: pytest.CaptureFixture[str]) -> None:
    """ffhq256 has 8 workers, and a batch of 16 only 4 groups."""
    plan.run(parsed("--config", "ffhq256", "--gpus", "4", "train.batch_size=16"))
    assert "batch 16 has 4 minibatch-stddev groups" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="too few for cluster.workers"):
        plan.run(parsed("--config", "ffhq256", "train.batch_size=16"))


def test_a_config_that_cannot_be_planned_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config 'ffhq265'"):
        plan.run(parsed("--config", "ffhq265"))
    with pytest.raises(ConfigError, match="there is no folder"):
        plan.run(parsed("--config", "ffhq256", "--json", str(tmp_path / "nowhere" / "plan.json")))


# ---- stored pictures -----------------------------------------------------------------------------


def test_pictures_are_as_large_as_the_manifest_says(tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    write_data_set(uri, [encoded(number) for number in range(40)])
    manifest = read_manifest(uri, StorageConfig())
    found = plan.stored_pictures(load_config("demo", [f"data.uri={uri}"]))
    assert found.bytes == sum(group.bytes for group in manifest.row_groups) / 40
    assert found.rows == 40 / len(manifest.row_groups)
    assert uri in found.origin


def test_without_data_their_size_is_assumed_and_said(tmp_path: Path) -> None:
    png = plan.stored_pictures(load_config("ffhq256"))
    assert png.bytes == 1.7 * 256**2 and "bytes a pixel" in png.origin
    assert png.rows == (8 << 20) / png.bytes, "row groups end at 8 MiB"
    jpeg = plan.stored_pictures(load_config("ffhq256", ["ingest.format=jpeg"]))
    assert jpeg.bytes == 0.65 * 256**2 and jpeg.rows < 256
    missing = plan.stored_pictures(load_config("ffhq256", [f"data.uri={tmp_path}/none"]))
    assert missing.bytes == png.bytes and "cannot be read: no manifest.json" in missing.origin


def test_a_given_size_wins_over_the_manifest(tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    write_data_set(uri, [encoded(number) for number in range(40)])
    found = plan.stored_pictures(load_config("demo", [f"data.uri={uri}"]), 12.5)
    assert (found.bytes, found.rows, found.origin) == (12_500, 256, "--picture-kb")
