"""Memory of one worker in training, from shapes: what stays, and what each phase keeps for its backward pass."""

from dataclasses import dataclass

import torch

from pipeline.benchmark.plan_flops import blocks, channels, layers
from pipeline.models.build import DiscriminatorConfig, ModelConfig, build_discriminator, build_generator
from pipeline.training.settings import TrainConfig
from pipeline.training.world import parts_of

PASSING = 4
"""Tensors of a layer's size that a backward pass holds beside what was kept: gradients in, masked, copied and out."""
PASSING_WEIGHTS = 4
"""And copies in fp32 of a layer's weights for each picture: the gradient, and its products with weight and style."""
FRAGMENTS = 1.1
"""What the allocator takes for each byte of activations that is asked for."""
CONTEXT = 1_000_000_000
"""Bytes of the driver's context, and of the libraries' kernels and workspaces."""


@dataclass(frozen=True)
class Parameters:
    """How many numbers the models hold."""

    generator: int
    discriminator: int
    table: int
    """The coordinate embedding, a part of the generator's."""
    mean_w: int
    """Not trained, but kept and stored with each generator."""


@dataclass(frozen=True)
class Memory:
    """Bytes. Of the phases only the largest counts: each is freed before the next."""

    weights: int
    average: int
    adam: int
    gradients: int
    """DDP's buckets too: gradients are views of them."""
    generator_update: int
    discriminator_update: int
    r1: int
    context: int

    @property
    def kept(self) -> int:
        return self.weights + self.average + self.adam + self.gradients

    @property
    def peak(self) -> int:
        phases = max(self.generator_update, self.discriminator_update, self.r1)
        return self.kept + self.context + round(FRAGMENTS * phases)


def parameters_of(model: ModelConfig, train: TrainConfig) -> Parameters:
    """Counted on modules without memory."""
    with torch.device("meta"):
        generator = build_generator(model)
        discriminator = build_discriminator(model.discriminator, train.patch.size or model.size)
    return Parameters(
        sum(parameter.numel() for parameter in generator.parameters()),
        sum(parameter.numel() for parameter in discriminator.parameters()),
        model.size**2 * model.width,
        model.latent,
    )


def memory_of(
    model: ModelConfig,
    train: TrainConfig,
    count: Parameters,
    pictures: int,
    element_bytes: int,
    context: int = CONTEXT,
) -> Memory:
    """Of a worker that computes so many pictures at a time, with activations of so many bytes an element."""
    side = train.patch.size or model.size
    widest = max(model.group_widths) * side**2
    kept, widest_in_d = discriminator_kept(model.discriminator, side), channels(model.discriminator, side) * side**2
    cast_weights = element_bytes * count.discriminator
    drawn = min(pictures * side**2, model.max_pixels_in_flight or pictures * side**2)
    return Memory(
        weights=4 * (count.generator + count.discriminator),
        average=4 * (count.generator + count.mean_w),
        adam=8 * (count.generator + count.discriminator),
        gradients=4 * (count.generator + count.discriminator),
        generator_update=generator_kept(model, train, pictures, element_bytes)
        + element_bytes * pictures * (kept + PASSING * widest)
        + 4 * PASSING_WEIGHTS * pictures * max(layer.inputs * layer.outputs for layer in layers(model))
        + cast_weights,
        discriminator_update=max(
            element_bytes * 2 * pictures * (kept + PASSING * widest_in_d) + cast_weights,
            element_bytes * PASSING * drawn * max(model.group_widths),  # the fakes are drawn before
        ),
        # In fp32: activations, gradients of the first pass (kept for the second), and those passing.
        r1=4 * (pictures * (kept + r1_kept(model.discriminator, side) + PASSING * widest_in_d) + count.discriminator)
        if train.r1_gamma > 0
        else 0,
        context=context,
    )


def generator_kept(model: ModelConfig, train: TrainConfig, pictures: int, element_bytes: int) -> int:
    """Bytes that G's forward pass keeps for its backward pass; with segments, also those of the one made again."""
    pixels = (train.patch.size or model.size) ** 2
    outputs = [layer.outputs for layer in layers(model) if not layer.rgb]
    # Sines keep their fp32 argument; the whole encoding is kept as the first product reads it.
    grids = 1 if train.patch.size is None else pictures
    kept = grids * pixels * model.width * (4 + 2 * element_bytes)
    if model.noise != "off":  # drawn, and multiplied by each layer's strength: one number for all channels
        kept += 2 * 4 * len(outputs) * pixels * (pictures if model.noise == "random" else 1)
    if train.recompute == "segment":
        outputs = [*outputs[:-1:2], 2 * max(outputs)]
    kept += sum(outputs) * pictures * pixels * element_bytes
    if train.recompute == "none":
        kept += sum(layer.inputs * layer.outputs for layer in layers(model)) * pictures * element_bytes
    return kept


def discriminator_kept(config: DiscriminatorConfig, size: int) -> int:
    """Elements that D's forward pass keeps for one picture: what convolutions read, and signs of activations."""
    kept = (3 + channels(config, size)) * size**2
    for block in blocks(config, size):
        full, halved = block.resolution**2, (block.resolution // 2) ** 2
        # The first convolution's result, and blurred; the blurred input of the 1x1; the second's result, and the sum.
        kept += block.inputs * (full + (block.resolution + 1) ** 2 + halved) + 2 * block.outputs * halved
    return kept + 16 * (2 * channels(config, 4) + 1) + channels(config, 4)


def r1_kept(config: DiscriminatorConfig, size: int) -> int:
    """Elements that R1's first gradient keeps for one picture, beside the forward pass: gradients of convolutions."""
    kept = channels(config, size) * size**2
    for block in blocks(config, size):
        kept += block.inputs * block.resolution**2 + 2 * block.outputs * (block.resolution // 2) ** 2
    return kept + 16 * channels(config, 4)


# ---- how much fits -------------------------------------------------------------------------------


def busiest_share(batch: int, group: int, workers: int) -> int:
    """Pictures of the worker that has most: whole groups, as `share_of` deals them."""
    return -(-(batch // group) // workers) * group


def largest_part(share: int, group: int, accumulation: int) -> int:
    """Pictures that a worker with such a share computes at a time, at most."""
    return max(part.stop - part.start for part in parts_of(range(share), group, accumulation))


def fitting_accumulation(
    model: ModelConfig,
    train: TrainConfig,
    count: Parameters,
    share: int,
    element_bytes: int,
    limit: float,
    context: int = CONTEXT,
) -> int | None:
    """The smallest `train.accumulation`, from the configured one on, that fits into `limit` bytes; None: not one."""
    group = model.discriminator.group
    for accumulation in range(min(train.accumulation, share // group), share // group + 1):
        part = largest_part(share, group, accumulation)
        if memory_of(model, train, count, part, element_bytes, context).peak <= limit:
            return accumulation
    return None
