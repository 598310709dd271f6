"""Floating-point operations of an update by phase: what the mathematics needs, whatever the code does for it."""

from pipeline.benchmark.plan_flops import discriminator_flops, training_flops
from pipeline.models.build import ModelConfig
from pipeline.training import phases as phase
from pipeline.training.settings import TrainConfig


def update_flops(model: ModelConfig, train: TrainConfig) -> dict[str, float]:
    """For one picture of the batch, two for each multiply-add; R1 divided by its interval.

    Work that is done again to save memory is not counted a second time.
    """
    counted = training_flops(model, train)
    learned, blur, _ = discriminator_flops(model.discriminator, train.patch.size or model.size)
    mapping = counted.mapping / 5  # once forward
    found = {
        phase.G_FOR_D: counted.generator_for_discriminator + mapping,
        phase.D_MAIN: counted.discriminator_forward + counted.discriminator_backward,
        phase.D_R1: counted.r1,
        phase.G_FORWARD: counted.generator_forward + mapping,
        phase.D_FOR_G: float(learned + blur),
        phase.G_BACKWARD: counted.discriminator_for_generator
        - (learned + blur)
        + counted.generator_backward
        + 2 * mapping,
        phase.EMA: mapping,
    }
    return {name: amount for name, amount in found.items() if amount}
