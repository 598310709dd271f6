"""A grid search on Ray Tune: one Ray Train run per trial, compared at equal images seen."""

from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline.cluster.resources import await_room
from pipeline.cluster.session import ray_session
from pipeline.cluster.training import fit, notes_folder
from pipeline.config import Config, replaced, trials


@dataclass(frozen=True)
class Trial:
    """One point of the grid and what came of it."""

    name: str
    point: dict[str, Any]
    """Dotted keys to the values of this trial."""
    value: float | None
    """The last value of `tune.metric`; None where the trial failed."""
    kimg: float
    error: str | None = None


def trial_configs(config: Config) -> list[Config]:
    """The configuration of each trial: named after the search, and measured at least at its end."""
    if config.train.evaluate_kimg is None:
        config = replaced(config, {"train.evaluate_kimg": config.train.total_kimg})
    return [
        replaced(config, point | {"run.name": f"{config.run.name}-{number:03d}"})
        for number, point in enumerate(trials(config))
    ]


def search(config: Config, run_ids: dict[str, str]) -> list[Trial]:
    """Runs every trial of `tune.space` and returns them, the best first and the failed last.

    Args:
        run_ids: the MLflow run of each trial by its name; empty without tracking.
    """
    configs, points = trial_configs(config), trials(config)
    with ray_session(config.cluster):
        for trial in configs:
            await_room(trial.cluster)  # a trial would wait for it too, but unheard
        # A trial only drives: a reserved CPU could starve the workers that it waits for (but Tune wants something
        # reserved), and a spot machine's end would cost them all: ray_cluster.yaml's head offers `driver`.
        resources = {"CPU": 0, "memory": 1 << 20} | ({"driver": 0.01} if "driver" in ray.cluster_resources() else {})
        settings = [each.anchored().model_dump(mode="json") for each in configs]
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, configs=settings, run_ids=run_ids), resources),
            param_space={"number": tune.grid_search(list(range(len(configs))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=config.tune.max_concurrent),
            run_config=tune.RunConfig(name=f"{config.run.name}-search", storage_path=notes_folder(config), verbose=1),
        )
        grid = list(tuner.fit())
    results = {int(result.config["number"]): result for result in grid if result.config}
    unnamed = iter([result for result in grid if not result.config])  # failed before they began
    found = []
    for number, (trial, point) in enumerate(zip(configs, points, strict=True)):
        result = results[number] if number in results else next(unnamed)
        metrics = result.metrics or {}
        error = str(result.error).strip().splitlines()[-1] if result.error else None
        value = None if error else metrics.get(config.tune_metric)
        found.append(Trial(trial.run.name, point, value, metrics.get("images_seen", 0) / 1000, error))
    return ranked(found, config.tune.mode)


def ranked(found: list[Trial], mode: str) -> list[Trial]:
    """The best first, trials without a value last."""
    sign = 1.0 if mode == "min" else -1.0
    return sorted(found, key=lambda trial: (trial.value is None, sign * (trial.value or 0.0), trial.name))


def table(found: list[Trial], metric: str) -> str:
    """The trials as aligned text: name, values of the space, metric, kimg."""
    keys = list(found[0].point) if found else []
    rows = [["trial", *keys, metric, "kimg"]]
    for trial in found:
        value = "failed" if trial.value is None else f"{trial.value:.2f}"
        rows.append([trial.name, *(str(trial.point[key]) for key in keys), value, f"{trial.kimg:g}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"{trial.name}: {trial.error}" for trial in found if trial.error])


def _trial(settings: dict[str, Any], configs: list[dict[str, Any]], run_ids: dict[str, str]) -> None:
    """One trial's driver: a training like any other, its reports handed on to Tune."""
    config = Config.model_validate(configs[settings["number"]])
    outcome = fit(config, run_ids.get(config.run.name), (TuneReportCallback(),))
    # Once more at the end: a trial that was finished before measures nothing anew.
    values = {result["metric"]: result["value"] for result in outcome.results}
    tune.report(values | {"images_seen": outcome.images_seen})
