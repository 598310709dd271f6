"""The distance of a generator to a data set, measured by one worker or by several together."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.data.manifest import read_manifest
from pipeline.data.stream import DataConfig, augmentation, read_images
from pipeline.evaluation.features import load_features
from pipeline.evaluation.frechet import (
    Progress,
    blurred,
    generated_moments,
    image_moments,
    measure,
    read_real_moments,
    share,
    write_real_moments,
)
from pipeline.evaluation.metrics import Moments
from pipeline.evaluation.protocol import EvaluateConfig, ProtocolError, Result, make_protocol, real_indices
from pipeline.models.cips import Generator
from pipeline.storage import StorageConfig, StorageError, UnavailableError


class DistanceMeter:
    """Holds the feature network and the real pictures' moments; each call measures one generator.

    Pictures are dealt to the workers by number, and moments add up, so the number of workers changes nothing.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        data: DataConfig,
        size: int,
        storage: StorageConfig,
        folder: str,
        device: torch.device,
        rank: int = 0,
        workers: int = 1,
        sum_: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """
        Args:
            size: of the generated pictures, in pixels: with data.crop, of the squares cut from the real ones.
            folder: where the moments of real pictures are kept between runs.
            sum_: sums a tensor over the workers in place, the same on each.
        """
        self.config, self.data, self.storage, self.folder, self.device = config, data, storage, folder, device
        self.size = size if data.crop else None  # whole pictures are compared whatever their size
        self.rank, self.workers, self.sum_ = rank, workers, sum_
        self.manifest = read_manifest(data.uri, storage)
        self.network = load_features(config, storage, device)
        views = augmentation(self.manifest, data, self.size).describe()
        self.protocol = make_protocol(
            config, self.network.weights_sha256, self.manifest.digest, self.manifest.samples, views
        )
        fewest = min(self.protocol.images, self.protocol.real_images)
        if fewest < workers:
            raise ProtocolError(f"{workers} workers cannot share {fewest} pictures; raise evaluate.images")
        self._real: Moments | None = None

    def __call__(self, generator: Generator, images_seen: int = 0) -> dict[str, Any]:
        """The distance of a generator: metric, value and protocol. All workers call it together."""
        generated = self._total(self.generated_part(generator))
        return measure(self.real(), generated, self.protocol).to_dict()

    def generated_part(self, generator: Generator, progress: Progress | None = None) -> Moments:
        """Moments of this worker's share of the generated pictures. Raises ProtocolError for another size."""
        if self.size is not None and generator.size != self.size:
            raise ProtocolError(
                f"the generator draws {generator.size} pixels, but data.crop cuts real pictures to {self.size}; set "
                f"model.size={generator.size}"
            )
        indices = share(self.protocol.images, self.rank, self.workers)
        return generated_moments(generator, self.network, self.protocol, indices, self.config.batch_size, progress)

    def real_part(self, progress: Progress | None = None) -> Moments:
        """Moments of this worker's share of the real pictures."""
        return image_moments(self._real_batches(), self.network, progress)

    def of_blurred(self, sigma: float, progress: Progress | None = None) -> Result:
        """The distance of the same real pictures after a Gaussian blur: a bar that a generator should pass."""
        total = self._total(image_moments(blurred(self._real_batches(), sigma), self.network, progress))
        return measure(self.real(), total, replace(self.protocol, images=total.count))

    def real(self) -> Moments:
        """Moments of the real pictures: from memory, from the folder, or computed and kept there."""
        if self._real is None:
            kept = self.kept()
            found = self.sum_(torch.tensor([float(kept is not None)], device=self.device))
            # One worker may see a file that another does not see yet: then all compute.
            if kept is not None and int(found.item()) == self.workers:
                self._real = kept
            else:
                self.keep(self._total(self.real_part()))
        assert self._real is not None
        return self._real

    def kept(self) -> Moments | None:
        """The real pictures' moments where an earlier evaluation has kept them, and the store answers."""
        try:
            return read_real_moments(self.folder, self.protocol, self.storage)
        except UnavailableError as cause:
            print(f"the real pictures are measured again: {cause}", flush=True)
            return None

    def keep(self, real: Moments) -> None:
        """Takes over the complete moments of the real pictures; rank 0 keeps them for later evaluations."""
        self._real = real
        if self.rank == 0:
            try:
                write_real_moments(self.folder, self.protocol, real, self.storage)
            except StorageError as cause:  # the distance is known all the same (promise 8)
                print(f"the measurement of the real pictures was not kept: {cause}", flush=True)

    def _real_batches(self) -> Iterator[Tensor]:
        # Stand-ins for damaged pictures would make another number under the same protocol.
        whole = self.data.model_copy(update={"on_corrupt": "fail"})
        chosen = real_indices(self.manifest.samples, self.protocol.real_images)
        mine = share(len(chosen), self.rank, self.workers)
        return read_images(
            self.manifest,
            whole,
            self.storage,
            chosen[mine.start : mine.stop],
            self.config.batch_size,
            self.size,
        )

    def _total(self, part: Moments) -> Moments:
        vector = self.sum_(part.to_vector().to(self.device))
        return Moments.from_vector(vector, part.dimension)
