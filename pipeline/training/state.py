"""What training is at a moment: G, D, the averaged G, both Adams and the count of images (promise 5).

Everything else (order of the data, latents, noise, flips, corners) is a function of the seed and that count.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.build import ModelConfig, build_discriminator, build_generator
from pipeline.models.cips import Generator
from pipeline.models.discriminator import Discriminator
from pipeline.training.settings import TrainConfig


@dataclass
class TrainState:
    """The whole of training's memory; a checkpoint holds exactly this."""

    generator: Generator
    discriminator: Discriminator
    average: Generator
    optimizer_generator: torch.optim.Adam
    optimizer_discriminator: torch.optim.Adam
    images_seen: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a stable name, without copies."""
        found: dict[str, Tensor] = {}
        for name, module in self._modules():
            found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        for name, module, optimizer in self._optimizers():
            for key, parameter in module.named_parameters():
                for kind, value in optimizer.state.get(parameter, {}).items():
                    found[f"adam.{name}.{kind}.{key}"] = value
        return found

    def load(self, tensors: dict[str, Tensor], images_seen: int) -> None:
        """Takes over tensors that `tensors()` named, exactly.

        Raises:
            KeyError, RuntimeError: if a name or a shape differs.
        """
        for name, module in self._modules():
            module.load_state_dict(select(tensors, f"{name}."))
        for name, module, optimizer in self._optimizers():
            moments = {kind: select(tensors, f"adam.{name}.{kind}.") for kind in ("step", "exp_avg", "exp_avg_sq")}
            if images_seen and not moments["step"]:
                raise KeyError(f"the checkpoint holds no Adam state of the {name}")
            for key, parameter in module.named_parameters():
                if key in moments["step"]:
                    optimizer.state[parameter] = {
                        kind: like(values[key], parameter) for kind, values in moments.items()
                    }
        self.images_seen = images_seen

    def _modules(self) -> Iterable[tuple[str, nn.Module]]:
        return ("generator", self.generator), ("discriminator", self.discriminator), ("average", self.average)

    def _optimizers(self) -> Iterable[tuple[str, nn.Module, torch.optim.Adam]]:
        return (
            ("generator", self.generator, self.optimizer_generator),
            ("discriminator", self.discriminator, self.optimizer_discriminator),
        )


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, with the prefix taken off."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy on the parameter's device and, where shapes agree, in its memory format (fused Adam needs that)."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def adam(module: nn.Module, train: TrainConfig, rescale: float) -> torch.optim.Adam:
    """Adam as published: lazy regularisation scales the rate by c and raises the betas to the power c."""
    scale = rescale if train.lazy_rescale else 1.0
    beta1, beta2 = (beta**scale for beta in train.betas)
    return torch.optim.Adam(
        module.parameters(), lr=train.learning_rate * scale, betas=(beta1, beta2), eps=1e-8, fused=True
    )


def build_state(model: ModelConfig, train: TrainConfig, seed: int, device: torch.device) -> TrainState:
    """The state before the first image; the same weights for the same seed on every worker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build_generator(model)
        discriminator = build_discriminator(model.discriminator, train.patch.size or model.size)
    average = copy.deepcopy(generator).eval().requires_grad_(False).to(device)
    generator = generator.to(device)
    generator.recompute = train.recompute
    discriminator = discriminator.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainState(
        generator,
        discriminator,
        average,
        # G's 4/5 stands in the published code although it has no lazy regulariser; D's is 16 updates of 17.
        adam(generator, train, 4 / 5),
        adam(discriminator, train, train.r1_interval / (train.r1_interval + 1)),
    )


def average_decay(train: TrainConfig, images_seen: int) -> float:
    """Decay of the running average for one update: 0.5 to the power batch / half-life, both in images."""
    half_life = train.ema_kimg * 1000
    if train.ema_rampup is not None:
        half_life = min(half_life, images_seen * train.ema_rampup)
    return 0.5 ** (train.batch_size / half_life) if half_life > 0 else 0.0
