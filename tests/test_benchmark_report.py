"""Figures of a benchmark: medians, the table, what is concluded, the plot."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.benchmark import report
from pipeline.benchmark.contenders import Contender, Run
from pipeline.benchmark.peers._measure import Outcome, Stretch


def run_of(name: str, place: str, parallel: int, outcome: Outcome | None, reason: str = "") -> Run:
    return Run(Contender(name, place, parallel, (), {}, {}), outcome, reason)


def outcome(images: int, seconds: float, cpu_seconds: float, first: float = 1.0, read: float | None = 0.0) -> Outcome:
    return Outcome(Stretch(images, seconds, cpu_seconds, read, None), first, {"some": "1.0"})


def test_each_figure_is_the_best_setting_of_medians() -> None:
    runs = [
        run_of("a", "local", 0, outcome(100, 1.0, 0.5, first=3.0, read=500.0)),
        run_of("a", "local", 2, outcome(100, 0.5, 1.0, first=2.0)),
        run_of("a", "local", 0, outcome(100, 2.0, 0.5, read=700.0, first=5.0)),
        run_of("a", "local", 2, None, "out of luck"),
        run_of("a", "local", 0, outcome(100, 4.0, 0.5, first=4.0, read=600.0)),
    ]
    (row,), missing = report.summarise(runs)
    assert missing == []
    assert (row.images_per_second, row.parallel) == (200.0, 2)
    assert (row.images_per_cpu_second, row.cpu_parallel, row.cpu_ms) == (200.0, 0, 5.0)
    assert (row.first_batch_seconds, row.bytes_per_image, row.repetitions) == (2.0, 6.0, 1)
    assert report.failures(runs) == ["a (2) from local disk failed in 1 of 2 runs: out of luck"]


def test_the_table_is_markdown_with_the_thriftiest_first() -> None:
    runs = [
        run_of("slow", "local", 1, outcome(100, 1.0, 1.0, read=2500.0)),
        run_of("quick", "local", 1, outcome(2000, 1.0, 1.0, read=None)),
        run_of("absent", "local", 0, None, "ImportError: none"),
    ]
    lines = report.table(*report.summarise(runs), "local").splitlines()
    assert lines == [
        "| From local disk |     img/s | img per CPU s | CPU ms/img | first batch s | read kB/img |",
        "|-----------------|----------:|--------------:|-----------:|--------------:|------------:|",
        "| quick           | 2,000 (1) |     2,000 (1) |      0.500 |          1.00 |           - |",
        "| slow            |   100 (1) |       100 (1) |     10.000 |          1.00 |         0.0 |",
        "| absent          | not measured: ImportError: none | | | | |",
    ]


def test_conclusions_compare_with_bare_decoding_with_peers_and_with_s3() -> None:
    runs = [
        run_of("bare decoding, DALI", "memory", 1, outcome(1000, 1.0, 1.0)),
        run_of("this loader, DALI", "local", 1, outcome(900, 1.0, 1.1, read=1_000.0)),
        run_of("WebDataset", "local", 2, outcome(600, 1.0, 1.2, read=600_000.0)),
        run_of("this loader, DALI", "s3", 1, outcome(810, 1.0, 1.0, read=810_000.0)),
    ]
    lines = report.conclusions(report.summarise(runs)[0], mean_bytes=1000.0)
    assert lines == [
        "this loader, DALI: 1.222 CPU ms/img, bare 1.000: +22%",
        "From local disk, images per second: this loader, DALI has 1.50 times the best peer's (WebDataset)",
        "From local disk, images per CPU second: this loader, DALI has 1.64 times the best peer's (WebDataset)",
        "this loader, DALI: from S3 at 90% of its rate from local disk",
        "Kept pictures in its own memory, and read only a part of their bytes: this loader, DALI from local (0%)",
    ]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib, which MLflow brings")
    runs = [
        run_of("bare decoding, DALI", "memory", 1, outcome(1000, 1.0, 1.0)),
        run_of("this loader, DALI", "local", 1, outcome(900, 1.0, 1.1)),
        run_of("WebDataset", "s3", 2, outcome(600, 1.0, 1.2)),
    ]
    report.draw(report.summarise(runs)[0], tmp_path / "plot.png", "some machine")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 800
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_machine_is_named() -> None:
    machine = report.machine()
    assert machine["cpu"] and machine["cores"] >= 1
