"""One update of D (with R1 where it is due) and one of G, on this worker's share of the global batch.

Every draw is keyed by (seed, purpose, images seen, position in the global batch), and gradients are sums over
pictures divided by the global batch, so neither workers nor accumulation change the training (promises 3, 4).
On CUDA nothing here waits for the device; `scalars`, once a tick, does.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.coordinates import full_grid, patch_grid, sample_pixels
from pipeline.models.build import ModelConfig
from pipeline.models.discriminator import images_from_pixels
from pipeline.ops.precision import full_fp32
from pipeline.pictures import to_float
from pipeline.randomness import Purpose, corners, latents, noise_keys, stride
from pipeline.training import phases as phase
from pipeline.training.distribute import distribute, synchronise
from pipeline.training.graphs import GraphError, record
from pipeline.training.losses import discriminator_loss, generator_loss, r1_penalty
from pipeline.training.precision import agreed_precision, forbid_tf32_for, precision_sentence
from pipeline.training.settings import TrainConfig
from pipeline.training.state import TrainState, average_decay
from pipeline.training.world import World, parts_of, share_of

# B pictures, P pixels, C channels, H height, W width, Z latent

SCALARS = ("loss/D", "loss/G", "loss/r1", "scores/real", "scores/fake")
MEAN_W_DECAY = 0.998  # of the tracked mean style, per update, as StyleGAN2


class Updates:
    """Both updates of one training iteration, over a `TrainState` that they change in place.

    phases: is told which part of an update begins and ends, for benchmarks.
    """

    def __init__(
        self,
        train: TrainConfig,
        model: ModelConfig,
        seed: int,
        state: TrainState,
        world: World,
        device: torch.device,
        phases: phase.Phases = phase.unwatched,
    ) -> None:
        self.train, self.seed, self.state, self.world, self.device = train, seed, state, world, device
        self.phases = phases
        self.share = share_of(world, train.batch_size, model.discriminator.group)
        self.parts = parts_of(self.share, model.discriminator.group, train.accumulation)
        self.size, self.patch = model.size, train.patch
        self.precision = agreed_precision(train.precision, device, world)
        forbid_tf32_for(self.precision)
        if world.rank == 0:
            print(precision_sentence(train.precision, device, self.precision), flush=True)
        self.dtype = state.average.mean_w.dtype  # float32; float64 where tests ask for it
        self.positions_B = torch.arange(self.share.start, self.share.stop, device=device)
        self.grid_P2 = full_grid(model.size).to(device)
        if train.cuda_graphs:
            recorded = self._record_generator()
            if world.rank == 0:
                print(recorded, flush=True)
        group = slice(0, model.discriminator.group)
        self.generator = distribute(state.generator, world, device, lambda module: self._rehearse_g(module, group))
        self.discriminator = distribute(state.discriminator, world, device, lambda d: self._rehearse_d(d, group))
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def __call__(self, real_BHWC: Tensor) -> None:
        """Trains on this worker's uint8 pictures (B, H, W, 3) and moves the count of images on."""
        images_seen = self.state.images_seen
        coordinates = self._coordinates(images_seen)
        real_BP3 = to_float(sample_pixels(real_BHWC, coordinates) if self.patch.size else real_BHWC.flatten(1, 2))
        real_BCHW = images_from_pixels(real_BP3.to(self.dtype), self.side, self.side)
        self._update_discriminator(real_BCHW, coordinates, images_seen)
        if self.train.r1_gamma > 0 and images_seen // self.train.batch_size % self.train.r1_interval == 0:
            with self.phases(phase.D_R1):
                self._update_r1(real_BCHW)
        self._update_generator(coordinates, images_seen)
        with self.phases(phase.EMA):
            self._update_average(images_seen)
        self.state.images_seen = images_seen + self.train.batch_size

    @property
    def side(self) -> int:
        """Pixels along what D sees: a patch, or the whole picture."""
        return self.patch.size or self.size

    def scalars(self) -> dict[str, float]:
        """Means over all pictures since the last call, over all workers; a collective call."""
        packed = torch.stack([self._sums.get(name, torch.zeros((), device=self.device)) for name in SCALARS]).double()
        totals = self.world.sum_(packed).tolist()
        found = {
            name: total / (self._counts[name] * self.train.batch_size)
            for name, total in zip(SCALARS, totals, strict=True)
            if name in self._counts
        }
        self._sums, self._counts = {}, {}
        return found

    def _update_discriminator(self, real_BCHW: Tensor, coordinates: Tensor, images_seen: int) -> None:
        def loss_of(part: slice) -> Tensor:
            with self.phases(phase.G_FOR_D), torch.no_grad(), self.autocast():
                fake_BP3 = self._fake(self.state.generator, coordinates, images_seen, part, for_generator=False)
            real = real_BCHW[part]
            fake = images_from_pixels(fake_BP3.to(self.dtype), *real.shape[2:])
            with self.phases(phase.D_MAIN), self.autocast():
                # One forward for both: groups of the minibatch stddev are contiguous, so they never mix.
                logits = self.discriminator(torch.cat([real, fake]))
            real_B, fake_B = logits.chunk(2)
            losses_B = discriminator_loss(real_B, fake_B)
            self._add("loss/D", losses_B)
            self._add("scores/real", real_B)
            self._add("scores/fake", fake_B)
            return losses_B

        self._descend(self.discriminator, self.state.optimizer_discriminator, loss_of, 1.0, phase.D_MAIN)
        self._count("loss/D", "scores/real", "scores/fake")

    def _update_r1(self, real_BCHW: Tensor) -> None:
        def loss_of(part: slice) -> Tensor:
            penalty_B = r1_penalty(self.discriminator, real_BCHW[part])
            self._add("loss/r1", penalty_B)
            return penalty_B

        weight = self.train.r1_gamma / 2 * self.train.r1_interval
        with full_fp32():
            self._descend(self.discriminator, self.state.optimizer_discriminator, loss_of, weight, phase.D_R1)
        self._count("loss/r1")

    def _update_generator(self, coordinates: Tensor, images_seen: int) -> None:
        def loss_of(part: slice) -> Tensor:
            with self.phases(phase.G_FORWARD), self.autocast():
                fake_BP3 = self._fake(self.generator, coordinates, images_seen, part, for_generator=True)
            with self.phases(phase.D_FOR_G), self.autocast():
                logits_B = self.state.discriminator(images_from_pixels(fake_BP3, self.side, self.side))
            losses_B = generator_loss(logits_B)
            self._add("loss/G", losses_B)
            return losses_B

        self.state.discriminator.requires_grad_(False)
        self._descend(self.generator, self.state.optimizer_generator, loss_of, 1.0, phase.G_BACKWARD)
        self.state.discriminator.requires_grad_(True)
        self._count("loss/G")

    @torch.no_grad()
    def _update_average(self, images_seen: int) -> None:
        average = self.state.average
        torch._foreach_lerp_(
            list(average.parameters()),
            list(self.state.generator.parameters()),
            1 - average_decay(self.train, images_seen),
        )
        z_BZ = latents(self.seed, Purpose.LATENT_GENERATOR, images_seen, self.positions_B, average.latent)
        total_Z = self.world.sum_(average.mapping(z_BZ.to(self.dtype)).sum(dim=0))
        average.mean_w.lerp_(total_Z / self.train.batch_size, 1 - MEAN_W_DECAY)

    def _fake(
        self, generator: nn.Module, coordinates: Tensor, images_seen: int, part: slice, *, for_generator: bool
    ) -> Tensor:
        """Generated pixels (B, P, 3) at the coordinates of the real ones, for one part of the share."""
        return generator(*self._drawn(coordinates, images_seen, part, for_generator=for_generator))

    def _drawn(self, coordinates: Tensor, images_seen: int, part: slice, *, for_generator: bool) -> tuple[Tensor, ...]:
        """What the generator makes pixels from: latents, coordinates and keys of the noise."""
        latent = Purpose.LATENT_GENERATOR if for_generator else Purpose.LATENT_DISCRIMINATOR
        noise = Purpose.NOISE_GENERATOR if for_generator else Purpose.NOISE_DISCRIMINATOR
        positions_B = self.positions_B[part]
        z_BZ = latents(self.seed, latent, images_seen, positions_B, self.state.generator.latent).to(self.dtype)
        keys_B2 = noise_keys(self.seed, noise, images_seen, positions_B)
        return z_BZ, coordinates[part] if coordinates.ndim == 3 else coordinates, keys_B2

    def _coordinates(self, images_seen: int) -> Tensor:
        """The full grid (P, 2), or a patch per picture (B, P, 2) with its corner drawn uniformly."""
        if self.patch.size is None:
            return self.grid_P2
        step = stride(self.seed, images_seen, self.patch.strides)
        corners_B2 = corners(self.seed, images_seen, self.positions_B, self.size, self.patch.size, step)
        return patch_grid(corners_B2, self.patch.size, step)

    def _record_generator(self) -> str:
        """Makes G's passes CUDA graphs where that can be; says what came of it. Before DDP wraps G and data comes."""
        if self.device.type != "cuda":
            return f"CUDA graphs: none, since training is on {self.device.type}"
        if self.train.accumulation > 1:
            return "CUDA graphs: none, since gradients are added up over parts (train.accumulation)"

        def draw(number: int) -> tuple[Tensor, ...]:
            coordinates = self._coordinates(number).clone()
            return self._drawn(coordinates, number, self.parts[0], for_generator=True)

        problem: GraphError | None = None
        try:
            record(self.state.generator, draw, self.autocast)
        except GraphError as error:
            problem = error
        if self.world.sum_(torch.tensor([float(problem is not None)], device=self.device)).item():
            raise problem or GraphError("CUDA graphs failed in another worker, which says why")
        return "CUDA graphs: the generator's forward and backward"

    def _rehearse_g(self, generator: nn.Module, part: slice) -> Tensor:
        with self.autocast():
            return self._fake(generator, self._coordinates(0), 0, part, for_generator=True)

    def _rehearse_d(self, discriminator: nn.Module, part: slice) -> Tensor:
        black_BP3 = torch.zeros(part.stop, self.side**2, 3, dtype=self.dtype, device=self.device)
        with self.autocast():
            return discriminator(images_from_pixels(black_BP3, self.side, self.side))

    def _descend(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[[slice], Tensor],
        weight: float,
        backward: str,
    ) -> None:
        """One optimiser step on the mean over the global batch; gradients travel with the last part only.

        backward: the phase that the backward passes belong to.
        """
        # DDP averages over workers, who may hold unequal shares: sums times world size over batch undo that.
        scale = weight * self.world.size / self.train.batch_size
        optimizer.zero_grad(set_to_none=True)
        for number, part in enumerate(self.parts):
            with synchronise(module, last=number == len(self.parts) - 1):
                loss = loss_of(part).sum() * scale
                with self.phases(backward):
                    loss.backward()
        with self.phases(phase.OPTIMISERS):
            optimizer.step()

    def autocast(self) -> torch.autocast:
        """The context of matrix products in the precision of this run."""
        enabled = self.precision != torch.float32
        # No weight is cast twice inside one: a cache would be of no use, and CUDA graphs refuse it.
        return torch.autocast(self.device.type, self.precision, enabled=enabled, cache_enabled=False)

    def _add(self, name: str, values_B: Tensor) -> None:
        total = values_B.detach().sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    def _count(self, *names: str) -> None:
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + 1
