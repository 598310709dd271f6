"""Trained generators as MLflow models: logged with their distances, registered, promoted by a fair rule."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_PARAM_VAL_LENGTH

import pipeline
from pipeline.evaluation.protocol import ProtocolMismatch, Result
from pipeline.models.cips import Generator
from pipeline.tracking import served
from pipeline.tracking.client import TrackingError, connect, explained, require_reachable, without_password
from pipeline.tracking.runs import flatten

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
UPLOAD_TIMEOUT_S = 300
REQUIREMENTS = (
    f"mlflow=={mlflow.__version__}",
    "torch>=2.11",  # no build tag: on a GPU machine it is the CUDA build, elsewhere the index decides
    "numpy",
    "safetensors",
    "pydantic>=2",
    "pyarrow",
    "fsspec",
    "pillow",
)


@dataclass(frozen=True)
class LoggedGenerator:
    """A generator in the tracking store, not registered yet."""

    model_id: str
    model_uri: str
    run_id: str


@dataclass(frozen=True)
class Promotion:
    """What `promote` did."""

    model_name: str
    version: str
    alias: str
    """What the candidate is now: champion or challenger."""
    candidate: Result
    champion_version: str
    """The champion now."""
    previous_version: str | None
    """The champion before, where it was another one."""
    reigning: Result | None
    """The distance that the candidate was compared with."""

    def describe(self) -> str:
        """One line for a log."""
        mine = f"{self.model_name} version {self.version} ({self.candidate.metric} {self.candidate.value:.4g})"
        if self.reigning is None:
            return f"{mine} is the champion"
        if self.alias == CHAMPION:
            return f"{mine} is the champion; before: version {self.previous_version} ({self.reigning.value:.4g})"
        stays = f"version {self.champion_version} ({self.reigning.value:.4g}) stays champion"
        return f"{mine} is the challenger; {stays}"


def log_model(
    uri: str,
    run_id: str,
    weights: str | Path | bytes,
    model_config: Mapping[str, Any],
    results: Sequence[Result],
    step: int,
    *,
    data_name: str = "training data",
    name: str = "generator",
    environment: Mapping[str, str] | None = None,
    requirements: Sequence[str] = REQUIREMENTS,
) -> LoggedGenerator:
    """Logs a generator with its distances as a model of a run.

    Args:
        weights: safetensors, as a local file or as bytes.
        model_config: the `model` section as plain data.
        results: distances of these weights; each becomes a metric of the model, tied to the data set.
        step: images seen.
        name: of the model within the run.

    Raises:
        TrackingError: the server does not answer or refuses; nothing is left behind that looks complete.
    """
    require_reachable(uri)
    client = connect(uri, environment, request_timeout_s=UPLOAD_TIMEOUT_S)
    with explained(uri, f"logging the generator of run {run_id}"), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = client.get_run(run_id)
        made = client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=run_id,
            model_type="generator",
            params=_params({"images_seen": step, "model": model_config}),
            tags=result_tags(results),
        )
        try:
            inside = Model(
                artifact_path=made.artifact_location,
                run_id=run_id,
                model_uuid=made.model_id,
                model_id=made.model_id,
            )
            _save(folder, weights, model_config, inside, requirements)
            client.log_model_artifacts(made.model_id, str(folder / "model"))
        except BaseException:
            client.finalize_logged_model(made.model_id, "FAILED")
            raise
        client.finalize_logged_model(made.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(made.model_id, step)])
        for result in results:
            # With the model's id: without it the number would be taken for any model of the same step.
            client.log_metric(
                run_id,
                result.metric,
                result.value,
                step=step,
                model_id=made.model_id,
                dataset_name=data_name,
                dataset_digest=result.protocol.dataset[:MAX_DATASET_DIGEST_SIZE],
            )
    return LoggedGenerator(made.model_id, f"models:/{made.model_id}", run_id)


def register(uri: str, model: LoggedGenerator, model_name: str, tags: Mapping[str, str] | None = None) -> str:
    """Makes a logged generator, with its distances, a version of a registered model; returns the version."""
    client = connect(uri)
    with explained(uri, f"registering {model.model_uri} as {model_name!r}"):
        logged = client.get_logged_model(model.model_id)
        try:
            client.get_registered_model(model_name)
        except MlflowException as cause:
            if cause.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            client.create_registered_model(model_name, description="Generators trained by the CIPS pipeline.")
        own = {key: value for key, value in logged.tags.items() if not key.startswith("mlflow.")}
        own["images_seen"] = logged.params.get("images_seen", "")
        version = client.create_model_version(
            model_name,
            logged.artifact_location,
            run_id=model.run_id,
            model_id=model.model_id,
            tags={**own, **(tags or {})},
        )
    return str(version.version)


def find_version(uri: str, model_name: str, run_id: str, tags: Mapping[str, str]) -> str | None:
    """The version of a model that this run registered with these tags, if there is one."""
    client = connect(uri)
    with explained(uri, f"looking for versions of {model_name!r}"):
        for version in client.search_model_versions(f"name = '{model_name}' and run_id = '{run_id}'"):
            if all(version.tags.get(key) == value for key, value in tags.items()):
                return str(version.version)
    return None


def promote(uri: str, model_name: str, version: str) -> Promotion:
    """Makes a version the champion if there is none yet, or if its distance is smaller than the champion's.

    The distances must have been measured under the same protocol. The champion before becomes `previous`; a
    candidate that does not win becomes `challenger`. MLflow cannot compare and set an alias in one step:
    promote from one place at a time.

    Raises:
        ProtocolMismatch: the distances are not comparable; names the differing keys. Nothing is changed.
        TrackingError: there is no such version, or it carries no distance.
    """
    client = connect(uri)
    with explained(uri, f"promoting version {version} of {model_name!r}"):
        candidate = client.get_model_version(model_name, version)
        results = version_results(candidate)
        if not results:
            raise TrackingError(
                f"version {version} of {model_name!r} carries no distance, so it cannot be compared; "
                "train with train.evaluate_kimg set (a run that has ended: together with a larger train.total_kimg)"
            )
        champion = _holder(client, model_name, CHAMPION)
        if champion is None or champion.version == candidate.version:
            client.set_registered_model_alias(model_name, CHAMPION, version)
            mine, reigning, wins = results[0], None, True
        else:
            mine, reigning = comparable(results, version_results(champion))
            wins = mine.better_than(reigning)
            if wins:  # in this order a crash in between never leaves the model without a champion
                client.set_registered_model_alias(model_name, PREVIOUS, champion.version)
                client.set_registered_model_alias(model_name, CHAMPION, version)
            else:
                client.set_registered_model_alias(model_name, CHALLENGER, version)
        challenger = _holder(client, model_name, CHALLENGER)
        if wins and challenger is not None and challenger.version == candidate.version:
            client.delete_registered_model_alias(model_name, CHALLENGER)
    before = None if champion is None or champion.version == candidate.version else str(champion.version)
    return Promotion(
        model_name=model_name,
        version=str(candidate.version),
        alias=CHAMPION if wins else CHALLENGER,
        candidate=mine,
        champion_version=str(candidate.version) if wins else str(before),
        previous_version=before if wins else None,
        reigning=reigning,
    )


def newest_version(uri: str, model_name: str) -> str:
    """The highest version of a registered model. Raises TrackingError where there is none."""
    client = connect(uri)
    with explained(uri, f"looking for versions of {model_name!r}"):
        versions = client.search_model_versions(f"name = '{model_name}'", order_by=["version_number DESC"])
    if not versions:
        raise TrackingError(
            f"no version of {model_name!r} is registered at {without_password(uri)}; train with tracking "
            "first, or correct tracking.model_name"
        )
    return str(versions[0].version)


def comparable(candidate: Sequence[Result], champion: Sequence[Result]) -> tuple[Result, Result]:
    """The first pair measured under one protocol; ProtocolMismatch, about the closest, if there is none."""
    pairs = [(mine, theirs) for mine in candidate for theirs in champion]
    if not pairs:
        raise ProtocolMismatch("the champion carries no distance to compare with; give the alias by hand once")
    closest = min(pairs, key=lambda pair: len(pair[0].protocol.differing(pair[1].protocol)))
    closest[0].protocol.require_same(closest[1].protocol)
    return closest


def load(uri: str, model: str) -> PyFuncModel:
    """The served form of a model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or NAME for its champion."""
    _aim(uri)
    with explained(uri, f"loading {model_uri(model)}"):
        return mlflow.pyfunc.load_model(model_uri(model))


def load_generator(uri: str, model: str, device: torch.device | str = "cpu") -> Generator:
    """The generator of a registered model, in eval mode, for more than what the served form offers."""
    _aim(uri)
    with explained(uri, f"loading {model_uri(model)}"), tempfile.TemporaryDirectory() as folder:
        found = mlflow.artifacts.download_artifacts(f"{model_uri(model)}/artifacts", dst_path=folder)
        path = Path(found)
        return served.load_generator_files(path / served.WEIGHTS, path / served.CONFIG).to(device)


def model_uri(model: str) -> str:
    """A name becomes the URI of its champion; URIs stay."""
    return model if model.startswith(("models:/", "runs:/")) else f"models:/{model}@{CHAMPION}"


def result_tags(results: Sequence[Result]) -> dict[str, str]:
    """Distances as tags: `results` for `promote`, the rest for people and for searches."""
    tags = {"results": json.dumps([result.to_dict() for result in results])}
    for result in results:
        tags[f"{result.metric}.value"] = repr(result.value)
        tags[f"{result.metric}.protocol_digest"] = result.protocol.digest()
        tags[f"{result.metric}.protocol"] = result.protocol.describe()
    return tags


def version_results(version: ModelVersion) -> list[Result]:
    """The distances that a version carries."""
    return [Result.from_dict(values) for values in json.loads(version.tags.get("results", "[]"))]


def _save(
    folder: Path,
    weights: str | Path | bytes,
    model_config: Mapping[str, Any],
    inside: Model,
    requirements: Sequence[str],
) -> None:
    """Lays the model out under folder/model: weights, config, and the package's code without its presets."""
    weights_path, config_path = folder / served.WEIGHTS, folder / served.CONFIG
    if isinstance(weights, bytes):
        weights_path.write_bytes(weights)
    else:
        shutil.copyfile(weights, weights_path)
    config_path.write_text(json.dumps(dict(model_config), indent=1), encoding="utf-8")
    package = Path(next(iter(pipeline.__path__)))
    shutil.copytree(package, folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__", "presets", "*.pyc"))
    with warnings.catch_warnings(record=True):  # MLflow asks for type hints and an example; the signature says more
        mlflow.pyfunc.save_model(
            folder / "model",
            python_model=str(folder / "pipeline" / "tracking" / "served.py"),
            artifacts={"weights": str(weights_path), "config": str(config_path)},
            code_paths=[str(folder / "pipeline")],
            signature=served.SIGNATURE,
            pip_requirements=list(requirements),
            mlflow_model=inside,
        )
    for cache in (folder / "model").rglob("__pycache__"):
        shutil.rmtree(cache)


def _aim(uri: str) -> None:
    """Makes `uri` the process's tracking server: what loads by `models:/` address takes no other."""
    require_reachable(uri)
    connect(uri, request_timeout_s=UPLOAD_TIMEOUT_S)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)


def _params(tree: Mapping[str, Any]) -> dict[str, str]:
    return {key: value[:MAX_PARAM_VAL_LENGTH] for key, value in flatten(tree).items()}


def _holder(client: MlflowClient, model_name: str, alias: str) -> ModelVersion | None:
    aliases = client.get_registered_model(model_name).aliases
    return client.get_model_version(model_name, aliases[alias]) if alias in aliases else None
