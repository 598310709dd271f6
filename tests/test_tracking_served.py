"""The model that MLflow serves, called directly: which pictures it draws and what it refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import safetensors.torch
import torch
from mlflow.exceptions import MlflowException

from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.sampling import sample_images
from pipeline.tracking.served import ServedGenerator, load_generator_files

MODEL = ModelConfig(size=16, width=8, latent=8, mapping_layers=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    generator = build_generator(MODEL)
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.ones_(parameter)
    generator.mean_w.uniform_(-1, 1)
    safetensors.torch.save_file(generator.state_dict(), folder / "weights")
    (folder / "config").write_text(json.dumps(MODEL.model_dump(mode="json")))
    return folder / "weights", folder / "config"


@pytest.fixture(scope="module")
def model(files: tuple[Path, Path]) -> ServedGenerator:
    made = ServedGenerator()
    made.load_context(SimpleNamespace(artifacts={"weights": str(files[0]), "config": str(files[1])}))
    return made


def predict(model: ServedGenerator, numbers: object = None, **params: object) -> np.ndarray:
    return model.predict(None, numbers, params)


def test_pictures_are_those_of_every_other_tool(model: ServedGenerator, files: tuple[Path, Path]) -> None:
    generator = load_generator_files(*files)
    expected = sample_images(generator, [0, 1, 2], seed=4, truncation=0.7, noise="fixed").numpy()
    images = predict(model, seed=4, n=3, truncation=0.7)
    assert images.dtype == np.uint8 and images.shape == (3, 16, 16, 3)
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_a_picture_does_not_depend_on_its_company(model: ServedGenerator) -> None:
    many = predict(model, seed=1, n=9)
    assert np.array_equal(predict(model, seed=1, n=2), many[:2])
    assert np.array_equal(predict(model, [7, 3], seed=1), many[[7, 3]])
    assert len({image.tobytes() for image in many}) == 9
    assert not np.array_equal(predict(model, seed=2, n=1), many[:1])


@pytest.mark.parametrize(
    "nothing",
    [None, [], np.array([]), np.array(None), pandas.DataFrame()],
    ids=lambda given: type(given).__name__,
)
def test_nothing_asked_for_means_the_first_pictures(model: ServedGenerator, nothing: object) -> None:
    assert np.array_equal(predict(model, nothing, seed=1, n=2), predict(model, [0, 1], seed=1))
    assert model.predict(None, nothing).shape == (16, 16, 16, 3)


@pytest.mark.parametrize("some", [(3, 5), np.array([[3], [5]]), pandas.DataFrame({"number": [3, 5]})])
def test_numbers_may_come_in_any_form(model: ServedGenerator, some: object) -> None:
    assert np.array_equal(predict(model, some), predict(model, [3, 5]))


def test_a_denser_grid_shows_the_same_picture(model: ServedGenerator) -> None:
    native, dense = predict(model, n=1, seed=3), predict(model, n=1, seed=3, size=31)
    assert dense.shape == (1, 31, 31, 3)
    # 31 points over 16 pixels: every second one lies on a pixel.
    assert np.abs(dense[0, ::2, ::2].astype(int) - native[0]).max() <= 1


def test_truncation_draws_pictures_together(model: ServedGenerator) -> None:
    spread = [float(predict(model, n=8, truncation=psi).std(axis=0).mean()) for psi in (0.0, 0.5, 1.0)]
    assert spread[0] == 0.0 < spread[1] < spread[2]


@pytest.mark.parametrize(
    ("numbers", "params", "message"),
    [
        (None, {"n": 0}, "n >= 1"),
        (None, {"n": -1}, "n >= 1"),
        (None, {"n": 2**62}, "ask for fewer"),
        (None, {"seed": -1}, "seed must be in"),
        (None, {"seed": 2**32}, "seed must be in"),
        (None, {"truncation": 2.5}, "truncation must be in"),
        (None, {"truncation": float("nan")}, "truncation must be in"),
        (None, {"size": -4}, "size must be 0"),
        (None, {"size": 1}, "size must be 0"),
        (None, {"size": 100_000}, "ask for fewer"),
        ([0.5], {}, "whole numbers"),
        (["a"], {}, "whole numbers"),
        ([-1], {}, r"in \[0, 2\^32\)"),
        ([2**32], {}, r"in \[0, 2\^32\)"),
    ],
)
def test_what_cannot_be_drawn_is_named(model: ServedGenerator, numbers: object, params: dict, message: str) -> None:
    with pytest.raises(MlflowException, match=message) as error:
        predict(model, numbers, **params)
    assert error.value.get_http_status_code() == 400


def test_weights_of_another_model_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = MODEL.model_copy(update={"width": 4})
    (tmp_path / "config").write_text(json.dumps(other.model_dump(mode="json")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_generator_files(files[0], tmp_path / "config")
