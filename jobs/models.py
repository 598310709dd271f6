"""Where jobs take a trained generator from."""

from pipeline.config import Config, absolute
from pipeline.models.cips import Generator
from pipeline.training.checkpoint import CheckpointError, checkpoint_folder, list_checkpoints, load_average


def load_generator(name: str | None, config: Config) -> Generator:
    """A generator ready to draw.

    Args:
        name: `models:/NAME@ALIAS` or `models:/NAME/VERSION` in the registry, a checkpoint's folder, or None for the
            latest checkpoint of the configuration's run.
    """
    if name is not None and name.startswith("models:/"):
        from pipeline.tracking.registry import load_generator as load_registered

        return load_registered(config.tracking_uri, name)
    return load_average(absolute(name) if name else latest_checkpoint(config), config.storage)


def latest_checkpoint(config: Config) -> str:
    """The folder of the latest complete checkpoint of the configuration's run."""
    found = list_checkpoints(config.run_uri, config.storage)
    if not found:
        raise CheckpointError(
            f"{config.run_uri} holds no checkpoint; train first (python -m jobs.train), or name a model"
        )
    return checkpoint_folder(config.run_uri, found[-1])
