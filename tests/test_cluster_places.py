"""Addresses that mean something else on a cluster than here."""

from pathlib import Path

import pytest

from pipeline.cluster.places import elsewhere, is_loopback, is_mine, local_places, settled, travelling, warnings
from pipeline.config import Config, ConfigError, load_config

OTHERS = ["10.1.2.3", "10.1.2.4"]
REMOTE = ["data.uri=s3://b/data", "run.dir=s3://b/runs", "tracking.uri=http://mlflow:5000"]
JOBS = ["ingest", "train", "tune", "evaluate", "synthesize", "promote"]


def demo(*overrides: str) -> Config:
    return load_config("demo", overrides)


def test_a_machine_knows_its_own_addresses() -> None:
    assert is_mine("127.0.0.1")
    assert not is_mine("192.0.2.1")  # set aside for documentation: nobody's
    assert elsewhere(["127.0.0.1", "192.0.2.7", "192.0.2.1", "192.0.2.1"]) == ["192.0.2.1", "192.0.2.7"]


@pytest.mark.parametrize("job", JOBS)
def test_on_this_machine_a_relative_path_is_sent_as_the_path_it_is_here(job: str) -> None:
    overrides = settled(job, demo(), others=[])
    assert overrides
    assert all(Path(text.partition("=")[2]).is_absolute() for text in overrides)
    assert demo(*overrides).anchored() == demo().anchored()
    assert settled(job, demo(*overrides), others=[]) == []


def test_a_database_for_tracking_is_a_path_too() -> None:
    assert settled("promote", demo("tracking.uri=sqlite:///runs/my.db"), []) == [
        f"tracking.uri=sqlite:///{Path.cwd()}/runs/my.db"
    ]
    assert settled("promote", demo("tracking.uri=sqlite:////srv/my.db"), []) == []
    with pytest.raises(ConfigError, match=r"tracking.uri is sqlite:///runs/my.db.*http://HOST:PORT"):
        settled("promote", demo("tracking.uri=sqlite:///runs/my.db"), OTHERS)


def test_other_machines_do_not_find_a_path_of_this_one() -> None:
    with pytest.raises(ConfigError) as refused:
        settled("train", demo("run.dir=/srv/runs"), OTHERS)
    lines = str(refused.value).splitlines()
    assert [line.split(",")[0] for line in lines] == ["data.uri is runs/data/earth-32", "run.dir is /srv/runs"]
    assert all("10.1.2.3, 10.1.2.4" in line and "s3://BUCKET" in line and "--shared FOLDER" in line for line in lines)


def test_a_shared_folder_is_named_once_and_all_below_it_is_found() -> None:
    config = demo("run.dir=/mnt/cips/runs", "data.uri=/mnt/cips/data", "tracking.enabled=false")
    assert settled("train", config, OTHERS, ["/mnt/cips"]) == []
    with pytest.raises(ConfigError, match="data.uri is /mnt/cips/data"):
        settled("train", config, OTHERS, ["/mnt/cips/runs"])
    with pytest.raises(ConfigError):
        settled("train", config, OTHERS, ["/mnt/ci"])


@pytest.mark.parametrize("job", ["train", "tune", "evaluate", "promote"])
def test_addresses_that_all_reach_pass(job: str) -> None:
    assert settled(job, demo(*REMOTE), OTHERS) == []


def test_only_what_the_job_uses_is_looked_at() -> None:
    assert set(local_places("ingest", demo("ingest.source=pictures"))) == {"ingest.source", "data.uri"}
    assert set(local_places("ingest", demo())) == {"data.uri"}, "a picture of the package is on every machine"
    assert set(local_places("train", demo())) == {"data.uri", "run.dir"}
    assert set(local_places("synthesize", demo())) == {"run.dir", "synthesize.out"}
    registered = demo("synthesize.model=models:/cips-demo@champion", "tracking.uri=http://mlflow:5000")
    assert set(local_places("synthesize", registered)) == {"synthesize.out"}
    assert set(local_places("promote", demo())) == {"run.dir"}, "its database lies there"
    assert local_places("promote", demo("tracking.uri=http://mlflow:5000")) == {}
    weights = demo("evaluate.network=inception", "evaluate.input_size=", "evaluate.weights=inception.pt")
    assert set(local_places("evaluate", weights)) == {"data.uri", "run.dir", "evaluate.weights"}


@pytest.mark.parametrize(
    ("url", "answer"),
    [
        ("http://127.0.0.1:5000", True),
        ("http://localhost:9000", True),
        ("http://[::1]:9000", True),
        ("http://10.0.0.3:9000", False),
        ("https://mlflow.example.org", False),
        ("sqlite:////srv/mlflow.db", False),
        ("http://[::1", False),
    ],
)
def test_loopback_is_recognised(url: str, answer: bool) -> None:
    assert is_loopback(url) == answer


def test_services_on_loopback_are_warned_of_where_there_are_other_machines() -> None:
    config = demo(*REMOTE, "tracking.uri=http://127.0.0.1:5000", "storage.endpoint=http://localhost:9000")
    environment = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "AWS_REGION": "eu-west-1"}
    told = warnings(config, OTHERS, environment)
    assert [text.split(" is ")[0] for text in told] == ["tracking.uri", "storage.endpoint", "AWS_ENDPOINT_URL"]
    assert all("10.1.2.3, 10.1.2.4 can reach" in text for text in told)
    assert warnings(config, [], environment) == []
    assert warnings(demo(*REMOTE), OTHERS, {}) == []
    assert len(warnings(None, OTHERS, environment)) == 1


def test_a_config_file_must_travel_under_the_name_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["mine.yaml", "configs/other.yaml"]
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in (None, "demo", "mine.yaml", "./mine.yaml", "configs/other.yaml"):
        travelling("--config", source, files, tmp_path)
    for source in ("ignored.yaml", "/etc/mine.yaml", "../mine.yaml"):
        with pytest.raises(ConfigError, match="--config .* does not travel to the cluster"):
            travelling("--config", source, files, tmp_path)
    monkeypatch.chdir(tmp_path / "configs")
    with pytest.raises(ConfigError, match="write --space configs/other.yaml"):
        travelling("--space", "other.yaml", files, tmp_path)
    with pytest.raises(ConfigError, match="write --config mine.yaml"):
        travelling("--config", str(tmp_path / "mine.yaml"), files, tmp_path)
