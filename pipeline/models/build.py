"""From a config to a generator and its discriminator."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.models.cips import Generator, NoiseMode
from pipeline.models.discriminator import Discriminator
from pipeline.schema import Section

Positive = Annotated[int, Field(ge=1)]


class DiscriminatorConfig(Section):
    """StyleGAN2's residual discriminator. Channels at resolution r: min(channel_max, channel_base // r)."""

    channel_base: Positive = 32768
    """Channels times resolution, where channel_max does not cap it."""
    channel_max: Positive = 512
    """Most channels of any layer."""
    group: Positive = 4
    """Pictures that share one minibatch standard deviation; divides every micro-batch."""


class ModelConfig(Section):
    """The generator and its discriminator. The defaults are the paper's: 45.9 M parameters at 256 pixels."""

    generator: Literal["cips"] = "cips"
    """Which generator."""
    size: int = 256
    """Height and width of the native grid, in pixels: a power of two of at least 8."""
    width: Positive = 512
    """Channels of Fourier features and of coordinate embedding, each, and of all layers without `widths`."""
    widths: list[Positive] | None = None
    """Channels of each of the log2(size) - 1 groups; the authors' code: 512, 512, 512, 512, 512, 256, 128."""
    latent: Positive = 512
    """Size of the latents z and w."""
    mapping_layers: Positive = 8
    """Layers of the mapping network from z to w."""
    noise: NoiseMode = "random"
    """Noise in each layer: drawn anew for each picture, fixed (a hash of pixel and layer), or off."""
    max_pixels_in_flight: Annotated[int, Field(ge=64)] | None = 1 << 20
    """Without gradients, synthesise about so many pixels at once: bounds memory, not what is drawn."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """The discriminator."""

    @field_validator("size")
    @classmethod
    def _size_is_power_of_two(cls, size: int) -> int:
        if size < 8 or size & (size - 1):
            raise ValueError(f"model.size must be a power of two of at least 8 (8, 16, 32, ...), got {size}")
        return size

    @model_validator(mode="after")
    def _widths_match_size(self) -> "ModelConfig":
        if self.widths is not None and len(self.widths) != self.groups:
            raise ValueError(
                f"model.widths must name {self.groups} widths for model.size {self.size}, one for each "
                f"group of layers (log2(size) - 1), got {len(self.widths)}: {self.widths}"
            )
        if self.discriminator.channel_base < self.size:
            raise ValueError(
                f"model.discriminator.channel_base {self.discriminator.channel_base} leaves no channel at "
                f"{self.size} pixels; it must be at least model.size"
            )
        return self

    @property
    def groups(self) -> int:
        """Groups of layers: log2(size) - 1."""
        return self.size.bit_length() - 2

    @property
    def group_widths(self) -> list[int]:
        """Channels of each group: `widths`, or `width` for all."""
        return [self.width] * self.groups if self.widths is None else list(self.widths)


def build_generator(config: ModelConfig, kind: type[Generator] = Generator) -> Generator:
    """A fresh generator, from torch's global random state and on its default device. kind: another form of it."""
    return kind(
        size=config.size,
        width=config.width,
        widths=config.group_widths,
        latent=config.latent,
        mapping_layers=config.mapping_layers,
        noise=config.noise,
        max_pixels_in_flight=config.max_pixels_in_flight,
    )


def build_discriminator(config: DiscriminatorConfig, size: int) -> Discriminator:
    """A fresh discriminator for pictures or patches of size x size, as `build_generator` makes one."""
    return Discriminator(size, channel_base=config.channel_base, channel_max=config.channel_max, group=config.group)
