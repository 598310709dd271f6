"""First and second moments of features, and the Frechet distance between two sets of them."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# B batch, D feature dimension


class Moments:
    """Count, sum and sum of outer products in float64: additive, so that parts of a set can be merged.

    The covariance is the unbiased one, divided by N - 1, as in numpy.cov, torch-fidelity and pytorch-fid.
    """

    def __init__(self, count: int, sum_D: Tensor, outer_DD: Tensor) -> None:
        self.count = count
        self.sum_D = sum_D
        self.outer_DD = outer_DD

    @classmethod
    def zeros(cls, dimension: int, device: torch.device | str = "cpu") -> "Moments":
        """Moments of nothing yet."""
        kind = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(dimension, **kind), torch.zeros(dimension, dimension, **kind))  # type: ignore[call-overload]

    @classmethod
    def of(cls, features_BD: Tensor) -> "Moments":
        """Moments of one batch."""
        return cls.zeros(features_BD.shape[1], features_BD.device).update(features_BD)

    @property
    def dimension(self) -> int:
        """D."""
        return self.sum_D.shape[0]

    def update(self, features_BD: Tensor) -> "Moments":
        """Adds a batch in place, returns itself. ValueError for other shapes and non-finite features."""
        if features_BD.ndim != 2 or features_BD.shape[1] != self.dimension:
            raise ValueError(f"features of shape (B, {self.dimension}) expected, got {tuple(features_BD.shape)}")
        wide_BD = features_BD.detach().to(self.sum_D.device, torch.float64)
        bad = int((~torch.isfinite(wide_BD)).any(dim=1).sum())
        if bad:
            raise ValueError(
                f"{bad} of {len(wide_BD)} feature vectors hold NaN or infinity: look at the pictures, the "
                "generator has probably diverged (lower train.learning_rate or raise train.r1_gamma)"
            )
        self.count += len(wide_BD)
        self.sum_D += wide_BD.sum(dim=0)
        self.outer_DD.addmm_(wide_BD.T, wide_BD)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sets together, on this one's device."""
        if other.dimension != self.dimension:
            raise ValueError(f"moments of {self.dimension} and {other.dimension} features cannot be merged")
        device = self.sum_D.device
        return Moments(
            self.count + other.count,
            self.sum_D + other.sum_D.to(device),
            self.outer_DD + other.outer_DD.to(device),
        )

    def mean(self) -> Tensor:
        """(D,) float64."""
        if self.count < 1:
            raise ValueError("the mean of no features is not defined: evaluate at least one picture")
        return self.sum_D / self.count

    def covariance(self) -> Tensor:
        """(D, D) float64, symmetric, divided by N - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {self.count}")
        mean_D = self.mean()
        covariance_DD = (self.outer_DD - self.count * torch.outer(mean_D, mean_D)) / (self.count - 1)
        return (covariance_DD + covariance_DD.T) / 2

    def to_vector(self) -> Tensor:
        """(1 + D + D * D,) float64: one tensor for a sum over workers. float64 counts exactly to 2^53."""
        count = self.sum_D.new_tensor([float(self.count)])
        return torch.cat([count, self.sum_D, self.outer_DD.flatten()])

    @classmethod
    def from_vector(cls, vector: Tensor, dimension: int) -> "Moments":
        """The inverse of `to_vector`."""
        if vector.shape != (1 + dimension + dimension**2,):
            raise ValueError(f"{1 + dimension + dimension**2} values expected, got {tuple(vector.shape)}")
        sum_D, outer_D2 = vector[1 : 1 + dimension], vector[1 + dimension :]
        return cls(round(float(vector[0])), sum_D.clone(), outer_D2.reshape(dimension, dimension).clone())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a file."""
        return {
            "count": np.asarray(self.count, dtype=np.int64),
            "sum": self.sum_D.cpu().numpy(),
            "outer": self.outer_DD.cpu().numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """The inverse of `to_arrays`."""
        sum_D, outer_DD = torch.from_numpy(arrays["sum"]), torch.from_numpy(arrays["outer"])
        if sum_D.ndim != 1 or outer_DD.shape != (len(sum_D), len(sum_D)):
            raise ValueError(
                f"moments of shapes {tuple(sum_D.shape)} and {tuple(outer_DD.shape)} do not belong together"
            )
        return cls(int(arrays["count"]), sum_D.double(), outer_DD.double())


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Heusel et al. 2017, eq. 6; at least 0.

    The trace of (C_a C_b)^(1/2) is the sum of the singular values of C_a^(1/2) C_b^(1/2). Taking these,
    instead of roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), keeps full float64 precision where
    covariances have no full rank (fewer pictures than features).
    """
    if a.dimension != b.dimension:
        raise ValueError(f"features of {a.dimension} and {b.dimension} dimensions are of different networks")
    root_a_DR, root_b_DR = _root(a.covariance().cpu().numpy()), _root(b.covariance().cpu().numpy())
    cross = np.linalg.svd(root_a_DR.T @ root_b_DR, compute_uv=False).sum()
    difference_D = (a.mean().cpu() - b.mean().cpu()).numpy()
    spread = np.square(root_a_DR).sum() + np.square(root_b_DR).sum() - 2 * cross
    return max(0.0, float(difference_D @ difference_D + spread))


def _root(covariance_DD: np.ndarray) -> np.ndarray:
    """R of shape (D, rank) with R R^T = C: eigenvectors times roots of eigenvalues, rounding noise left out.

    With NumPy's LAPACK: torch's fails to converge where many features are constant, as of early pictures.
    """
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    largest = max(0.0, float(values_D[-1]))
    noise = len(values_D) * np.finfo(np.float64).eps * largest
    if float(values_D[0]) < -1e-6 * largest - 1e-30:
        raise ValueError(
            f"not a covariance: eigenvalue {values_D[0]:.3e} beside {largest:.3e}; the moments are corrupt"
        )
    keep = values_D > noise
    return vectors_DD[:, keep] * np.sqrt(values_D[keep])
