"""The residual discriminator of StyleGAN2, as CIPS uses it: RGB only, any power of two from 8 pixels on."""

import math

import torch
from torch import Tensor, nn

from pipeline.models.layers import EqualConv2d, EqualLinear
from pipeline.ops.resample import blur, blur_kernel


class Discriminator(nn.Module):
    """RGB pictures or patches to one logit each; positive means "real".

    size: height and width, a power of two of at least 8.
    channel_base, channel_max: at resolution r there are min(channel_max, channel_base // r) channels.
    group: pictures that share one minibatch standard deviation; picture i belongs to group i // group.
    """

    def __init__(self, size: int, channel_base: int = 32768, channel_max: int = 512, group: int = 4) -> None:
        super().__init__()
        if size < 8 or size & (size - 1):
            raise ValueError(f"the discriminator's size must be a power of two of at least 8, got {size}")
        if channel_base < size:
            raise ValueError(
                f"channel_base {channel_base} leaves no channel at {size} pixels; it must be at least size"
            )
        self.size, self.group = size, group
        resolutions = [size >> level for level in range(int(math.log2(size)) - 2)]
        channels = {r: min(channel_max, channel_base // r) for r in [*resolutions, 4]}
        self.from_rgb = EqualConv2d(3, channels[size], 1, activate=True)
        self.blocks = nn.Sequential(*(ResidualBlock(channels[r], channels[r // 2]) for r in resolutions))
        self.last = EqualConv2d(channels[4] + 1, channels[4], 3, padding=1, activate=True)
        self.hidden = EqualLinear(channels[4] * 16, channels[4], activate=True)
        self.logit = EqualLinear(channels[4], 1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """images_BCHW: (B, 3, size, size) in [-1, 1], B a multiple of `group`. Returns logits (B,).

        Layout channels_last is the fast one, and what `images_from_pixels` gives.
        """
        if images_BCHW.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"the discriminator was built for (B, 3, {self.size}, {self.size}), got {tuple(images_BCHW.shape)}"
            )
        x_BCHW = self.blocks(self.from_rgb(images_BCHW))
        x_BCHW = self.last(minibatch_stddev(x_BCHW, self.group))
        hidden = self.hidden(x_BCHW.flatten(1))
        with torch.autocast(hidden.device.type, enabled=False):  # so that logits are not rounded to bfloat16
            return self.logit(hidden.to(self.logit.weight.dtype)).squeeze(1)


class ResidualBlock(nn.Module):
    """(f(x) + skip(x)) / sqrt(2) at half the resolution; the division is folded into the weights."""

    kernel_44: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = math.sqrt(0.5)
        self.conv_0 = EqualConv2d(in_channels, in_channels, 3, padding=1, activate=True)
        self.conv_1 = EqualConv2d(in_channels, out_channels, 3, stride=2, activate=True, gain=half)
        self.skip = EqualConv2d(in_channels, out_channels, 1, bias=False, gain=half)
        self.register_buffer("kernel_44", blur_kernel(), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Skip: blurring every second place, then mixing channels, equals blur and strided 1x1 convolution.
        # Main branch: blur and 3x3 convolution as one 6x6 kernel would take 3 to 30 times as long on a CPU.
        skip_BCHW = self.skip(blur(x_BCHW, self.kernel_44, padding=1, stride=2))
        return self.conv_1(blur(self.conv_0(x_BCHW), self.kernel_44, padding=2)) + skip_BCHW


def minibatch_stddev(x_BCHW: Tensor, group: int) -> Tensor:
    """Append one channel, the mean standard deviation over a contiguous group of pictures: (B, C + 1, H, W).

    Root of population variance + 1e-8, averaged over channels and pixels. Raises ValueError unless the group
    divides B.
    """
    batch, _, height, width = x_BCHW.shape
    if batch % group:
        raise ValueError(
            f"D got {batch} pictures, not a multiple of its minibatch-stddev group of {group}; "
            "change the batch (per worker and accumulation step) or model.discriminator.group"
        )
    groups = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32)).unflatten(0, (-1, group))
    variance = (groups - groups.mean(dim=1, keepdim=True)).square().mean(dim=1)
    deviation = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3))
    channel = deviation.repeat_interleave(group)[:, None, None, None].expand(-1, 1, height, width)
    return torch.cat([x_BCHW, channel.to(x_BCHW.dtype)], dim=1)


def images_from_pixels(rgb_BP3: Tensor, height: int, width: int) -> Tensor:
    """Pixels (B, height * width, 3), row by row, viewed as channels_last pictures (B, 3, height, width)."""
    return rgb_BP3.unflatten(1, (height, width)).permute(0, 3, 1, 2)
