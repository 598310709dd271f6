"""The composed schema: what fits, what is refused, and the ways in and out."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import plain_yaml
from pipeline.config import (
    PRESETS,
    Config,
    ConfigError,
    absolute,
    describe_fields,
    differing_keys,
    flatten,
    load_config,
    preset_names,
    replaced,
    to_yaml,
    trials,
)
from pipeline.ingest.settings import IngestConfig
from pipeline.layering import SECRET_KEY
from pipeline.models.build import ModelConfig

SECTIONS = "run storage ingest data model train evaluate tracking cluster tune synthesize".split()
NAMED_KEYS = """
    run.name run.seed run.dir data.uri data.decoder data.on_corrupt data.cache_bytes ingest.format ingest.filter
    train.total_kimg
    train.batch_size train.accumulation train.precision train.patch.size train.patch.strides
    train.r1_gamma train.ema_kimg train.evaluate_kimg train.lazy_rescale model.generator model.size
    model.width model.widths model.noise model.max_pixels_in_flight cluster.backend cluster.workers
    cluster.address cluster.use_gpu tracking.uri tracking.experiment tracking.model_name
""".split()


def refused(*overrides: str, source: str | None = None, space: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides, space=space)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- the schema ------------------------------------------------------------------------------------


def test_the_sections_and_keys_that_others_rely_on_exist() -> None:
    assert list(Config.model_fields) == SECTIONS
    assert set(NAMED_KEYS) <= set(flatten(Config()))


def test_every_setting_is_documented_and_none_looks_like_a_secret() -> None:
    for field in describe_fields():
        assert len(field.help) > 10, f"{field.key} has no help"
        assert not SECRET_KEY.search(field.key), f"{field.key} could never be set"


def test_the_defaults_are_the_papers() -> None:
    config = load_config()
    assert (config.train.batch_size, config.train.learning_rate, config.train.betas) == (
        32,
        0.002,
        (0.0, 0.99),
    )
    assert (config.train.r1_gamma, config.train.r1_interval, config.train.ema_kimg) == (10.0, 16, 10.0)
    assert (config.train.total_kimg, config.model.size, config.model.width) == (25_000, 256, 512)


def test_configs_and_local_training_need_no_extra_package() -> None:
    absent = [
        "ray",
        "mlflow",
        "nvidia",
        "efficientnet_lite_pytorch",
        "scipy",
        "pandas",
        "boto3",
        "torchvision",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import jobs.cli, pipeline.training.local"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- what fits together ----------------------------------------------------------------------------


def test_the_batch_is_whole_groups() -> None:
    assert refused("train.batch_size=30") == (
        "train.batch_size is 30: expected a multiple of model.discriminator.group (4), for example 32"
    )
    assert load_config(None, ["train.batch_size=30", "model.discriminator.group=3"]).train.batch_size == 30


def test_each_worker_has_a_group_for_each_part() -> None:
    assert load_config(None, ["cluster.workers=8"]).workers == 8
    assert "expected a batch of at least 36" in refused("cluster.workers=9")
    assert "expected a batch of at least 64" in refused("cluster.workers=8", "train.accumulation=2")
    # Without Ray there is one worker, whatever a preset says about a cluster.
    assert load_config(None, ["cluster.workers=9", "cluster.backend=local"]).workers == 1


@given(
    size=st.sampled_from([8, 16, 32, 64, 128]),
    patch=st.sampled_from([8, 16, 32, 64]),
    stride=st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_a_patch_fits_exactly_when_its_last_pixel_does(size: int, patch: int, stride: int) -> None:
    text = [f"model.size={size}", f"train.patch.size={patch}", f"train.patch.strides=[{stride}]"]
    last = list(range(0, patch * stride, stride))[-1]
    if last < size:
        assert load_config(None, text).train.patch.size == patch
    else:
        assert f"span {last + 1}: expected at most model.size ({size})" in refused(*text)


def test_strides_without_a_patch_are_refused() -> None:
    assert "train.patch.size is empty" in refused("train.patch.strides=[1, 2]")


def test_the_stored_size_follows_the_trained_one() -> None:
    assert load_config(None, ["model.size=64"]).ingest.size == 64
    assert load_config(None, ["model.size=64", "ingest.filter=box"]).ingest.size == 64
    assert Config(model=ModelConfig(size=64)).ingest.size == 64
    assert Config(model=ModelConfig(size=64), ingest=IngestConfig(source="x")).ingest == IngestConfig(
        source="x", size=64
    )
    assert "ingest.size is 128: expected model.size (64)" in refused("model.size=64", "ingest.size=128")
    assert "ingest.size is 128: expected model.size (256)" in refused("ingest.size=128")


def test_stored_pictures_may_be_larger_than_trained_ones_where_training_crops_them() -> None:
    larger = ["model.size=64", "ingest.size=80"]
    assert "expected model.size (64), which it follows if left out; or data.crop=true" in refused(*larger)
    config = load_config(None, [*larger, "data.crop=true"])
    assert (config.ingest.size, config.model.size) == (80, 64)
    assert load_config(None, ["model.size=64", "data.crop=true"]).ingest.size == 64
    smaller = refused("model.size=64", "ingest.size=48", "data.crop=true")
    assert "ingest.size is 48: expected model.size (64)" in smaller and "data.crop" not in smaller


def test_a_remote_run_needs_a_tracking_server() -> None:
    assert "tracking.uri is empty and run.dir is s3://b/r" in refused("run.dir=s3://b/r")
    assert load_config(None, ["run.dir=s3://b/r", "tracking.enabled=false"]).run.dir == "s3://b/r"
    config = load_config(None, ["run.dir=s3://b/r", "tracking.uri=http://host:5000"])
    assert config.tracking_uri == "http://host:5000"
    assert config.run_uri == "s3://b/r/cips"


def test_a_plan_is_what_the_loop_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", ["run.seed=7"])
    plan = config.plan()
    assert (plan.folder, plan.seed) == (f"{tmp_path}/runs/demo", 7)
    assert plan.data.uri == f"{tmp_path}/runs/data/earth-32"
    assert (plan.train, plan.model, plan.storage) == (config.train, config.model, config.storage)
    assert Config.model_validate(plan.resolved) == config
    assert config.statistics_uri == f"{tmp_path}/runs/.statistics"


def test_a_plan_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="data.uri is empty"):
        load_config().plan()
    ffhq = load_config("ffhq256", ["data.uri=s3://b/x"])
    with pytest.raises(ConfigError, match="evaluate.weights is empty"):
        ffhq.plan()
    assert replaced(ffhq, {"evaluate.weights": "x.pt"}).plan().data.uri == "s3://b/x"
    assert replaced(ffhq, {"train.evaluate_kimg": None}).plan().data.uri == "s3://b/x"


def test_a_local_run_is_tracked_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config()
    assert config.tracking_uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert config.run_uri == f"{tmp_path}/runs/cips"


@pytest.mark.parametrize("key", ["run.dir", "data.uri"])
def test_an_unknown_kind_of_storage_is_named(key: str) -> None:
    assert "gs" in refused(f"{key}=gs://bucket/x")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_have_32_bits(seed: int) -> None:
    assert f"run.seed is {seed}" in refused(f"run.seed={seed}")
    assert load_config(None, [f"run.seed={2**32 - 1}"]).run.seed == 2**32 - 1


@pytest.mark.parametrize("name", ["a/b", "", "../x", ".hidden", "a b", "x" * 129])
def test_a_run_name_is_fit_for_a_path(name: str) -> None:
    assert "run.name is" in refused(f"run.name={name}")


# ---- sources ---------------------------------------------------------------------------------------


def test_a_file_extends_a_preset_and_overrides_come_last(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "extends: demo\ntrain:\n  batch_size: 64\n  r1_gamma: 2\n")
    config = load_config(path, ["train.r1_gamma=3"])
    assert differing_keys(config, load_config("demo")) == ["run.name", "train.batch_size", "train.r1_gamma"]
    assert (config.train.batch_size, config.train.r1_gamma) == (64, 3.0)


def test_a_run_is_named_after_its_config_unless_it_says_otherwise(tmp_path: Path) -> None:
    assert load_config("demo").run.name == "demo"
    assert load_config(write(tmp_path / "mine.yaml", "extends: demo")).run.name == "mine"
    assert load_config(write(tmp_path / "config.yaml", "run:\n  name: kept")).run.name == "kept"
    assert load_config("demo", ["run.name=other"]).run.name == "other"


def test_an_unknown_preset_lists_those_there_are() -> None:
    text = refused(source="dmo")
    assert "no config 'dmo'" in text
    assert all(name in text for name in preset_names())
    assert "patches" in refused(source="demo", space="nothing")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert missing in refused(source=missing)
    for name, text in (
        ("broken", "a: [1"),
        ("twice", "run: {}\nrun: {}"),
        ("list", "- 1"),
        ("scalar", "hello"),
    ):
        path = write(tmp_path / f"{name}.yaml", text)
        assert path in refused(source=path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml" in refused(source=str(tmp_path / "binary.yaml"))
    assert "copy it here first" in refused(source="s3://bucket/config.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "cips.yaml", "# nothing yet\n")
    assert load_config(path) == Config()


def test_extending_what_is_no_preset_is_refused(tmp_path: Path) -> None:
    for base in ("nothing", "[demo]", "3"):
        path = write(tmp_path / "x.yaml", f"extends: {base}")
        assert "extends is" in refused(source=path)


def test_unknown_keys_of_a_file_are_told_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "train:\n  batchsize: 3\n")
    assert refused(source=path) == f"unknown key train.batchsize: did you mean train.batch_size? (in {path})"


def test_secrets_are_refused_wherever_they_are_written(tmp_path: Path) -> None:
    path = write(tmp_path / "x.yaml", "storage:\n  secret_access_key: hunter2\n")
    for text in (
        refused(source=path),
        refused("storage.access_key=hunter2"),
        refused("tracking.uri=http://me:hunter2@h"),
    ):
        assert "come from the environment (AWS_ACCESS_KEY_ID" in text
        assert "hunter2" not in text


# ---- searches --------------------------------------------------------------------------------------


def test_a_search_is_the_grid_of_its_space() -> None:
    config = load_config(
        None, ["tune.space.train.r1_gamma=[1, 2]", "tune.space.train.patch.size=[32, null]", "tune.mode=max"]
    )
    grid = trials(config)
    assert [tuple(point.values()) for point in grid] == [(1, 32), (1, None), (2, 32), (2, None)]
    trial = replaced(config, grid[2])
    assert differing_keys(trial, config) == ["train.r1_gamma", "train.patch.size"]
    assert trials(load_config()) == []


def test_bad_trials_are_refused_before_any_starts() -> None:
    assert "did you mean train.r1_gamma?" in refused("tune.space.train.r1_gama=[1]")
    assert "train.r1_gamma is -1" in refused("tune.space.train.r1_gamma=[1, -1]")
    assert "at most model.size (256)" in refused("tune.space.train.patch.size=[256, 512]")
    assert "tune.space.train.r1_gamma is empty" in refused("tune.space.train.r1_gamma=[]")
    assert "not of run" in refused("tune.space.run.name=[a, b]")
    many = list(range(1, 40))
    assert "1521 combinations" in refused(
        f"tune.space.train.tick_kimg={many}", f"tune.space.train.checkpoint_kimg={many}"
    )


def test_a_space_file_is_the_tune_section(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", "max_concurrent: 2\nspace:\n  train.r1_gamma: [0.1, 1e-2]\n")
    tune = load_config("demo", space=path).tune
    assert (tune.max_concurrent, tune.space) == (2, {"train.r1_gamma": [0.1, 0.01]})
    bad = write(tmp_path / "b.yaml", "spice: {}\n")
    assert "unknown key tune.spice: did you mean tune.space?" in refused(source="demo", space=bad)


# ---- ways out --------------------------------------------------------------------------------------

OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "run.name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "run.seed": st.integers(0, 2**32 - 1),
        "train.learning_rate": st.floats(1e-9, 1.0),
        "train.lazy_rescale": st.booleans(),
        "train.patch": st.sampled_from([{"size": 16, "strides": [1, 4]}, {"size": None}]),
        "model.noise": st.sampled_from(["random", "fixed", "off"]),
        "ingest.tile": st.sampled_from([None, {"size": 512, "stride": 7}]),
        "ingest.source": st.none() | st.text(st.characters(codec="utf-8"), min_size=1, max_size=10),
        "tune.space": st.just({"train.r1_gamma": [1, 0.5]}),
    },
)


@given(OVERRIDES)
@settings(deadline=None, max_examples=60)
def test_yaml_brings_back_an_equal_config(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    config = replaced(Config(), values)
    path = tmp_path_factory.mktemp("config") / "other-name.yaml"
    assert load_config(write(path, to_yaml(config))) == config


def test_yaml_keeps_the_order_of_the_schema() -> None:
    assert list(plain_yaml.parse(to_yaml(Config()))) == SECTIONS


def test_flat_values_are_scalars_that_an_override_reads_back() -> None:
    config = load_config("demo", ["train.patch.size=16", "tune.space.train.r1_gamma=[1, 2]"])
    flat = flatten(config)
    assert all(value is None or isinstance(value, str | int | float) for value in flat.values())
    texts = [f"{key}={'' if value is None else value}" for key, value in flat.items()]
    assert load_config(None, texts) == config


def test_differing_keys_are_named_in_order() -> None:
    other = load_config(None, ["train.betas=[0.5, 0.9]", "run.seed=3", "model.widths=[8, 8, 8, 8, 8, 8, 8]"])
    assert differing_keys(Config(), Config()) == []
    assert differing_keys(Config(), other) == differing_keys(other, Config())
    assert differing_keys(Config(), other) == ["run.seed", "model.widths", "train.betas"]


def test_places_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", ["synthesize.model=models:/cips@champion", "data.uri=s3://b/x"]).anchored()
    assert config.run.dir == str(tmp_path / "runs")
    assert config.ingest.source == str(PRESETS / "data" / "earth-blue-marble.jpg")
    assert (config.data.uri, config.synthesize.model) == ("s3://b/x", "models:/cips@champion")
    assert config.evaluate.weights is None
    assert absolute("file:///a/b") == "/a/b"
    assert absolute("~/x") == str(Path.home() / "x")
    assert absolute("https://host/x") == "https://host/x"
    with pytest.raises(ConfigError, match="no such file comes with the package"):
        absolute("preset://data/mars.jpg")


def test_trials_are_compared_by_what_they_report() -> None:
    assert load_config("demo").tune_metric == "fd_efficientnet_lite0"
    assert load_config("ffhq256").tune_metric == "fid"
    with pytest.raises(ConfigError, match="tune.metric is fid, which no trial reports"):
        load_config("demo", ["tune.metric=fid"])


def test_a_database_named_from_here_is_the_same_from_elsewhere() -> None:
    config = load_config("demo", ["tracking.uri=sqlite:///some/mlflow.db"])
    assert config.tracking_uri == f"sqlite:///{Path.cwd()}/some/mlflow.db"
    assert config.anchored().tracking.uri == config.tracking_uri
    assert load_config("demo", ["tracking.uri=http://host:5000"]).anchored().tracking.uri == "http://host:5000"
