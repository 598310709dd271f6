"""Measurements to figures: medians over repetitions, the best setting for each figure, a table and a plot."""

import dataclasses
import importlib
import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmark.contenders import BARE, OWN, PEERS, Contender, Run
from pipeline.benchmark.peers._measure import Outcome

PLACES = {"memory": "From memory", "local": "From local disk", "s3": "From S3"}
BUSY_LOAD = 0.5
"""Load average from which the machine is said to be busy with something else."""
FULL_READ = 0.9
"""Part of a picture's bytes below which a loader is taken to have read from its own memory."""


@dataclass(frozen=True)
class Row:
    """One loader at one place. Each figure is the best of its settings, each setting a median of its runs."""

    name: str
    place: str
    images_per_second: float
    parallel: int
    """Threads or workers that gave it."""
    images_per_cpu_second: float
    cpu_parallel: int
    """Threads or workers that gave that."""
    first_batch_seconds: float
    bytes_per_image: float | None
    """Of the setting with the best images per CPU second."""
    server_cpu_per_image: float | None
    """Seconds of the S3 server, of the same setting."""
    versions: dict[str, str]
    repetitions: int

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per image."""
        return 1e3 / self.images_per_cpu_second


@dataclass(frozen=True)
class Missing:
    """A loader that could not be measured in any setting."""

    name: str
    place: str
    reason: str


def summarise(runs: Sequence[Run]) -> tuple[list[Row], list[Missing]]:
    """Rows in the order of the first run of each, and what is missing."""
    rows: list[Row] = []
    missing: list[Missing] = []
    for name, place in dict.fromkeys((run.contender.name, run.contender.place) for run in runs):
        here = [run for run in runs if (run.contender.name, run.contender.place) == (name, place)]
        if all(run.outcome is None for run in here):
            missing.append(Missing(name, place, here[0].reason))
        else:
            rows.append(_row(name, place, here))
    return rows, missing


def _row(name: str, place: str, runs: Sequence[Run]) -> Row:
    settings: dict[int, list[Outcome]] = {}
    for run in runs:
        if run.outcome is not None:
            settings.setdefault(run.contender.parallel, []).append(run.outcome)
    speed = {parallel: _median(outcomes, _images_per_second) for parallel, outcomes in settings.items()}
    thrift = {parallel: _median(outcomes, _images_per_cpu_second) for parallel, outcomes in settings.items()}
    fastest, thriftiest = max(speed, key=speed.__getitem__), max(thrift, key=thrift.__getitem__)
    outcomes = settings[thriftiest]
    return Row(
        name=name,
        place=place,
        images_per_second=speed[fastest],
        parallel=fastest,
        images_per_cpu_second=thrift[thriftiest],
        cpu_parallel=thriftiest,
        first_batch_seconds=min(_median(found, lambda one: one.first_batch_seconds) for found in settings.values()),
        bytes_per_image=_known(outcomes, lambda one: one.stretch.bytes_read),
        server_cpu_per_image=_known(outcomes, lambda one: one.stretch.server_cpu_seconds),
        versions=outcomes[0].versions,
        repetitions=min(len(found) for found in settings.values()),
    )


def _images_per_second(outcome: Outcome) -> float:
    return outcome.stretch.images / outcome.stretch.seconds


def _images_per_cpu_second(outcome: Outcome) -> float:
    return outcome.stretch.images / max(outcome.stretch.cpu_seconds, 1e-2)  # the clock's tick


def _median(outcomes: Iterable[Outcome], figure: Callable[[Outcome], float]) -> float:
    return statistics.median(figure(outcome) for outcome in outcomes)


def _known(outcomes: Iterable[Outcome], figure: Callable[[Outcome], float | None]) -> float | None:
    """Median per image, where it was counted."""
    found = [value / one.stretch.images for one in outcomes if (value := figure(one)) is not None]
    return statistics.median(found) if found else None


# ---- text -----------------------------------------------------------------------------------------


def table(rows: Sequence[Row], missing: Sequence[Missing], place: str) -> str:
    """The figures of one place as a table in Markdown, best images per CPU second first."""
    head = ["", "img/s", "img per CPU s", "CPU ms/img", "first batch s", "read kB/img"]
    body = [
        [
            row.name,
            f"{row.images_per_second:,.0f} ({row.parallel})",
            f"{row.images_per_cpu_second:,.0f} ({row.cpu_parallel})",
            f"{row.cpu_ms:.3f}",
            f"{row.first_batch_seconds:.2f}",
            "-" if row.bytes_per_image is None or place == "memory" else f"{row.bytes_per_image / 1e3:.1f}",
        ]
        for row in sorted(rows, key=lambda row: -row.images_per_cpu_second)
        if row.place == place
    ]
    body += [[one.name, f"not measured: {one.reason}", "", "", "", ""] for one in missing if one.place == place]
    head[0] = PLACES[place]
    return aligned(head, body)


def aligned(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table that also reads well as text; numbers to the right."""
    lines = [head, *body]
    widths = [max(len(line[column]) for line in lines if "not measured" not in line[1]) for column in range(len(head))]
    widths[0] = max(len(line[0]) for line in lines)

    def row(cells: Sequence[str]) -> str:
        if "not measured" in cells[1]:
            return f"| {cells[0].ljust(widths[0])} | {cells[1]} |" + " |" * (len(cells) - 2)
        numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {cells[0].ljust(widths[0])} | {' | '.join(numbers)} |"

    rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
    return "\n".join([row(head), rule, *map(row, body)])


