"""The jobs as a user starts them: one after the other in processes of their own, and what they say when they cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.small import small_pictures

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]

CONFIG = """
run: {{name: small, dir: {folder}/runs}}
ingest: {{source: {folder}/pictures}}
data: {{uri: {folder}/data, decoder: pillow}}
model: {{size: 16, width: 8, latent: 8, mapping_layers: 2, discriminator: {{channel_base: 128, channel_max: 16}}}}
train: {{total_kimg: 0.064, batch_size: 8, r1_gamma: 1, tick_kimg: 0.032, checkpoint_kimg: 0.032, grid: [2, 2],
  evaluate_kimg: 0.064, precision: fp32}}
evaluate: {{images: 32, input_size: 32}}
cluster: {{backend: local}}
tracking: {{model_name: small}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    small_pictures(folder / "pictures")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def job(name: str, folder: Path, *arguments: str, code: int = 0) -> str:
    """Runs a job to its end and returns what it printed, its errors for a code other than 0."""
    command = [sys.executable, "-m", f"jobs.{name}", *arguments]
    if "--config" not in arguments:
        command += ["--config", str(folder / "config.yaml")]
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stderr if code else done.stdout


def test_ingest_train_evaluate_promote_synthesize(folder: Path) -> None:
    assert "wrote 40 pictures in 1 shard(s)" in job("ingest", folder)
    assert "found 40 pictures" in job("ingest", folder)
    trained = job("train", folder)
    assert "registered small version 1" in trained and "fd_efficientnet_lite0" in trained
    assert trained.count("kimg     0.") == 3
    again = job("train", folder)  # a finished run is neither trained nor registered again
    assert "trained 0.064 kimg" in again and "registered small version 1" in again
    assert "give the search a name of its own" in job(
        "tune", folder, "tune.space={train.learning_rate: [0.001]}", code=2
    )
    evaluated = job("evaluate", folder, "--model", "models:/small/1")
    distance = json.loads((folder / "runs/small/log.jsonl").read_text().splitlines()[-1])["results"][0]["value"]
    assert f"fd_efficientnet_lite0 {distance:.3f}" in evaluated and "quick" in evaluated
    assert "small version 1" in job("promote", folder, "--version", "1")
    out = folder / "out" / "sheet.png"
    job("synthesize", folder, "samples", "synthesize.model=models:/small@champion", f"synthesize.out={out}")
    with Image.open(out) as sheet:
        assert sheet.size == (8 * 17 - 1, 6 * 17 - 1)
    job("synthesize", folder, f"synthesize.out={folder}/singles", "synthesize.images=3")
    assert len(list((folder / "singles").glob("*.png"))) == 3


def test_dry_runs_need_nothing_and_change_nothing(folder: Path) -> None:
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    for name in ("ingest", "train", "evaluate", "synthesize", "promote"):
        printed = job(name, folder, "--dry-run", "train.batch_size=64")
        assert "batch_size: 64" in printed
    printed = job("train", folder, "--config", "ffhq256", "--dry-run")
    assert "45,911,076" in printed and "28,864,129" in printed
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before


def test_what_cannot_be_done_is_said_in_one_message(folder: Path) -> None:
    elsewhere = f"data.uri={folder}/nothing"
    assert "no manifest" in job("train", folder, elsewhere, "run.name=other", code=1)
    assert "holds no checkpoint" in job("evaluate", folder, "run.name=other", code=1)
    assert "did you mean train.batch_size" in job("train", folder, "train.batchsize=8", code=2)
    assert "no tracking server answers" in job("train", folder, "run.name=x", "tracking.uri=http://127.0.0.1:9", code=1)
    before = (folder / "runs/small/config.yaml").read_bytes()
    assert "another configuration" in job("train", folder, "train.r1_gamma=7", code=1)
    assert (folder / "runs/small/config.yaml").read_bytes() == before  # a refused run leaves the good one alone
    assert "Traceback" not in job("train", folder, "train.batch_size=10", code=2)


@pytest.mark.cluster
def test_two_workers_on_a_cluster_of_their_own_and_the_demo(folder: Path) -> None:
    """The demo's own job at a size for a test: its summary and its sheet."""
    settings = [
        f"run.dir={folder}/demo",
        f"data.uri={folder}/demo-data",
        "train.total_kimg=0.256",
        "evaluate.images=64",
        "evaluate.real_images=",
    ]
    settings += ["evaluate.input_size=32", "train.tick_kimg=0.128", "ingest.limit=200", "synthesize.images=6"]
    printed = job("demo", folder, "--config", "demo", *settings)
    summary = json.loads((folder / "demo/demo/summary.json").read_text())
    needed = {"fd_before", "fd_after", "kimg", "images_per_second", "workers", "model_uri", "seconds"}
    assert needed <= summary.keys()
    assert (summary["workers"], summary["kimg"], summary["model_uri"]) == (2, 0.256, "models:/cips-demo@champion")
    assert f"{summary['fd_after']:.1f} trained" in printed and "[5/5]" in printed
    with Image.open(folder / "demo/demo/samples.png") as sheet:
        assert sheet.width > 100
