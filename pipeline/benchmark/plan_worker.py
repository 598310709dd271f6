"""What one worker needs for a training: seconds from FLOPs and rates, bytes from shapes."""

from dataclasses import dataclass
from functools import cached_property

from pipeline.benchmark.plan_cards import Card
from pipeline.benchmark.plan_flops import TrainingFlops, training_flops
from pipeline.benchmark.plan_memory import (
    CONTEXT,
    Memory,
    Parameters,
    fitting_accumulation,
    memory_of,
    parameters_of,
)
from pipeline.models.build import ModelConfig
from pipeline.training.settings import TrainConfig

ADAM_BYTES, AVERAGE_BYTES = 28, 12
"""A parameter costs an update: read p, g, m, v, write p, m, v; read the average and p, write the average."""


@dataclass(frozen=True)
class Assumptions:
    """What shapes do not say. Shares are of the rate of a large matrix product in the same precision."""

    generator_share: float
    discriminator_share: float
    r1_share: float
    """Of the fp32 rate: R1 is never computed in bf16."""
    product_tflops: float | None
    """Measured rate of matrix products in the precision of training; None takes the card's."""
    images_per_second: float | None
    """Measured on one GPU; None computes it."""
    network_gbps: float
    """Of one machine, each way."""
    storage_gbps: float
    """Of one machine."""
    usd_per_hour: float
    """Of one GPU."""
    picture_bytes: float
    rows_per_get: float
    """Pictures in a row group, which is one GET."""


@dataclass(frozen=True)
class Planned:
    """A training, a card and the assumptions: all that the figures follow from."""

    model: ModelConfig
    train: TrainConfig
    card: Card
    assumed: Assumptions

    @cached_property
    def half(self) -> bool:
        """Whether matrix products are in bf16: asked for or left open, and multiplied natively."""
        return self.train.precision != "fp32" and self.card.bf16

    @property
    def element_bytes(self) -> int:
        return 2 if self.half else 4

    @cached_property
    def count(self) -> Parameters:
        return parameters_of(self.model, self.train)

    @cached_property
    def flops(self) -> TrainingFlops:
        return training_flops(self.model, self.train)

    @property
    def context(self) -> int:
        """Bytes of the driver and its libraries."""
        return CONTEXT if self.card.name != "cpu" else 0

    @property
    def product_rate(self) -> float:
        """FLOP/s of a large matrix product in the precision of training."""
        if self.assumed.product_tflops is not None:
            return 1e12 * self.assumed.product_tflops
        peak = self.card.half_tflops if self.half else self.card.fp32_tflops
        return 1e12 * peak * self.card.product_share

    @property
    def exact_rate(self) -> float:
        """The same in fp32."""
        if self.assumed.product_tflops is not None and not self.half:
            return self.product_rate
        return 1e12 * self.card.fp32_tflops * self.card.product_share

    @property
    def generator_rate(self) -> float:
        return self.product_rate * self.assumed.generator_share

    @property
    def discriminator_rate(self) -> float:
        return self.product_rate * self.assumed.discriminator_share

    @property
    def r1_rate(self) -> float:
        return self.exact_rate * self.assumed.r1_share

    @property
    def image_seconds(self) -> float:
        """Computing one picture, by FLOPs and rates; without what an update costs once."""
        flops = self.flops
        return (
            flops.generator / self.generator_rate
            + flops.discriminator / self.discriminator_rate
            + flops.r1 / self.r1_rate
        )

    @property
    def scale(self) -> float:
        """What a measured rate makes of computed times: all parts take so many times as long."""
        measured = self.assumed.images_per_second
        return 1.0 if measured is None else 1 / measured / self.image_seconds

    @property
    def optimizer_seconds(self) -> float:
        """Adams and the running average of one update, bound by the card's memory; R1 is an update of D of its own."""
        updates_of_d = 1 + (1 / self.train.r1_interval if self.train.r1_gamma > 0 else 0)
        of_g = self.count.generator * (ADAM_BYTES + AVERAGE_BYTES)
        of_d = self.count.discriminator * ADAM_BYTES * updates_of_d
        return (of_g + of_d) / (1e9 * self.card.bandwidth_gb)

    def compute_seconds(self, share: int) -> float:
        """An update of so many pictures on one GPU, without the network."""
        if self.assumed.images_per_second is not None:
            return share / self.assumed.images_per_second
        return share * self.image_seconds + self.optimizer_seconds

    def memory(self, pictures: int) -> Memory:
        """With so many pictures at a time."""
        return memory_of(self.model, self.train, self.count, pictures, self.element_bytes, self.context)

    def fitting(self, share: int) -> int | None:
        """The least `train.accumulation`, from the configured one on, with which a share fits; None if none does."""
        limit = 1e9 * self.card.memory_gb
        return fitting_accumulation(self.model, self.train, self.count, share, self.element_bytes, limit, self.context)