def conclusions(rows: Sequence[Row], mean_bytes: float | None) -> list[str]:
    """What the figures come to, a sentence each."""
    found = {(row.name, row.place): row for row in rows}
    lines = []
    for decoder in OWN:
        mine, floor = found.get((OWN[decoder], "local")), found.get((BARE[decoder], "memory"))
        if mine and floor:
            share = mine.cpu_ms / floor.cpu_ms - 1
            lines.append(f"{mine.name}: {mine.cpu_ms:.3f} CPU ms/img, bare {floor.cpu_ms:.3f}: {share:+.0%}")
    for place in ("local", "s3"):
        peers = [row for row in rows if row.place == place and row.name in PEERS.values()]
        own = [row for row in rows if row.place == place and row.name in OWN.values()]
        if peers and own:
            lines += _against(own, peers, place)
    for name in OWN.values():
        local, remote = found.get((name, "local")), found.get((name, "s3"))
        if local and remote:
            share = remote.images_per_second / local.images_per_second
            lines.append(f"{name}: from S3 at {share:.0%} of its rate from local disk")
    if kept := [one for row in rows if (one := _kept(row, mean_bytes))]:
        lines.append(f"Kept pictures in its own memory, and read only a part of their bytes: {', '.join(kept)}")
    server = {row.name: row.server_cpu_per_image for row in rows if row.server_cpu_per_image is not None}
    if server:
        text = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in server.items())
        lines.append(f"The S3 server's own CPU ms/img on this machine, in none of the figures: {text}")
    return lines


def failures(runs: Sequence[Run]) -> list[str]:
    """Settings of loaders that failed in some of their runs, with the last reason."""
    settings: dict[tuple[str, str, int], list[Run]] = {}
    for run in runs:
        one = run.contender
        settings.setdefault((one.name, one.place, one.parallel), []).append(run)
    measured = {(run.contender.name, run.contender.place) for run in runs if run.outcome is not None}
    lines = []
    for (name, place, parallel), tries in settings.items():
        failed = [run for run in tries if run.outcome is None]
        if failed and (name, place) in measured:  # others stand in the table, with their reason
            what = f"{name} ({parallel}) {_from(place)}"
            lines.append(f"{what} failed in {len(failed)} of {len(tries)} runs: {failed[-1].reason}")
    return lines


