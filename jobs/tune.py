"""Searches hyperparameters: a training per point of a grid over any settings, on Ray Tune.

    python -m jobs.tune --config demo --space patches                        # a packaged search space
    python -m jobs.tune --config my-run.yaml --space my-space.yaml run.name=sweep cluster.address=auto
    python -m jobs.tune --config demo --space patches --dry-run              # the list of trials

A space is a YAML file: `space: {train.patch.size: [16, 32], train.learning_rate: [0.001, 0.002]}`. Trials are
compared by tune.metric at equal images seen; in MLflow they are child runs of one parent. Trial 3 of a search named
NAME is the run NAME-003 in run.dir, with its pictures and checkpoints, and `python -m jobs.status` tells how far it is.
No model is registered; to train a trial further, give jobs.train its settings, its run.name and a larger
train.total_kimg.
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.cli import failing_clearly, going_on, parse
from pipeline.config import Config, ConfigError, trials
from pipeline.models.summary import summary_table
from pipeline.training.checkpoint import list_checkpoints


def _space(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--space", metavar="PRESET_OR_FILE", help="a packaged search space or a YAML file")


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse(__doc__, argv, _space)
    if not config.tune.space:
        raise ConfigError(
            "tune.space is empty: expected settings with values to try; give --space (patches, or a YAML file), or set "
            "tune.space in the config"
        )
    if args.dry_run:
        print(summary_table(config.model, config.train.patch.size))
        for number, point in enumerate(trials(config)):
            print(f"{config.run.name}-{number:03d}  {point}")
        return
    if list_checkpoints(config.run_uri, config.storage):
        raise ConfigError(
            f"run.name is {config.run.name}, and {config.run_uri} holds a training: give the search a name of its own, "
            f"such as run.name={config.run.name}-search"
        )
    with going_on():
        run(config)


def run(config: Config) -> None:
    """Runs the search and prints its table, the best trial first."""
    from pipeline.cluster.search import search, table, trial_configs

    if not config.tracking.enabled:
        found = search(config, {})
    else:
        from pipeline.tracking.recording import recorded, recorded_trials

        with recorded(config) as parent, recorded_trials(trial_configs(config), parent) as trials_:
            found = search(config, trials_.run_ids)
            trials_.failed = {trial.name for trial in found if trial.value is None}
        print(f"MLflow: run {parent} with its {len(found)} child runs at {config.tracking_uri}")
    print(table(found, config.tune_metric))
    if all(trial.value is None for trial in found):
        sys.exit("every trial failed")


if __name__ == "__main__":
    main()
