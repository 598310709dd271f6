"""One schema for every job: the components' own sections, composed, checked against each other, and loaded.

    load_config("demo", ["train.batch_size=16"])    a preset and overrides
    load_config("my-run.yaml")                      a file; `extends: ffhq256` at its top starts from a preset

Later layers win: the schema's defaults, the preset a file extends, the file, the search space, the overrides.
Secrets are refused everywhere: they come from the environment or from an instance role.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from pipeline import fields, layering, plain_yaml
from pipeline.config_cluster import ClusterConfig as ClusterConfig
from pipeline.config_sources import PRESETS as PRESETS
from pipeline.config_sources import absolute, read_source, read_yaml
from pipeline.config_sources import preset_names as preset_names
from pipeline.data.stream import DataConfig
from pipeline.evaluation.protocol import INCEPTION_URL, METRICS, EvaluateConfig
from pipeline.ingest.settings import IngestConfig
from pipeline.layering import ConfigError, Layer
from pipeline.models.build import ModelConfig
from pipeline.schema import Section
from pipeline.storage import StorageConfig, StorageError, is_remote, join
from pipeline.synthesis.generate import SynthesizeConfig
from pipeline.training.loop import Plan
from pipeline.training.settings import TrainConfig

PLACES = ("run.dir", "ingest.source", "data.uri", "evaluate.weights", "synthesize.model", "synthesize.out")
MAX_TRIALS = 1000


class RunConfig(Section):
    """What a run is called and where it is kept: everything of it lies under `run.dir`/`run.name`."""

    name: str = "cips"
    """The same name and folder resume a run, a new run needs a new name. Unless given, the config's name."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Every random draw of a run follows from this number."""
    dir: str = Field(default="runs", min_length=1)
    """Folder or s3:// address of all runs; several machines need one that they share."""

    @field_validator("name")
    @classmethod
    def _fit_for_a_path(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
            raise ValueError(f"run.name is {name!r}: expected letters, digits, and ._- inside, 128 at most")
        return name


class TrackingConfig(Section):
    """Where metrics, results and models are recorded (MLflow). A tracker that is down stops no training."""

    enabled: bool = True
    """False keeps the run directory's log.jsonl as the only record."""
    uri: str | None = None
    """MLflow server or database; empty is mlflow.db in a local `run.dir`. Never with a password in it."""
    experiment: str = Field(default="cips", min_length=1)
    """MLflow experiment, the group in which runs are compared."""
    model_name: str = Field(default="cips", min_length=1)
    """Registered model that trained generators become versions of."""
    system_metrics: bool = True
    """The machine of rank 0 too, at each tick: processor, memory, disk, network, NVIDIA GPUs. Costs next to nothing."""
    flush_timeout_s: PositiveFloat = 60.0
    """How long training waits for the tracking server: never until its end, and there at most this. What is not sent
    by then is in log.jsonl, and sent when the run is started again."""


class TuneConfig(Section):
    """A grid search; each trial is a training run with some settings replaced."""

    space: dict[str, list[Any]] = {}
    """Dotted keys to the values to try; every combination is a trial."""
    metric: str | None = None
    """What trials are compared by, always at equal images seen; empty is the distance of `evaluate.network`."""
    mode: Literal["min", "max"] = "min"
    """Whether small or large values of the metric are better."""
    max_concurrent: PositiveInt = 1
    """Trials at once; at most what the cluster has workers for, or trials wait for each other."""

    @field_validator("space")
    @classmethod
    def _values_to_try(cls, space: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in space.items():
            if not values:
                raise ValueError(f"tune.space.{key} is empty; expected a list of values to try")
            if key.split(".")[0] in ("run", "tracking", "tune", "storage"):
                raise ValueError(f"tune.space.{key}: a trial replaces settings of training, not of {key.split('.')[0]}")
        return space


class Config(Section):
    """Everything a job can be told. Sections belong to the components that they configure."""

    run: RunConfig = RunConfig()
    storage: StorageConfig = StorageConfig()
    ingest: IngestConfig = IngestConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    tune: TuneConfig = TuneConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()

    @model_validator(mode="before")
    @classmethod
    def _stored_as_drawn(cls, values: Any) -> Any:
        """`ingest.size` follows `model.size` unless given: what is stored is what is trained."""
        if not isinstance(values, Mapping) or "model" not in values:
            return values
        model, ingest = values["model"], values.get("ingest", {})
        size = model.get("size") if isinstance(model, Mapping) else getattr(model, "size", None)
        if not isinstance(size, int):
            return values
        if isinstance(ingest, Mapping) and "size" not in ingest:
            return {**values, "ingest": {**ingest, "size": size}}
        if isinstance(ingest, IngestConfig) and "size" not in ingest.model_fields_set:
            return {**values, "ingest": ingest.model_copy(update={"size": size})}
        return values

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        problems = [*self._batch_problems(), *self._patch_problems(), *self._other_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def workers(self) -> int:
        """Workers that training has: `cluster.workers` with Ray, else one."""
        return self.cluster.workers if self.cluster.backend == "ray" else 1

    @property
    def run_uri(self) -> str:
        """The run's own directory, absolute when local: Ray's workers have another working directory."""
        return join(absolute(self.run.dir), self.run.name)

    @property
    def tracking_uri(self) -> str:
        """The tracking server or database in use."""
        uri = self.tracking.uri or f"sqlite:///{Path(absolute(self.run.dir)) / 'mlflow.db'}"
        if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
            uri = f"sqlite:///{absolute(uri.removeprefix('sqlite:///'))}"
        return uri

    @property
    def tune_metric(self) -> str:
        """What trials are compared by."""
        return self.tune.metric or METRICS[self.evaluate.network]

    @property
    def statistics_uri(self) -> str:
        """Where moments of real pictures are kept, for all runs of `run.dir`; no run can have this name."""
        return join(absolute(self.run.dir), ".statistics")

    def plan(self) -> Plan:
        """What the training loop needs.

        Raises:
            ConfigError: something is missing without which training cannot start or would stop on its way.
        """
        if not self.data.uri:
            raise ConfigError("data.uri is empty: expected the folder that jobs.ingest wrote, local or s3://")
        needs_weights = self.evaluate.network == "inception" and self.evaluate.weights is None
        if self.train.evaluate_kimg is not None and needs_weights:
            raise ConfigError(
                "evaluate.weights is empty: train.evaluate_kimg asks for evaluate.network=inception, which needs its "
                f"file; get {INCEPTION_URL} and set evaluate.weights to its path (or to that address), or "
                "evaluate.network=efficientnet-lite0, or train.evaluate_kimg= to train without"
            )
        return Plan(
            folder=self.run_uri,
            seed=self.run.seed,
            train=self.train,
            model=self.model,
            data=self.data.model_copy(update={"uri": absolute(self.data.uri)}),
            storage=self.storage,
            resolved=self.model_dump(mode="json"),
        )

    def anchored(self) -> "Config":
        """The same with local addresses made absolute: other processes have other working directories."""
        places = {key: absolute(value) for key, value in flatten(self).items() if key in PLACES and value}
        if self.tracking.enabled:
            places["tracking.uri"] = self.tracking_uri
        return replaced(self, places)

    def _batch_problems(self) -> list[str]:
        batch, group = self.train.batch_size, self.model.discriminator.group
        if batch % group:
            return [
                f"train.batch_size is {batch}: expected a multiple of model.discriminator.group ({group}), "
                f"for example {-(-batch // group) * group}"
            ]
        groups, shares = batch // group, self.workers * self.train.accumulation
        if groups < shares:
            return [
                f"train.batch_size is {batch}, which makes {groups} groups of {group} images: too few for "
                f"cluster.workers ({self.workers}) times train.accumulation ({self.train.accumulation}); "
                f"expected a batch of at least {shares * group}, or fewer workers or parts"
            ]
        return []

    def _patch_problems(self) -> list[str]:
        size, patch = self.model.size, self.train.patch.size
        if patch is None:
            spread = [stride for stride in self.train.patch.strides if stride != 1]
            return (
                [f"train.patch.strides holds {spread[0]} but train.patch.size is empty: give the size"]
                if spread
                else []
            )
        return [
            f"train.patch: {patch} pixels at stride {stride} span {(patch - 1) * stride + 1}: "
            f"expected at most model.size ({size})"
            for stride in self.train.patch.strides
            if (patch - 1) * stride >= size
        ]

    def _other_problems(self) -> list[str]:
        problems = []
        stored, size = self.ingest.size, self.model.size
        if stored < size or (stored > size and not self.data.crop):
            cut = "; or data.crop=true, to train on random squares" if stored > size else ""
            problems.append(f"ingest.size is {stored}: expected model.size ({size}), which it follows if left out{cut}")
        reported = METRICS[self.evaluate.network]
        if self.tune_metric != reported:
            problems.append(
                f"tune.metric is {self.tune_metric}, which no trial reports: expected {reported}, the distance of "
                f"evaluate.network={self.evaluate.network}, or nothing"
            )
        try:
            remote = is_remote(self.run.dir)
            is_remote(self.data.uri)
        except StorageError as error:
            return [*problems, str(error)]
        if self.tracking.enabled and self.tracking.uri is None and remote:
            problems.append(
                f"tracking.uri is empty and run.dir is {self.run.dir}, where no database can live: expected "
                "tracking.uri=http://HOST:5000, or tracking.enabled=false"
            )
        return problems


# ---- loading -------------------------------------------------------------------------------------


def load_config(source: str | None = None, overrides: Sequence[str] = (), *, space: str | None = None) -> Config:
    """The resolved configuration.

    Args:
        source: name of a preset, or path of a YAML file; None is the schema's defaults.
        overrides: `a.b.c=value`, the value a YAML scalar or list.
        space: name of a search space or path of a file; it holds the keys of the `tune` section.

    Raises:
        ConfigError: with every problem found, one on a line.
    """
    layers: list[Layer] = []
    if source is not None:
        layers += read_source(source)
        if not any(isinstance(layer.tree.get("run"), Mapping) and "name" in layer.tree["run"] for layer in layers):
            layers.insert(0, Layer(f"named after {source}", {"run": {"name": Path(source).stem}}))
    if space is not None:
        origin, tree = read_yaml(space, "spaces")
        layers.append(Layer(origin, {"tune": tree}))
    config = layering.build(Config, layers, overrides)
    trials(config)
    return config


def replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with the values at some dotted keys replaced, validated anew: a trial of a search."""
    origin = f"replacing {', '.join(f'{key}={value}' for key, value in values.items())}"
    tree: dict[str, Any] = {}
    for key, value in values.items():
        tree = layering.put(Config, tree, key, value)
    return layering.build(Config, [Layer("", config.model_dump(mode="json")), Layer(origin, tree)])


def trials(config: Config) -> list[dict[str, Any]]:
    """The grid of `tune.space`: a trial's dotted keys and values; each is checked to give a valid config."""
    space = config.tune.space
    count = 1
    for values in space.values():
        count *= len(values)
    if count > MAX_TRIALS:
        raise ConfigError(f"tune.space has {count} combinations: expected at most {MAX_TRIALS}; shorten its lists")
    grid = [dict(zip(space, point, strict=True)) for point in itertools.product(*space.values())] if space else []
    for point in grid:
        replaced(config, point)
    return grid


# ---- showing -------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """The whole configuration as a file that `load_config` reads back to an equal one."""
    return plain_yaml.dump(config.model_dump(mode="json"))


def flatten(config: Config) -> dict[str, Any]:
    """Dotted keys to scalars (lists as text), for tables and trackers."""
    return fields.flatten(config)


def differing_keys(a: Config, b: Config) -> list[str]:
    """Dotted keys whose values differ, in the schema's order."""
    mine, theirs = flatten(a), flatten(b)
    return [key for key in mine if mine[key] != theirs[key]]


def describe_fields() -> list[fields.Field]:
    """(dotted key, type, default, help) of every setting, in the schema's order."""
    return fields.describe(Config)
