"""The `train` section: everything that decides the outcome of training besides data and model.

Defaults are the paper's (CIPS, section 4.1 and supplementary 1) with the published code's batch and schedule.
"""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.models.cips import Recompute
from pipeline.schema import Section


class PatchConfig(Section):
    """Memory-bounded training on K x K patches (supplementary, section 2)."""

    size: PositiveInt | None = Field(default=None, ge=8)
    """K, pixels along a patch; empty trains on whole pictures. A power of two: the discriminator is built at K."""
    strides: list[PositiveInt] = Field(default=[1], min_length=1)
    """Sigma, the distance between a patch's pixels; one of the list is drawn for each update."""

    @model_validator(mode="after")
    def _power_of_two(self) -> "PatchConfig":
        if self.size is not None and self.size & (self.size - 1):
            raise ValueError(f"train.patch.size is {self.size}; a power of two is needed, such as 64")
        return self


class TrainConfig(Section):
    """How long, how fast and by which rules G and D are trained. All periods are counted in images."""

    total_kimg: PositiveFloat = 25_000
    """Training ends after this many thousand real images."""
    batch_size: PositiveInt = 32
    """Global batch: images for one update of D and of G, over all workers. A multiple of the stddev group."""
    accumulation: PositiveInt = 1
    """Each worker computes its share in this many parts; divides memory, never changes the result's meaning."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Matrix products under autocast; auto takes bf16 where the processor multiplies it natively. R1 is fp32."""
    recompute: Recompute = "layer"
    """What G's backward pass computes again, for memory: "none", each "layer"'s modulated weights, or each "segment"
    (a group of two layers), which keeps every other activation only and costs one more forward pass."""
    cuda_graphs: bool = False
    """G's forward and backward are recorded once and replayed (CUDA, accumulation=1): for small pictures, where a GPU
    waits for Python. Keeps the memory of a forward, a backward and G's gradients for good. Has not run on a GPU yet."""
    learning_rate: PositiveFloat = 0.002
    """Adam's rate of G and of D before the lazy rescaling (paper: 2e-3)."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Adam's betas before the lazy rescaling (paper: 0 and 0.99)."""
    lazy_rescale: bool = True
    """Scale D's Adam by 16/17 and G's by 4/5 in rate and in the exponent of the betas, as the published code."""
    r1_gamma: float = Field(default=10.0, ge=0)
    """Weight of the R1 penalty; the most important knob of a data set. Try a quarter to four times this."""
    r1_interval: PositiveInt = 16
    """R1 is an update of its own each this many updates, with its weight multiplied by the same number."""
    ema_kimg: PositiveFloat = 10.0
    """Half-life of the generator's running average, in thousand images."""
    ema_rampup: float | None = Field(default=None, ge=0)
    """Early on the half-life is at most this share of the images seen (0.05, say); empty: no ramp."""
    patch: PatchConfig = PatchConfig()
    """Train on patches instead of whole pictures."""
    tick_kimg: PositiveFloat = 4.0
    """A status line, scalars and a sample grid each this many thousand images."""
    checkpoint_kimg: PositiveFloat = 200.0
    """A checkpoint each this many thousand images, and one at the end."""
    keep_checkpoints: PositiveInt = 3
    """Older checkpoints are deleted; the latest and the one with the best distance always stay."""
    evaluate_kimg: PositiveFloat | None = None
    """The distance to the real images at the start, each this many thousand images, and at the end; empty: never."""
    grid: tuple[PositiveInt, PositiveInt] = (8, 6)
    """Columns and rows of the sample grid."""

    @model_validator(mode="after")
    def _betas_in_range(self) -> "TrainConfig":
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"train.betas is {self.betas}; each must lie in [0, 1)")
        return self

    @property
    def total_images(self) -> int:
        """Images until the end, rounded up to whole updates."""
        return -(-round(self.total_kimg * 1000) // self.batch_size) * self.batch_size

    def period(self, kimg: float) -> int:
        """A period in images, rounded to whole updates and at least one."""
        return max(1, round(kimg * 1000 / self.batch_size)) * self.batch_size
