"""The whole way in a few minutes on two cores: pictures in, a registered CIPS model and a sheet of its samples out.

    python -m jobs.demo                          # the same as `make demo`
    python -m jobs.demo train.total_kimg=20      # shorter; any setting of the demo preset can be changed

Ingests NASA's Blue Marble as tiles, trains with two Ray Train workers, measures the distance before and after,
registers the model in MLflow, makes it the champion, loads it back in a new process and draws runs/demo/samples.png
and runs/demo/summary.json. An interrupted demo goes on where it was; a finished one is moved aside first.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs import ingest, promote, train
from jobs.cli import failing_clearly, going_on, parse
from pipeline.config import Config
from pipeline.evaluation.distance import DistanceMeter
from pipeline.models.summary import summary_table
from pipeline.training.local import local_device
from pipeline.training.observers import duration, read_log

BLUR_SIGMA = 4.0  # pixels; real pictures blurred so far are the bar that the generator has to pass


@dataclass(frozen=True)
class Summary:
    """What the demo came to; summary.json holds it."""

    fd_before: float
    fd_after: float
    fd_blurred: float
    metric: str
    protocol: str
    kimg: float
    images_per_second: float
    workers: int
    model_uri: str
    model_version: str
    samples: str
    run: str
    mlflow_run: str
    seconds: float


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse(__doc__, argv, default="demo")
    if args.dry_run:
        print(summary_table(config.model, config.train.patch.size))
        return
    with going_on():
        done = run(config, args.config, args.overrides)
    print(describe(done, config))


def run(config: Config, preset: str, overrides: Sequence[str]) -> Summary:
    """The steps of the demo, one after the other."""
    began = time.perf_counter()
    folder = Path(config.run_uri)
    move_finished_aside(folder)
    step(1, "ingest: the Blue Marble as tiles, into sharded Parquet")
    ingest.report(ingest.run(config))
    step(2, f"train and evaluate: {config.train.total_kimg:g} kimg with {config.workers} workers on Ray")
    trained = train.run(config)
    assert trained.tracking_run is not None and trained.version is not None
    step(3, "evaluate the bar: real tiles, blurred")
    meter = DistanceMeter(
        config.evaluate, config.data, config.model.size, config.storage, config.statistics_uri, local_device()
    )
    blurred = meter.of_blurred(BLUR_SIGMA)
    print(f"{blurred.metric} {blurred.value:.1f}")
    step(4, "promote in the MLflow registry")
    print(promote.run(config, trained.version))
    step(5, "load the champion in a new process and draw")
    model_uri = f"models:/{config.tracking.model_name}@champion"
    samples = folder / "samples.png"
    settings = [f"synthesize.model={model_uri}", f"synthesize.out={samples}"]
    command = [sys.executable, "-m", "jobs.synthesize", "samples", "--config", preset, *overrides, *settings]
    subprocess.run(command, check=True)
    log = [line for line in read_log(config.run_uri, config.storage) if line["results"]]
    outcome = trained.outcome
    summary = Summary(
        fd_before=log[0]["results"][0]["value"],
        fd_after=outcome.results[0]["value"],
        fd_blurred=blurred.value,
        metric=blurred.metric,
        protocol=meter.protocol.describe(),
        kimg=outcome.images_seen / 1000,
        images_per_second=(outcome.images_seen - outcome.resumed_from) / outcome.seconds,
        workers=config.workers,
        model_uri=model_uri,
        model_version=trained.version,
        samples=shown(samples),
        run=shown(folder),
        mlflow_run=trained.tracking_run,
        seconds=time.perf_counter() - began,
    )
    (folder / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    return summary


def describe(done: Summary, config: Config) -> str:
    """The summary that ends the demo."""
    return "\n".join(
        [
            "",
            f"{done.metric}: {done.fd_before:.1f} untrained, {done.fd_after:.1f} trained; "
            f"real tiles blurred (sigma {BLUR_SIGMA:g}): {done.fd_blurred:.1f}",
            f"  {done.protocol}",
            f"trained    {done.kimg:g} kimg at {done.images_per_second:.0f} img/s with {done.workers} workers",
            f"samples    {done.samples}",
            f"run        {done.run}   (log.jsonl, checkpoints, samples by tick, summary.json)",
            f"model      {done.model_uri}   (version {done.model_version})",
            f"MLflow     {shown(Path(sys.executable).with_name('mlflow'))} server "
            f"--backend-store-uri {config.tracking_uri} --port 5000   then http://127.0.0.1:5000",
            f"time       {duration(done.seconds)}",
        ]
    )


def move_finished_aside(folder: Path) -> None:
    """A demo that ended is kept under another name; one that was interrupted goes on."""
    finished = folder / "summary.json"
    if finished.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(finished.stat().st_mtime))
        aside = folder.with_name(f"{folder.name}-{stamp}")
        folder.rename(aside)
        print(f"the demo of {stamp} is now {shown(aside)}", flush=True)


def step(number: int, text: str) -> None:
    """Announces a step."""
    print(f"\n[{number}/5] {text}", flush=True)


def shown(path: Path) -> str:
    """A path as short as it can be written from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    main()
