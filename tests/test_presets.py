"""What the presets promise: they load, state only what differs, and hold the paper's numbers."""

from pathlib import Path

import pytest

from pipeline import plain_yaml
from pipeline.config import (
    PRESETS,
    Config,
    absolute,
    differing_keys,
    flatten,
    load_config,
    preset_names,
    replaced,
    trials,
)

PAPER = ["churches256", "ffhq256", "landscapes256", "satellite-buildings256", "satellite-landscapes256"]

STORED = dict.fromkeys(PAPER, 256) | {"satellite-buildings256": 300, "satellite-landscapes256": 512}


def leaves(tree: dict, prefix: str = "") -> dict:
    """Dotted keys that a file states."""
    found: dict[str, object] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_the_presets_that_others_rely_on_exist() -> None:
    assert preset_names() == sorted(["cifar10", "demo", *PAPER])
    assert preset_names("spaces") == ["patches"]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_states_only_what_differs_from_the_schema(name: str) -> None:
    stated = leaves(plain_yaml.parse((PRESETS / f"{name}.yaml").read_text()))
    config = load_config(name)
    assert config.run.name == name
    follows = {"run.name", "ingest.size", "ingest.tile.minimum_deviation", "ingest.tile.latitude"}
    differing = set(differing_keys(config, Config()))
    assert set(stated) - differing == set(), "these are the schema's defaults: leave them out"
    assert differing - follows <= set(stated)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_and_how_to_use_it(name: str) -> None:
    head = (PRESETS / f"{name}.yaml").read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "python -m jobs." in head
    assert f"--config {name}" in head


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name: str) -> None:
    config = load_config(name)
    train, model = config.train, config.model
    assert train.total_kimg == 25_000
    assert train.batch_size == 32
    assert (train.learning_rate, train.betas) == (0.002, (0.0, 0.99))
    assert (train.r1_gamma, train.r1_interval) == (10.0, 16)
    assert (train.ema_kimg, train.ema_rampup) == (10.0, None)
    assert train.lazy_rescale
    assert train.patch.size is None
    assert (model.generator, model.size, model.width, model.widths) == ("cips", 256, 512, None)
    assert (model.latent, model.mapping_layers) == (512, 8)
    assert (model.discriminator.channel_base, model.discriminator.channel_max) == (32768, 512)
    assert model.discriminator.group == 4
    assert config.ingest.size == STORED[name]
    assert (config.cluster.workers, config.cluster.use_gpu) == (8, True)
    assert train.batch_size // config.cluster.workers == model.discriminator.group
    assert (config.evaluate.network, config.evaluate.images, config.evaluate.truncation) == (
        "inception",
        50_000,
        1.0,
    )
    # The small one has 2,608 pictures.
    assert config.evaluate.real_images == (None if name == "satellite-landscapes256" else 50_000)


def test_only_ffhq_is_resized_with_a_box() -> None:
    assert load_config("ffhq256").ingest.filter == "box"
    assert {load_config(name).ingest.filter for name in PAPER if name != "ffhq256"} == {"lanczos"}


def test_what_is_drawn_while_training() -> None:
    """Crops and turns are not baked into what is stored."""
    drawn = {name: (load_config(name).data.crop, load_config(name).data.rotate) for name in PAPER}
    assert drawn == dict.fromkeys(PAPER, (False, False)) | {
        "satellite-buildings256": (True, True),
        "satellite-landscapes256": (True, False),
    }


def test_the_demo_needs_nothing_but_this_package() -> None:
    config = load_config("demo")
    source = Path(absolute(config.ingest.source or ""))
    assert source.read_bytes()[:3] == b"\xff\xd8\xff"
    assert "NASA" in (source.parent / "CREDITS.md").read_text()
    assert (config.model.size, config.ingest.size) == (32, 32)
    assert config.evaluate.network == "efficientnet-lite0"
    assert not config.cluster.use_gpu
    assert config.cluster.address is None
    assert config.workers == 2


def test_the_small_presets_train_on_a_cpu() -> None:
    for name in ("demo", "cifar10"):
        config = load_config(name)
        assert config.model.size == 32
        assert not config.cluster.use_gpu
        assert config.data.decoder == "dali"


def test_the_example_space_holds_trials_of_the_demo() -> None:
    config = load_config("demo", space="patches")
    grid = trials(config)
    assert len(grid) == 4
    assert {key for point in grid for key in point} == {"train.patch.size", "train.learning_rate"}
    for point in grid:
        flat = flatten(replaced(config, point))
        assert {key: flat[key] for key in point} == point
