"""The paper's training on a card, planned with every assumption set."""

from typing import Any

from pipeline.benchmark.plan_cards import CARDS
from pipeline.benchmark.plan_worker import Assumptions, Planned
from pipeline.models.build import ModelConfig
from pipeline.training.settings import TrainConfig


def planned(card: str = "h200", train: TrainConfig | None = None, **assumed: Any) -> Planned:
    """The paper's training on a card, with every assumption set."""
    values = {
        "generator_share": 0.5,
        "discriminator_share": 0.25,
        "r1_share": 0.5,
        "product_tflops": None,
        "images_per_second": None,
        "network_gbps": 3200.0,
        "storage_gbps": 10.0,
        "usd_per_hour": 3.0,
        "picture_bytes": 50_000.0,
        "rows_per_get": 100.0,
    }
    return Planned(ModelConfig(), train or TrainConfig(), CARDS[card], Assumptions(**(values | assumed)))
