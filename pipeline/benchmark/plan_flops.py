"""Floating-point operations of training, counted from shapes: two for each multiply-add of a product or convolution.

What passes over the pixels without a product (activations, noise, optimisers) is bound by memory, and not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from pipeline.models.build import DiscriminatorConfig, ModelConfig
from pipeline.training.settings import TrainConfig

TAPS = 16
"""Of the discriminator's blur: 4 x 4."""


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs for one real picture of the batch, on average over updates. Each update draws two fakes beside it."""

    generator_for_discriminator: float
    generator_forward: float
    generator_backward: float
    generator_again: float
    """The forward pass of groups that `train.recompute=segment` repeats."""
    discriminator_forward: float
    """On a real and a fake picture."""
    discriminator_backward: float
    discriminator_for_generator: float
    """Forward, and the gradient of the picture alone."""
    r1: float
    """Divided by `train.r1_interval`; runs in fp32."""
    mapping: float
    """Three times forward (D's and G's fakes, the mean style) and once backward."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def generator(self) -> float:
        """All that runs at the generator's rate."""
        forward = self.generator_for_discriminator + self.generator_forward
        return forward + self.generator_backward + self.generator_again + self.mapping

    @property
    def discriminator(self) -> float:
        """All that runs at the discriminator's rate in the precision of training."""
        return self.discriminator_forward + self.discriminator_backward + self.discriminator_for_generator


def training_flops(model: ModelConfig, train: TrainConfig) -> TrainingFlops:
    """Of one real picture, or patch where `train.patch.size` is set."""
    side = train.patch.size or model.size
    forward, backward = generator_flops(model, side * side)
    learned, blur, blur_back = discriminator_flops(model.discriminator, side)
    again = side**2 * sum(layer.pixels for layer in layers(model)[1:]) if train.recompute == "segment" else 0
    mapping = 2 * model.mapping_layers * model.latent**2
    r1 = r1_flops(model.discriminator, side) / train.r1_interval if train.r1_gamma > 0 else 0.0
    return TrainingFlops(
        generator_for_discriminator=forward,
        generator_forward=forward,
        generator_backward=backward,
        generator_again=again,
        discriminator_forward=2 * (learned + blur),
        discriminator_backward=2 * (2 * learned - from_rgb_flops(model.discriminator, side) + blur_back),
        discriminator_for_generator=2 * learned + blur + blur_back,
        r1=r1,
        mapping=5 * mapping,
    )


# ---- generator -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A modulated layer's channels; FLOPs of its forward pass for each pixel, and once for a picture."""

    inputs: int
    outputs: int
    rgb: bool
    latent: int

    @property
    def pixels(self) -> int:
        return 2 * self.inputs * self.outputs

    @property
    def picture(self) -> int:
        """The style, and the demodulation where there is one."""
        return 2 * self.latent * self.inputs + (0 if self.rgb else 2 * self.inputs * self.outputs)


def layers(model: ModelConfig) -> list[Layer]:
    """Every modulated layer, in the order of the forward pass; the first has both halves of the encoding as input."""
    widths = model.group_widths
    found = [Layer(2 * model.width, widths[0], False, model.latent)]
    for before, after in zip([widths[0], *widths], widths, strict=False):
        found += [Layer(before, after, False, model.latent), Layer(after, after, False, model.latent)]
        found.append(Layer(after, 3, True, model.latent))
    return found


def generator_flops(model: ModelConfig, pixels: int) -> tuple[int, int]:
    """Forward and backward for one picture of so many pixels, without the mapping network."""
    # A grid that pictures share is encoded once for all; counted for each, it is less than 0.2%.
    fourier = 4 * model.width * pixels
    forward = sum(layer.pixels * pixels + layer.picture for layer in layers(model))
    return forward + fourier, 2 * forward + fourier  # coordinates need no gradient


# ---- discriminator -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A residual block: halves a resolution."""

    resolution: int
    inputs: int
    outputs: int

    @property
    def learned(self) -> int:
        """A 3x3 convolution; then one with stride 2, and a 1x1 beside it."""
        halved = (self.resolution // 2) ** 2
        return 2 * self.inputs * (9 * self.inputs * self.resolution**2 + (9 + 1) * self.outputs * halved)

    @property
    def blur(self) -> int:
        """One that adds a row and a column, and one at every second place."""
        return 2 * TAPS * self.inputs * ((self.resolution + 1) ** 2 + (self.resolution // 2) ** 2)

    @property
    def blur_back(self) -> int:
        """Both at full resolution: a gradient at every second place is filled up with zeros."""
        return 2 * TAPS * self.inputs * 2 * self.resolution**2


def channels(config: DiscriminatorConfig, resolution: int) -> int:
    return min(config.channel_max, config.channel_base // resolution)


def blocks(config: DiscriminatorConfig, size: int) -> Iterator[Block]:
    """From the picture down to 4 x 4."""
    resolution = size
    while resolution > 4:
        yield Block(resolution, channels(config, resolution), channels(config, resolution // 2))
        resolution //= 2


def from_rgb_flops(config: DiscriminatorConfig, size: int) -> int:
    """Of the first layer, whose input needs no gradient in D's own update."""
    return 2 * 3 * channels(config, size) * size**2


def discriminator_flops(config: DiscriminatorConfig, size: int) -> tuple[int, int, int]:
    """For one picture: learned layers forward, blurs forward, blurs backward."""
    last = channels(config, 4)
    ending = 2 * 9 * (last + 1) * last * 16 + 2 * 16 * last * last + 2 * last
    learned = from_rgb_flops(config, size) + sum(block.learned for block in blocks(config, size)) + ending
    blur, back = (sum(getattr(block, name) for block in blocks(config, size)) for name in ("blur", "blur_back"))
    return learned, blur, back


def r1_flops(config: DiscriminatorConfig, size: int) -> int:
    """One penalty on one picture: forward; its gradient; that once more for gradient and weights; backward through all.

    The last is for the minibatch standard deviation, whose second derivative is not zero.
    """
    learned, blur, back = discriminator_flops(config, size)
    return (1 + 1 + 2 + 2) * learned + blur + 3 * back
