"""The distance of a generator to a data set, whoever measures it."""

from pathlib import Path

import pytest
import torch

from pipeline.data.manifest import DataError, read_manifest
from pipeline.data.stream import DataConfig
from pipeline.evaluation.distance import DistanceMeter
from pipeline.evaluation.metrics import frechet_distance
from pipeline.evaluation.protocol import EvaluateConfig, ProtocolError
from pipeline.models.build import build_generator
from pipeline.models.cips import Generator
from pipeline.storage import StorageConfig
from tests.small import SMALL_MODEL, small_data

CONFIG = EvaluateConfig(images=48, input_size=32, batch_size=16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    return build_generator(SMALL_MODEL).eval()


def meter(data: DataConfig, folder: Path, rank: int = 0, workers: int = 1) -> DistanceMeter:
    return DistanceMeter(CONFIG, data, 16, StorageConfig(), str(folder), CPU, rank, workers)


def test_parts_of_several_workers_add_up(data: DataConfig, generator: Generator, tmp_path: Path) -> None:
    alone = meter(data, tmp_path)
    result = alone(generator)
    parts = [meter(data, tmp_path, rank, 3) for rank in range(3)]
    generated = parts[0].generated_part(generator)
    real = parts[0].real_part()
    for part in parts[1:]:
        generated, real = generated.merge(part.generated_part(generator)), real.merge(part.real_part())
    assert (generated.count, real.count) == (48, 40)
    assert frechet_distance(real, generated) == pytest.approx(result["value"], rel=1e-4)
    assert result["metric"] == "fd_efficientnet_lite0" and result["protocol"]["quick"]


def test_real_moments_are_kept_and_read_again(data: DataConfig, generator: Generator, tmp_path: Path) -> None:
    first = meter(data, tmp_path)
    assert first.kept() is None
    value = first(generator)["value"]
    assert len(list(tmp_path.glob("*.npz"))) == 1
    again = meter(data, tmp_path)
    assert again.kept() is not None
    assert again(generator)["value"] == pytest.approx(value, rel=1e-9)


def test_blur_is_a_distance_that_grows(data: DataConfig, tmp_path: Path) -> None:
    measured = meter(data, tmp_path)
    none, some, much = (measured.of_blurred(sigma).value for sigma in (0.0, 1.0, 3.0))
    assert none == pytest.approx(0.0, abs=1e-3)
    assert none < some < much
    assert measured.of_blurred(1.0).protocol.images == 40


def test_squares_of_larger_pictures_are_another_protocol(data: DataConfig, tmp_path: Path) -> None:
    squares = data.model_copy(update={"crop": True, "rotate": True})
    generator = build_generator(SMALL_MODEL.model_copy(update={"size": 8})).eval()
    with pytest.raises(ProtocolError, match="draws 8 pixels, but data.crop cuts real pictures to 12; set model.size=8"):
        DistanceMeter(CONFIG, squares, 12, StorageConfig(), str(tmp_path), CPU)(generator)
    cut = DistanceMeter(CONFIG, squares, 8, StorageConfig(), str(tmp_path), CPU)
    whole = meter(data, tmp_path)
    assert cut.protocol.views == "random 8 of 16x16, quarter turns"
    assert cut.protocol.differing(whole.protocol) == ["views"]
    value = cut(generator)["value"]
    again = DistanceMeter(CONFIG, squares, 8, StorageConfig(), str(tmp_path / "other"), CPU)
    assert again(generator)["value"] == value != whole(generator)["value"]  # the same squares, whenever it is measured


def test_no_distance_is_measured_against_damaged_pictures(generator: Generator, tmp_path: Path) -> None:
    """What training may skip would be another number under the same protocol, kept for all later evaluations."""
    data = small_data(tmp_path / "data", row_group_rows=10, shard_bytes=5_000)
    lost = Path(data.uri, read_manifest(data.uri, StorageConfig()).shards[0].file)
    lost.rename(tmp_path / "elsewhere")
    measuring = meter(data.model_copy(update={"on_corrupt": "skip"}), tmp_path)
    with pytest.raises(DataError, match=f"{lost.name}, row group 0: missing"):
        measuring(generator)
    assert not list(tmp_path.glob("*.npz"))
    (tmp_path / "elsewhere").rename(lost)
    assert measuring(generator)["value"] > 0


def test_more_workers_than_pictures_are_refused(data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="41 workers cannot share 40 pictures"):
        meter(data, tmp_path, 0, 41)
