"""From weights to a champion on SQLite: models carry their distances, only comparable ones decide."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from mlflow import MlflowClient

from pipeline.evaluation.protocol import EvaluateConfig, Protocol, ProtocolMismatch, Result, make_protocol
from pipeline.models.build import ModelConfig, build_generator
from pipeline.tracking.client import TrackingError, connect
from pipeline.tracking.registry import (
    LoggedGenerator,
    Promotion,
    load,
    load_generator,
    log_model,
    model_uri,
    newest_version,
    promote,
    register,
    version_results,
)
from pipeline.tracking.runs import open_run
from tests.mlflow_server import sqlite_uri

MODEL = ModelConfig(size=16, width=8, latent=8, mapping_layers=2)
PROTOCOL = make_protocol(EvaluateConfig(images=100, input_size=64), "a" * 64, "d" * 64, 1000)
INCEPTION = make_protocol(EvaluateConfig(network="inception", images=100), "b" * 64, "d" * 64, 1000)


def weights(seed: int = 0) -> bytes:
    torch.manual_seed(seed)
    return safetensors.torch.save(build_generator(MODEL).state_dict())


class Store:
    """A database with one run, and short ways to fill it."""

    def __init__(self, folder: Path) -> None:
        self.uri = sqlite_uri(folder)
        self.run_id = open_run(self.uri, "cips", "first", {})
        self.client: MlflowClient = connect(self.uri)

    def log(self, *results: Result, seed: int = 0, step: int = 1000) -> LoggedGenerator:
        config = MODEL.model_dump(mode="json")
        return log_model(self.uri, self.run_id, weights(seed), config, results, step)

    def add(self, value: float | None, protocol: Protocol = PROTOCOL, seed: int = 0) -> str:
        """A registered version with this distance."""
        results = [] if value is None else [Result(value, protocol)]
        return register(self.uri, self.log(*results, seed=seed), "cips")

    def promote(self, value: float, protocol: Protocol = PROTOCOL) -> Promotion:
        return promote(self.uri, "cips", self.add(value, protocol))

    @property
    def aliases(self) -> dict[str, str]:
        found = self.client.get_registered_model("cips").aliases
        return {alias: str(version) for alias, version in found.items()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_a_model_carries_its_distances(store: Store) -> None:
    results = [Result(5.5, PROTOCOL), Result(7.25, INCEPTION)]
    logged = store.log(*results, step=2000)
    model = store.client.get_logged_model(logged.model_id)
    assert logged.model_uri == f"models:/{logged.model_id}" and str(model.status) == "READY"
    assert model.source_run_id == store.run_id and model.model_type == "generator"
    assert model.params["images_seen"] == "2000" and model.params["model.width"] == "8"
    metrics = {metric.key: metric for metric in model.metrics}
    assert {key: metric.value for key, metric in metrics.items()} == {
        "fd_efficientnet_lite0": 5.5,
        "fid": 7.25,
    }
    assert metrics["fid"].step == 2000 and metrics["fid"].dataset_digest == "d" * 36
    assert model.tags["fid.protocol_digest"] == INCEPTION.digest()
    assert [Result.from_dict(values) for values in json.loads(model.tags["results"])] == results
    (output,) = store.client.get_run(store.run_id).outputs.model_outputs
    assert (output.model_id, output.step) == (logged.model_id, 2000)


def test_two_models_of_one_step_keep_their_own_distances(store: Store) -> None:
    first, second = store.log(Result(5.0, PROTOCOL)), store.log(Result(9.0, PROTOCOL))
    for logged, value in ((first, 5.0), (second, 9.0)):
        (metric,) = store.client.get_logged_model(logged.model_id).metrics
        assert metric.value == value
    experiment = store.client.get_run(store.run_id).info.experiment_id
    found = store.client.search_logged_models([experiment], "metrics.fd_efficientnet_lite0 < 6")
    assert [model.model_id for model in found] == [first.model_id]


def test_nothing_is_pickled_and_presets_stay_home(store: Store) -> None:
    location = store.client.get_logged_model(store.log().model_id).artifact_location
    files = {path.relative_to(location).as_posix() for path in Path(location).rglob("*") if path.is_file()}
    assert {"MLmodel", "served.py", "artifacts/generator.safetensors", "artifacts/model.json"} <= files
    assert "code/pipeline/models/cips.py" in files
    assert not [name for name in files if name.endswith((".pkl", ".pyc", ".pth")) or "presets" in name]
    requirements = Path(location, "requirements.txt").read_text().splitlines()
    assert "torch>=2.11" in requirements and not [line for line in requirements if "cu1" in line or "+" in line]


def test_logging_says_nothing(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("always", FutureWarning)
        load(store.uri, f"models:/cips/{store.add(1.0)}").predict(None, params={"n": 1})
    assert [str(one.message) for one in said if issubclass(one.category, UserWarning | FutureWarning)] == []
    assert capfd.readouterr() == ("", "")


def test_a_version_brings_its_distances_and_tags(store: Store) -> None:
    number = register(store.uri, store.log(Result(5.5, PROTOCOL)), "cips", {"preset": "demo"})
    version = store.client.get_model_version("cips", number)
    assert version_results(version) == [Result(5.5, PROTOCOL)]
    assert version.tags["preset"] == "demo" and version.tags["images_seen"] == "1000"
    assert version.tags["fd_efficientnet_lite0.protocol"] == PROTOCOL.describe()
    assert version.run_id == store.run_id


def test_the_first_is_champion_and_only_a_better_one_takes_over(store: Store) -> None:
    first = store.promote(10.0)
    assert (first.alias, first.champion_version, first.previous_version) == ("champion", "1", None)
    assert store.aliases == {"champion": "1"}

    worse = store.promote(11.0)
    assert (worse.alias, worse.champion_version, worse.reigning) == (
        "challenger",
        "1",
        Result(10.0, PROTOCOL),
    )
    assert store.aliases == {"champion": "1", "challenger": "2"}

    equal = store.promote(10.0)
    assert equal.alias == "challenger" and store.aliases == {"champion": "1", "challenger": "3"}

    better = store.promote(9.0)
    assert (better.alias, better.champion_version, better.previous_version) == ("champion", "4", "1")
    assert store.aliases == {"champion": "4", "challenger": "3", "previous": "1"}
    assert "version 4 (fd_efficientnet_lite0 9) is the champion; before: version 1 (10)" in better.describe()
    assert "version 2 (fd_efficientnet_lite0 11) is the challenger; version 1 (10) stays" in worse.describe()


def test_promoting_again_changes_nothing(store: Store) -> None:
    store.promote(10.0)
    store.promote(9.0)
    before = store.aliases
    again = promote(store.uri, "cips", "2")
    assert again.alias == "champion" and again.previous_version is None and store.aliases == before
    assert promote(store.uri, "cips", "1").alias == "challenger"


def test_a_challenger_that_wins_later_is_no_challenger_any_more(store: Store) -> None:
    store.promote(10.0)
    version = store.promote(11.0).version
    assert store.aliases["challenger"] == version
    better = json.dumps([Result(8.0, PROTOCOL).to_dict()])  # evaluated anew
    store.client.set_model_version_tag("cips", version, "results", better)
    assert promote(store.uri, "cips", version).alias == "champion"
    assert store.aliases == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset": "e" * 64}, "dataset: "),
        ({"images": 50, "seed": 3}, "images: 50 and 100; seed: 3 and 0"),
        ({"quick": False, "input_size": 224}, "input_size: 224 and 64; quick: False and True"),
    ],
)
def test_other_protocols_are_never_compared(store: Store, change: dict, named: str) -> None:
    store.promote(10.0)
    with pytest.raises(ProtocolMismatch, match=named):
        store.promote(1.0, dataclasses.replace(PROTOCOL, **change))
    assert store.aliases == {"champion": "1"}


def test_other_networks_are_never_compared(store: Store) -> None:
    store.promote(10.0)
    with pytest.raises(ProtocolMismatch, match="network: 'inception' and 'efficientnet-lite0'"):
        store.promote(1.0, INCEPTION)


def test_of_several_distances_the_common_one_decides(store: Store) -> None:
    store.promote(10.0, INCEPTION)
    both = [Result(99.0, PROTOCOL), Result(9.0, INCEPTION)]
    done = promote(store.uri, "cips", register(store.uri, store.log(*both), "cips"))
    assert done.alias == "champion" and done.candidate == Result(9.0, INCEPTION)


def test_the_newest_version_is_the_one_with_the_highest_number(store: Store) -> None:
    with pytest.raises(TrackingError, match="no version of 'cips' is registered"):
        newest_version(store.uri, "cips")
    logged = store.log()
    for number in range(1, 12):
        assert register(store.uri, logged, "cips") == str(number)
    assert newest_version(store.uri, "cips") == "11"


def test_what_cannot_be_promoted_is_named(store: Store) -> None:
    with pytest.raises(TrackingError, match="version 1 of 'cips' carries no distance"):
        promote(store.uri, "cips", store.add(None))
    with pytest.raises(TrackingError, match="version 7 of 'cips'"):
        promote(store.uri, "cips", "7")
    with pytest.raises(TrackingError, match="nobody"):
        promote(store.uri, "nobody", "1")
    store.client.set_registered_model_alias("cips", "champion", "1")
    with pytest.raises(ProtocolMismatch, match="champion carries no distance"):
        store.promote(1.0)


def test_a_failed_upload_leaves_no_model_that_looks_complete(store: Store) -> None:
    with pytest.raises(TrackingError, match="logging the generator of run"):
        log_model(store.uri, store.run_id, "/nowhere.safetensors", MODEL.model_dump(mode="json"), [], 1)
    experiment = store.client.get_run(store.run_id).info.experiment_id
    assert [str(model.status) for model in store.client.search_logged_models([experiment])] == ["FAILED"]


def test_names_mean_champions() -> None:
    assert model_uri("cips") == "models:/cips@champion"
    assert model_uri("models:/cips/3") == "models:/cips/3"


def test_the_generator_comes_back_bit_for_bit(store: Store) -> None:
    promote(store.uri, "cips", store.add(1.0, seed=5))
    generator = load_generator(store.uri, "cips")
    saved = safetensors.torch.load(weights(5))
    assert not generator.training and generator.state_dict().keys() == saved.keys()
    for name, value in generator.state_dict().items():
        assert torch.equal(value, saved[name]), name
    with pytest.raises(TrackingError, match="models:/cips@nobody"):
        load_generator(store.uri, "models:/cips@nobody")


def test_a_new_process_loads_and_draws_without_this_repository(store: Store, tmp_path: Path) -> None:
    promote(store.uri, "cips", store.add(1.0, seed=5))
    code = """
import sys
import mlflow, numpy
model = mlflow.pyfunc.load_model("models:/cips@champion")
numpy.save(sys.argv[1], model.predict(None, params={"seed": 3, "n": 2, "size": 20}))
import pipeline
print(next(iter(pipeline.__path__)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "images.npy")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "mlartifacts" in done.stdout  # the code came with the model
    here = load(store.uri, "cips").predict(None, params={"seed": 3, "n": 2, "size": 20})
    assert np.array_equal(np.load(tmp_path / "images.npy"), here)
