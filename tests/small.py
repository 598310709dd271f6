"""A training small enough for a test, with all parts of a large one."""

from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.stream import DataConfig
from pipeline.ingest.ingest import IngestConfig, ingest
from pipeline.models.build import DiscriminatorConfig, ModelConfig
from pipeline.storage import StorageConfig
from pipeline.training.loop import Plan
from pipeline.training.settings import TrainConfig

SMALL_MODEL = ModelConfig(
    size=16,
    width=8,
    latent=8,
    mapping_layers=2,
    noise="random",
    discriminator=DiscriminatorConfig(channel_base=128, channel_max=16),
)

SMALL_SETTINGS = [
    "model.size=16",
    "model.width=8",
    "model.latent=8",
    "model.mapping_layers=2",
    "model.discriminator.channel_base=128",
    "model.discriminator.channel_max=16",
    "train.batch_size=8",
    "train.grid=[2,2]",
]
"""The same model and batch on a command line."""

SMALL_CLUSTER_SETTINGS = [
    *SMALL_SETTINGS,
    "data.decoder=pillow",
    "train.precision=fp32",
    "train.r1_gamma=1",
    "cluster.workers=2",
    "cluster.threads_per_worker=1",
    "cluster.health_check_interval_s=0.5",
    "tracking.enabled=false",
]
"""On two workers of Ray, whose death is noticed soon and whose sums are the same bits each time."""


def small_train(**changes: Any) -> TrainConfig:
    """Eight pictures an update, a tick each four updates."""
    values = {
        "total_kimg": 0.064,
        "batch_size": 8,
        "precision": "fp32",
        "r1_gamma": 1.0,
        "r1_interval": 2,
        "ema_kimg": 0.1,
        "tick_kimg": 0.032,
        "checkpoint_kimg": 0.032,
        "grid": (2, 2),
    }
    return TrainConfig.model_validate(values | changes)


def small_pictures(folder: Path, count: int = 40, size: int = 16) -> Path:
    """A folder of real pictures: squares cut from the Blue Marble over land."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(Path(__file__).parents[1] / "pipeline/presets/data/earth-blue-marble.jpg") as earth:
        for number in range(count):
            left, top = 2100 + number % 10 * size, 600 + number // 10 * size
            earth.crop((left, top, left + size, top + size)).save(folder / f"{number:03d}.png")
    return folder


def small_data(folder: Path, count: int = 40, **layout: int) -> DataConfig:
    """The same pictures as shards, decoded by the reference decoder."""
    source = small_pictures(folder / "pictures", count)
    uri = str(folder / "shards")
    ingest(IngestConfig(source=str(source), size=16, **layout), uri, StorageConfig(), progress=False)
    return DataConfig(uri=uri, decoder="pillow")


def small_plan(folder: Path, data: DataConfig, seed: int = 3, **train: Any) -> Plan:
    """A plan whose resolved configuration holds what `check_same_training` compares."""
    settings = small_train(**train)
    resolved = {
        "run": {"seed": seed},
        "data": data.model_dump(mode="json"),
        "model": SMALL_MODEL.model_dump(mode="json"),
        "train": settings.model_dump(mode="json"),
    }
    return Plan(str(folder), seed, settings, SMALL_MODEL, data, StorageConfig(), resolved)
