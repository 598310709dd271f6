"""A distance never travels without its protocol: all that it depends on, with a digest to compare by."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from pipeline.schema import Section

Network = Literal["inception", "efficientnet-lite0"]
METRICS: dict[str, str] = {"inception": "fid", "efficientnet-lite0": "fd_efficientnet_lite0"}
NATIVE_SIZE: dict[str, int] = {"inception": 299, "efficientnet-lite0": 224}
RESIZE: dict[str, str] = {
    "inception": "bilinear, inside the network",
    "efficientnet-lite0": "bilinear, antialiased",
}
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
WHOLE = "whole"


class EvaluateConfig(Section):
    """How the distance between generated and real pictures is measured."""

    network: Network = "efficientnet-lite0"
    """Feature network: `inception` gives `fid`, `efficientnet-lite0` gives `fd_efficientnet_lite0`."""
    weights: str | None = None
    """Inception's TorchScript file: a path, s3:// or https:// address. EfficientNet brings its weights."""
    weights_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Expected hash of `weights`; empty expects the file that NVIDIA publishes."""
    input_size: PositiveInt | None = Field(default=None, ge=32)
    """Pixels along the network's input; empty is its native size. Smaller is faster and another metric."""
    images: int = Field(default=50_000, ge=2)
    """Generated pictures."""
    real_images: int | None = Field(default=None, ge=2)
    """Real pictures, evenly spread over the data set; empty takes all."""
    batch_size: PositiveInt = 32
    """Pictures computed at once; changes speed and memory, not the number."""
    truncation: float = Field(default=1.0, ge=0.0, le=2.0)
    """Psi of the generated pictures; papers report 1."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Matrix products of the generator; features are always fp32."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the generated pictures' latents and noise."""

    @model_validator(mode="after")
    def _fits_the_network(self) -> "EvaluateConfig":
        if self.network == "inception" and self.input_size is not None:
            raise ValueError(
                f"evaluate.input_size is {self.input_size}, but the Inception file resizes to 299 by itself; "
                "leave it empty, or take evaluate.network=efficientnet-lite0"
            )
        if self.network != "inception" and (self.weights or self.weights_sha256):
            raise ValueError(f"evaluate.weights belongs to evaluate.network=inception; {self.network} brings its own")
        return self


class ProtocolError(ValueError):
    """A distance cannot be measured as asked."""


class ProtocolMismatch(ProtocolError):
    """Two distances were to be compared that were measured in different ways."""


@dataclass(frozen=True)
class Protocol:
    """Everything a distance depends on besides the generator. Covariances are divided by N - 1."""

    network: str
    weights_sha256: str
    resize: str
    input_size: int
    images: int
    real_images: int
    dataset: str
    """Digest of the real data's manifest."""
    truncation: float
    precision: str
    seed: int
    quick: bool
    """The input is below the network's native size: good for ranking, not for tables."""
    views: str = WHOLE
    """What of a real picture is looked at: all of it, or a square of it, turned or not."""

    @property
    def metric(self) -> str:
        """The metric's name; different networks never share one."""
        return METRICS[self.network]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in a fixed order. `views` is left out of whole pictures: older digests stay what they are."""
        values = asdict(self)
        return values if self.views != WHOLE else {name: values[name] for name in values if name != "views"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Protocol":
        """The inverse of `to_dict`, also for values that became text on the way (tags of a tracker)."""
        parse: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "str": str, "bool": _truth}
        kinds = {field.name: getattr(field.type, "__name__", str(field.type)) for field in fields(cls)}
        given = {"views": WHOLE} | dict(values)
        missing = sorted(set(kinds) - set(given))
        if missing:
            raise ProtocolMismatch(f"the protocol lacks {', '.join(missing)}: it cannot be compared")
        return cls(**{name: parse[kind](given[name]) for name, kind in kinds.items()})

    def digest(self) -> str:
        """Hex sha256 of all fields."""
        return _digest(self.to_dict())

    def describe(self) -> str:
        """One line for a log."""
        quick = ", quick" if self.quick else ""
        psi = "" if self.truncation == 1.0 else f", psi {self.truncation:g}"
        made = f"{self.images:,} generated{psi} ({self.precision}, seed {self.seed})"
        views = "" if self.views == WHOLE else f" ({self.views})"
        real = f"{self.real_images:,} real of data {self.dataset[:12]}{views}"
        network = f"{self.network} {self.weights_sha256[:8]} at {self.input_size} ({self.resize}){quick}"
        return f"{self.metric}: {made} against {real}; {network}; protocol {self.digest()[:12]}"

    def differing(self, other: "Protocol") -> list[str]:
        """Names of the fields in which two protocols differ."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if mine[name] != theirs[name]]

    def require_same(self, other: "Protocol") -> None:
        """Raises `ProtocolMismatch`, which names the differing keys, unless the numbers may be compared."""
        keys = self.differing(other)
        if keys:
            mine, theirs = asdict(self), asdict(other)
            detail = "; ".join(f"{key}: {mine[key]!r} and {theirs[key]!r}" for key in keys)
            raise ProtocolMismatch(
                f"distances under different protocols cannot be compared ({detail}); "
                "evaluate both under one `evaluate` section and one data set"
            )

    def real_key(self) -> str:
        """Digest of what the real pictures' statistics depend on; names their cache file."""
        names = ("network", "weights_sha256", "resize", "input_size", "real_images", "dataset", "views")
        values = self.to_dict()
        return _digest({name: values[name] for name in names if name in values})


@dataclass(frozen=True)
class Result:
    """A distance and how it was measured. Lower is better."""

    value: float
    protocol: Protocol

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.protocol.metric

    def better_than(self, other: "Result") -> bool:
        """Whether this distance is smaller; raises `ProtocolMismatch` where the two cannot be compared."""
        self.protocol.require_same(other.protocol)
        return self.value < other.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as checkpoints and logs carry them: metric, value, protocol."""
        return {"metric": self.metric, "value": self.value, "protocol": self.protocol.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Result":
        """The inverse of `to_dict`."""
        return cls(float(values["value"]), Protocol.from_dict(values["protocol"]))


def make_protocol(
    config: EvaluateConfig, weights_sha256: str, dataset: str, samples: int, views: str = WHOLE
) -> Protocol:
    """Resolves a config against a data set of `samples` pictures with manifest digest `dataset`, seen in `views`.

    Raises ProtocolError where more real pictures are asked for than there are.
    """
    real_images = samples if config.real_images is None else config.real_images
    if real_images > samples:
        raise ProtocolError(
            f"evaluate.real_images is {real_images:,}, but the data set has {samples:,} pictures; "
            "lower it, or leave it empty for all"
        )
    if real_images < 2:
        raise ProtocolError(f"a distance needs at least 2 real pictures; the data set has {samples}")
    native = NATIVE_SIZE[config.network]
    input_size = config.input_size or native
    return Protocol(
        network=config.network,
        weights_sha256=weights_sha256,
        resize=RESIZE[config.network],
        input_size=input_size,
        images=config.images,
        real_images=real_images,
        dataset=dataset,
        truncation=float(config.truncation),
        precision=config.precision,
        seed=config.seed,
        quick=input_size < native,
        views=views,
    )


def real_indices(samples: int, real_images: int) -> np.ndarray:
    """Ascending int64 indices of `real_images` of `samples` pictures, evenly spread: no class is left out."""
    return np.arange(real_images, dtype=np.int64) * samples // real_images


def _truth(value: Any) -> bool:
    return str(value).lower() == "true"


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