def _from(place: str) -> str:
    """The place within a sentence."""
    return PLACES[place].replace("F", "f")


def _kept(row: Row, mean_bytes: float | None) -> str:
    """Names a loader that did not read all that it decoded, with the part that it read."""
    if row.place == "memory" or row.bytes_per_image is None or not mean_bytes:
        return ""
    part = row.bytes_per_image / mean_bytes
    return f"{row.name} from {row.place} ({part:.0%})" if part < FULL_READ else ""


def _against(own: Sequence[Row], peers: Sequence[Row], place: str) -> list[str]:
    """This loader's best against the peers' best."""
    lines = []
    figures: dict[str, Callable[[Row], float]] = {
        "images per second": lambda row: row.images_per_second,
        "images per CPU second": lambda row: row.images_per_cpu_second,
    }
    for what, figure in figures.items():
        mine, best = max(own, key=figure), max(peers, key=figure)
        ratio = figure(mine) / figure(best)
        lines.append(f"{PLACES[place]}, {what}: {mine.name} has {ratio:.2f} times the best peer's ({best.name})")
    return lines


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def busy(about: Mapping[str, Any]) -> str:
    """A line of warning where `machine()` found other work on the machine, else nothing."""
    if about["load"] <= BUSY_LOAD:
        return ""
    return f"- the machine was busy with something else (load {about['load']:.1f}): it is faster than these figures\n"


def _cpu() -> str:
    """The processor's name as Linux knows it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def as_json(runs: Sequence[Run], rows: Sequence[Row], missing: Sequence[Missing]) -> dict[str, Any]:
    """Everything that was measured, and what came of it."""
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "missing": [dataclasses.asdict(one) for one in missing],
        "runs": [_run_as_json(run.contender, run) for run in runs],
    }


def _run_as_json(contender: Contender, run: Run) -> dict[str, Any]:
    what = {"name": contender.name, "place": contender.place, "parallel": contender.parallel}
    return what | ({"reason": run.reason} if run.outcome is None else dataclasses.asdict(run.outcome))


# ---- plot -----------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path, caption: str) -> None:
    """Bars of images per second and per CPU second, by loader and place. Raises ImportError without matplotlib."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    names = [name for name in dict.fromkeys(row.name for row in rows) if name not in BARE.values()]
    best = {name: max(row.images_per_cpu_second for row in rows if row.name == name) for name in names}
    names.sort(key=best.__getitem__)
    places = [place for place in ("local", "s3") if any(row.place == place for row in rows)]
    colours = {"local": "#2b6ca3", "s3": "#e08e2b"}
    height = 0.8 / max(1, len(places))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 1.6 + 0.55 * len(names)), sharey=True, layout="constrained")
    titles = {"images_per_second": "images per second", "images_per_cpu_second": "images per CPU second"}
    for panel, (field, title) in zip(panels, titles.items(), strict=True):
        for number, place in enumerate(places):
            values = [_value(rows, name, place, field) for name in names]
            at = [index + height * ((len(places) - 1) / 2 - number) for index in range(len(names))]
            bars = panel.barh(at, values, height, label=_from(place), color=colours[place])
            panel.bar_label(bars, ["" if math.isnan(value) else f"{value:,.0f}" for value in values], padding=3)
        for row in rows:
            if row.name in BARE.values() and field == "images_per_cpu_second":
                line = ":" if row.name == BARE["pillow"] else "--"
                panel.axvline(row.images_per_cpu_second, color="grey", linestyle=line, label=row.name)
        panel.set_title(title)
        panel.margins(x=0.15)
        panel.legend(loc="lower right", fontsize=8, framealpha=1, edgecolor="none")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    figure.supxlabel(caption, fontsize=8, color="grey")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _value(rows: Sequence[Row], name: str, place: str, field: str) -> float:
    found = [getattr(row, field) for row in rows if (row.name, row.place) == (name, place)]
    return found[0] if found else math.nan
