"""Draws the quality of the shuffle over its memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmark.shuffle import NEAR, ratios
from pipeline.benchmark.study import LIMIT, ROWS, WORKERS, Point, Setting

MULTIPLES = {
    "one_group": "pairs of a batch from one row group",
    "meet_again": "pairs of a batch that meet again",
    "travel": "how far samples travel",
    "near": f"stored neighbours within {NEAR} batches",
}
APART = "distance of stored neighbours, % of the epoch\n(median; band: 5th to 95th percentile)"
LIMITED = ("one_group", "meet_again")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
STYLES = ("-", "--")


def draw(results: Sequence[tuple[Setting, Sequence[Point]]], spread: int, path: Path) -> None:
    """One row of panels for each batch size; `spread` is marked by a ring. Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no window system is needed
    from matplotlib import pyplot as plt

    batch_sizes = sorted({case.batch_size for case, _ in results})
    sizes = sorted({case.groups for case, _ in results})
    figure, rows = plt.subplots(
        len(batch_sizes),
        len(MULTIPLES) + 1,
        figsize=(21, 1 + 4 * len(batch_sizes)),
        squeeze=False,
        layout="constrained",
    )
    for axes, batch_size in zip(rows, batch_sizes, strict=True):
        for axis, (name, title) in zip(axes, MULTIPLES.items(), strict=False):
            for case, points in results:
                if case.batch_size != batch_size:
                    continue
                colour = COLOURS[sizes.index(case.groups) % len(COLOURS)]
                heights = [getattr(ratios(point.quality, case.closed_form), name) for point in points]
                for which, (workers, style) in enumerate(zip(WORKERS, STYLES, strict=True)):
                    held = [point.memory[which] for point in points]
                    label = f"{case.groups} row groups, {workers} worker{'s' * (workers > 1)}"
                    axis.plot(held, heights, style, marker="o", markersize=4, color=colour, label=label)
                    chosen = [
                        (x, y) for x, y, point in zip(held, heights, points, strict=True) if point.spread == spread
                    ]
                    axis.plot(*zip(*chosen, strict=True), "o", markersize=11, fillstyle="none", color=colour)
            axis.axhline(1, color="grey", linewidth=1)
            if name in LIMITED:
                axis.axhspan(0, LIMIT, color="#009e73", alpha=0.08)
                axis.axhline(LIMIT, color="#b00000", linewidth=1, linestyle=":")
                axis.set_ylim(0, 1.3)
            elif name == "travel":
                axis.set_ylim(0.8, 1.2)
            else:
                axis.set_yscale("log")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("row groups held by one worker")
            axis.set_title(f"{title}\nbatch {batch_size}", fontsize=10)
        _draw_apart(axes[-1], [result for result in results if result[0].batch_size == batch_size], sizes)
        axes[0].set_ylabel("multiple of the full permutation's")
    rows[0][0].legend(fontsize=7, loc="center right")
    figure.suptitle(
        f"Shuffle quality over memory, row groups of {ROWS}; ring: spread {spread}; green: at most {LIMIT} times the "
        "full permutation"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_apart(axis: Any, results: Sequence[tuple[Setting, Sequence[Point]]], sizes: Sequence[int]) -> None:
    for case, points in results:
        colour = COLOURS[sizes.index(case.groups) % len(COLOURS)]
        held = [point.memory[0] for point in points]
        low, median, high = (
            [100 * getattr(point.quality, name) for point in points]
            for name in ("apart_low", "apart_median", "apart_high")
        )
        axis.plot(held, median, marker="o", markersize=4, color=colour)
        axis.fill_between(held, low, high, color=colour, alpha=0.12)
    exact = results[0][0].closed_form
    for value, style in ((exact.apart_low, ":"), (exact.apart_median, "-"), (exact.apart_high, ":")):
        axis.axhline(100 * value, color="grey", linewidth=1, linestyle=style)
    axis.set_xscale("log", base=2)
    axis.set_xlabel(f"row groups held by one worker ({WORKERS[0]} in all)")
    axis.set_title(APART, fontsize=10)
