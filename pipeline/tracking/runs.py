"""One MLflow run for one training: opened by the driver before anything expensive starts."""

import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import torch
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Param, Run, RunTag
from mlflow.utils.validation import (
    MAX_DATASET_DIGEST_SIZE,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)

from pipeline.tracking.client import (
    TrackingError,
    connect,
    database_folder,
    explained,
    require_reachable,
    without_password,
)

KEY_TAG = "run.key"
PACKAGES = ("torch", "numpy", "ray", "mlflow", "pyarrow", "nvidia-dali-cuda130")


class TrainingData(NamedTuple):
    """What the manifest says about the data set that a run learns from."""

    name: str
    uri: str
    digest: str


def open_run(
    uri: str,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    *,
    data: TrainingData | None = None,
    config_yaml: str | None = None,
    run_id: str | None = None,
    key: str | None = None,
    artifacts: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Makes a run, or goes on with `run_id`, and returns its id. To be called once, by the driver.

    Args:
        uri: tracking server or database.
        params: resolved settings, nested or with dotted keys. When a run goes on with other values than it
            began with, MLflow keeps the old ones; the new ones become tags `resumed.<key>`.
        key: a name of the caller's own, given to the run as it is made. Without `run_id`, the run of that name is
            gone on with where there is one: its maker may have died before it could note the id.
        config_yaml: kept as the artifact config.yaml.
        artifacts: where a new experiment keeps its files; by default a server decides, and a SQLite database
            has them in the folder mlartifacts beside it.
        environment: variables for the artifact store (`storage.mlflow_environment`).

    Raises:
        TrackingError: nothing answers, or it refuses; within a few seconds, naming the URI and the fix.
    """
    require_reachable(uri)
    client = connect(uri, environment)
    with explained(uri, f"opening run {run_name!r} of experiment {experiment!r}"):
        if run_id is None:
            group = _experiment(client, uri, experiment, artifacts)
            run_id = _named(client, group, key) or _make(client, group, run_name, key)
        run = _existing(client, uri, run_id)
        client.update_run(run_id, status="RUNNING")
        _describe(client, run, flatten(params), {**machine_tags(), **(tags or {})})
        if data is not None:
            _log_data(client, run_id, data)
        if config_yaml is not None:
            client.log_text(run_id, config_yaml, "config.yaml")
    return run_id


def end_run(uri: str, run_id: str, status: str = "FINISHED") -> bool:
    """Marks a run FINISHED, FAILED or KILLED. A server that is down is said, not raised: the work is done."""
    try:
        require_reachable(uri)
        with explained(uri, f"ending run {run_id}"):
            connect(uri).set_terminated(run_id, status)
    except TrackingError as cause:
        print(f"run {run_id} was not marked {status}: {cause}", flush=True)
        return False
    return True


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} to {"a.b": "1"}; None becomes empty text, lists become JSON."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple | Mapping):
            found[name] = json.dumps(value)
        else:
            found[name] = "" if value is None else str(value)
    return found


def machine_tags() -> dict[str, str]:
    """What the numbers of a run were computed with: versions and hardware of this machine."""
    tags = {"environment.python": platform.python_version(), "environment.platform": platform.platform()}
    for package in PACKAGES:
        try:
            tags[f"environment.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    tags["environment.cpu"] = torch.backends.cpu.get_cpu_capability()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if names:
        tags["environment.gpu"] = ", ".join(names)
    return tags


def _experiment(client: MlflowClient, uri: str, name: str, artifacts: str | None) -> Experiment:
    group = client.get_experiment_by_name(name)
    if group is None:
        if artifacts is None and uri.startswith("sqlite:///"):
            artifacts = str(database_folder(uri) / "mlartifacts")
        elif artifacts is None and not uri.startswith("http"):
            raise TrackingError(
                f"tracking.uri is the database {without_password(uri)}, which holds no files; put a server "
                "before it (mlflow server --backend-store-uri ...) and give its address"
            )
        return client.get_experiment(client.create_experiment(name, artifact_location=artifacts))
    if group.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} at {without_password(uri)} was deleted; restore it, or take another "
            "tracking.experiment"
        )
    return group


def _named(client: MlflowClient, group: Experiment, key: str | None) -> str | None:
    """The run that was made under this key."""
    if key is None:
        return None
    found = client.search_runs([group.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return found[0].info.run_id if found else None


def _make(client: MlflowClient, group: Experiment, run_name: str, key: str | None) -> str:
    tags = {} if key is None else {KEY_TAG: key}
    return str(client.create_run(group.experiment_id, run_name=run_name, tags=tags).info.run_id)


def _existing(client: MlflowClient, uri: str, run_id: str) -> Run:
    run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        raise TrackingError(
            f"run {run_id} at {without_password(uri)} was deleted; restore it (mlflow runs restore "
            f"--run-id {run_id}), or train under another run.name"
        )
    return run


def _describe(client: MlflowClient, run: Run, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
    known = run.data.params
    wanted = {key: _cut(value, MAX_PARAM_VAL_LENGTH) for key, value in params.items()}
    changed = {f"resumed.{key}": value for key, value in wanted.items() if known.get(key, value) != value}
    new_params = [Param(key, value) for key, value in wanted.items() if key not in known]
    all_tags = [RunTag(key, _cut(value, MAX_TAG_VAL_LENGTH)) for key, value in {**tags, **changed}.items()]
    for part in _parts(new_params):
        client.log_batch(run.info.run_id, params=part)
    for part in _parts(all_tags):
        client.log_batch(run.info.run_id, tags=part)


def _log_data(client: MlflowClient, run_id: str, data: TrainingData) -> None:
    """The data set as MLflow's input, whose digest is short, and the whole digest as a tag."""
    kind = "s3" if data.uri.startswith("s3://") else "local"
    entity = Dataset(
        name=data.name,
        digest=data.digest[:MAX_DATASET_DIGEST_SIZE],
        source_type=kind,
        source=json.dumps({"uri": data.uri}),
    )
    client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "train")])])
    client.set_tag(run_id, "dataset.digest", data.digest)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _parts(entries: list[Any]) -> Iterable[list[Any]]:
    size = MAX_PARAMS_TAGS_PER_BATCH
    return (entries[start : start + size] for start in range(0, len(entries), size))
