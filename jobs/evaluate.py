"""Measures the distance between a generator's pictures and the data set, with its protocol.

    python -m jobs.evaluate --config demo                                     # the run's latest checkpoint
    python -m jobs.evaluate --config demo --model models:/cips-demo@champion
    python -m jobs.evaluate --config my-run.yaml --model s3://bucket/runs/ffhq256/checkpoints/0025000000

evaluate.network=inception reports `fid`, efficientnet-lite0 reports `fd_efficientnet_lite0`; they are never
compared. The moments of the real pictures are kept in run.dir/.statistics and reused.
"""

import argparse
from collections.abc import Sequence

from jobs.cli import failing_clearly, parse
from jobs.models import latest_checkpoint, load_generator
from pipeline.config import Config
from pipeline.evaluation.protocol import Result
from pipeline.models.summary import summary_table


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a checkpoint's folder or models:/NAME@ALIAS; else the run's latest checkpoint")


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse(__doc__, argv, _model)
    if args.dry_run:
        print(summary_table(config.model))
        return
    result = run(config, args.model)
    print(
        f"{args.model or latest_checkpoint(config)}\n{result.metric} {result.value:.3f}\n{result.protocol.describe()}"
    )


def run(config: Config, model: str | None = None) -> Result:
    """Measures a model where `cluster.backend` says."""
    generator = load_generator(model, config)
    if config.cluster.backend == "ray":
        from pipeline.cluster.evaluation import evaluate_on_ray

        return evaluate_on_ray(config, generator)
    from pipeline.evaluation.distance import DistanceMeter
    from pipeline.training.local import local_device

    device = local_device()
    meter = DistanceMeter(
        config.evaluate, config.data, config.model.size, config.storage, config.statistics_uri, device
    )
    return Result.from_dict(meter(generator.to(device)))


if __name__ == "__main__":
    main()
