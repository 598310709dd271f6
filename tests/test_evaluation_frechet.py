"""From a generator and real pictures to a distance: any split gives the same, worse pictures a larger one."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from pipeline.evaluation.features import FeatureNetwork, load_features
from pipeline.evaluation.frechet import (
    blurred,
    generated_moments,
    image_moments,
    measure,
    read_real_moments,
    share,
    write_real_moments,
)
from pipeline.evaluation.metrics import Moments, frechet_distance
from pipeline.evaluation.protocol import EvaluateConfig, Protocol, make_protocol
from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.cips import Generator
from pipeline.storage import StorageConfig

STORAGE = StorageConfig()
CONFIG = EvaluateConfig(images=24, input_size=32, truncation=0.8, seed=5)


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_features(CONFIG, STORAGE, torch.device("cpu"))


@pytest.fixture(scope="module")
def protocol(network: FeatureNetwork) -> Protocol:
    return make_protocol(CONFIG, network.weights_sha256, "d" * 64, 40)


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(1)
    made = build_generator(ModelConfig(size=16, width=8, latent=8, mapping_layers=2, noise="random"))
    for name, parameter in made.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.ones_(parameter)  # else the noise maps' keys would not matter
    return made


def pictures(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Rough uint8 pictures with edges."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, size // 4, size // 4, 3), dtype=np.uint8)
    return torch.from_numpy(coarse.repeat(4, axis=1).repeat(4, axis=2))


def assert_close(a: Moments, b: Moments) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.sum_D, b.sum_D, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.outer_DD, b.outer_DD, rtol=1e-3, atol=1e-3)


def test_any_split_of_the_pictures_gives_the_same_moments(
    generator: Generator, network: FeatureNetwork, protocol: Protocol
) -> None:
    whole = generated_moments(generator, network, protocol, range(24), batch_size=24)
    parts = [generated_moments(generator, network, protocol, share(24, rank, 3), batch_size=5) for rank in range(3)]
    assert_close(parts[2].merge(parts[0]).merge(parts[1]), whole)
    shuffled = generated_moments(generator, network, protocol, [*range(12, 24), *range(12)], batch_size=7)
    assert_close(shuffled, whole)


@pytest.mark.parametrize("change", [{"seed": 6}, {"truncation": 1.0}])
def test_the_pictures_follow_the_protocol(
    generator: Generator, network: FeatureNetwork, protocol: Protocol, change: dict
) -> None:
    one = generated_moments(generator, network, protocol, range(4))
    again = generated_moments(generator, network, protocol, range(4))
    other = generated_moments(generator, network, dataclasses.replace(protocol, **change), range(4))
    assert torch.equal(one.sum_D, again.sum_D)
    assert not torch.allclose(one.sum_D, other.sum_D, rtol=1e-3)


def test_each_picture_has_noise_of_its_own(generator: Generator, network: FeatureNetwork, protocol: Protocol) -> None:
    with torch.no_grad():
        for parameter in generator.mapping.parameters():
            parameter.zero_()  # all pictures get the same style: only noise can tell them apart
    moments = generated_moments(generator, network, protocol, range(8))
    assert float(moments.covariance().trace()) > 1e-3


def test_bf16_is_another_protocol_and_another_computation(
    generator: Generator, network: FeatureNetwork, protocol: Protocol
) -> None:
    half = dataclasses.replace(protocol, precision="bf16")
    full_moments = generated_moments(generator, network, protocol, range(8))
    half_moments = generated_moments(generator, network, half, range(8))
    assert half.digest() != protocol.digest()
    assert not torch.equal(full_moments.sum_D, half_moments.sum_D)
    torch.testing.assert_close(half_moments.mean(), full_moments.mean(), rtol=0.5, atol=0.1)


def test_the_generator_is_left_as_it_was(generator: Generator, network: FeatureNetwork, protocol: Protocol) -> None:
    generator.train()
    generated_moments(generator, network, protocol, range(2))
    assert generator.training
    generator.eval()
    generated_moments(generator, network, protocol, range(2))
    assert not generator.training


def test_a_diverged_generator_is_named(generator: Generator, network: FeatureNetwork, protocol: Protocol) -> None:
    with torch.no_grad():
        generator.get_parameter("groups.0.to_rgb.weight").fill_(float("nan"))
    with pytest.raises(ValueError, match=r"diverged: groups.0.to_rgb.weight"):
        generated_moments(generator, network, protocol, range(2))


def test_progress_counts_every_picture(generator: Generator, network: FeatureNetwork, protocol: Protocol) -> None:
    seen: list[int] = []
    generated_moments(generator, network, protocol, range(10), batch_size=4, progress=seen.append)
    assert seen == [4, 4, 2]
    image_moments(iter(pictures(6).split(4)), network, seen.append)
    assert seen[3:] == [4, 2]


def test_no_pictures_are_refused(generator: Generator, network: FeatureNetwork, protocol: Protocol) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        generated_moments(generator, network, protocol, [])
    with pytest.raises(ValueError, match="no pictures"):
        image_moments(iter([]), network)


@pytest.mark.parametrize(("count", "workers"), [(10, 3), (3, 5), (0, 2), (7, 1)])
def test_workers_share_each_picture_once(count: int, workers: int) -> None:
    shares = [share(count, rank, workers) for rank in range(workers)]
    assert [index for part in shares for index in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_result_needs_complete_moments(network: FeatureNetwork, protocol: Protocol) -> None:
    real = image_moments(pictures(40).split(20), network)
    fake = image_moments(pictures(24, seed=1).split(12), network)
    result = measure(real, fake, protocol)
    assert result.value == frechet_distance(real, fake) and result.metric == "fd_efficientnet_lite0"
    with pytest.raises(ValueError, match="24 generated pictures, but 12 were seen"):
        measure(real, image_moments([pictures(12)], network), protocol)
    with pytest.raises(ValueError, match="40 real pictures, but 24 were seen"):
        measure(fake, fake, protocol)


def test_a_stronger_blur_is_further_away(network: FeatureNetwork) -> None:
    real = image_moments(pictures(64, size=32).split(32), network)
    distances = [
        frechet_distance(real, image_moments(blurred(pictures(64, size=32).split(32), sigma), network))
        for sigma in (0.0, 0.5, 1.0, 2.0)
    ]
    assert distances[0] < 1e-6
    assert distances == sorted(distances) and distances[1] > 1.0


@pytest.mark.parametrize("sigma", [0.6, 1.5])
def test_the_blur_is_scipys(sigma: float) -> None:
    images = pictures(3, size=32)
    (mine,) = blurred([images], sigma)
    radius = int(np.ceil(4 * sigma))
    expected = scipy.ndimage.gaussian_filter(images.double().numpy(), sigma, axes=(1, 2), mode="mirror", radius=radius)
    assert mine.dtype == torch.uint8 and mine.shape == images.shape
    # Equal but for values that lie on a half.
    assert np.abs(mine.numpy() - expected).max() < 0.5 + 1e-3


@pytest.mark.parametrize(("sigma", "message"), [(-1.0, "at least 0"), (float("nan"), "finite"), (9.0, "too far")])
def test_a_bad_blur_is_refused(sigma: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(blurred([pictures(1)], sigma))


# ---- cache -------------------------------------------------------------------------------------------------


@pytest.fixture
def moments(protocol: Protocol) -> Moments:
    return Moments.of(torch.randn(protocol.real_images, 7, generator=torch.Generator().manual_seed(0)))


def stored(folder: Path) -> Iterator[Path]:
    return folder.rglob("*.npz")


def test_real_moments_are_kept_and_found_by_all_that_they_depend_on(
    tmp_path: Path, protocol: Protocol, moments: Moments
) -> None:
    folder = str(tmp_path / "cache")
    assert read_real_moments(folder, protocol, STORAGE) is None
    write_real_moments(folder, protocol, moments, STORAGE)
    found = read_real_moments(folder, dataclasses.replace(protocol, seed=99, images=7), STORAGE)
    assert found is not None and found.count == moments.count and torch.equal(found.outer_DD, moments.outer_DD)
    for change in (
        {"dataset": "e" * 64},
        {"input_size": 96},
        {"weights_sha256": "f" * 64},
        {"real_images": 39},
    ):
        assert read_real_moments(folder, dataclasses.replace(protocol, **change), STORAGE) is None


def test_a_damaged_cache_is_said_and_not_used(
    tmp_path: Path, protocol: Protocol, moments: Moments, capsys: pytest.CaptureFixture[str]
) -> None:
    write_real_moments(str(tmp_path), protocol, moments, STORAGE)
    (path,) = stored(tmp_path)
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(damage)
        assert read_real_moments(str(tmp_path), protocol, STORAGE) is None
        assert str(path) in capsys.readouterr().out
    path.write_bytes(whole)
    assert read_real_moments(str(tmp_path), protocol, STORAGE) is not None


def test_moments_of_another_protocol_under_the_same_name_are_not_used(
    tmp_path: Path, protocol: Protocol, moments: Moments
) -> None:
    write_real_moments(str(tmp_path), protocol, moments, STORAGE)
    (path,) = stored(tmp_path)
    other = dataclasses.replace(protocol, dataset="e" * 64)
    uri = write_real_moments(str(tmp_path), other, moments, STORAGE)
    Path(uri).write_bytes(path.read_bytes())
    assert read_real_moments(str(tmp_path), other, STORAGE) is None


def test_incomplete_moments_are_not_kept(tmp_path: Path, protocol: Protocol) -> None:
    with pytest.raises(ValueError, match="moments of 3 pictures cannot be kept as those of 40"):
        write_real_moments(str(tmp_path), protocol, Moments.of(torch.eye(3)), STORAGE)
    assert not list(stored(tmp_path))


def test_the_cache_may_be_a_bucket(s3: object, protocol: Protocol, moments: Moments) -> None:
    folder = f"s3://{s3.bucket}/cache"  # type: ignore[attr-defined]
    assert read_real_moments(folder, protocol, STORAGE) is None
    write_real_moments(folder, protocol, moments, STORAGE)
    found = read_real_moments(folder, protocol, STORAGE)
    assert found is not None and torch.equal(found.sum_D, moments.sum_D)
