from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.coordinates import dense_grid, full_grid, patch_grid
from pipeline.models.build import ModelConfig, build_generator
from pipeline.models.cips import Generator, Group
from pipeline.models.encoding import coordinate_noise
from pipeline.ops.matrix_product import SMALLEST_PICTURE
from pipeline.randomness import Purpose, latents, noise_keys

SIZE, BATCH, LATENT = 32, 4, 48
MODES = ["off", "fixed", "random"]
Z = latents(0, Purpose.SAMPLE, 0, torch.arange(BATCH), LATENT)
KEYS = noise_keys(0, Purpose.SAMPLE_NOISE, 0, torch.arange(BATCH))
GRID = full_grid(SIZE)


def make(**changes: Any) -> Generator:
    """A generator whose noise and biases are not zero, as after training."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"size": SIZE, "width": 64, "latent": LATENT, "mapping_layers": 2}
    generator = build_generator(ModelConfig.model_validate(values | changes))
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            nn.init.constant_(parameter, 0.3)
        elif name.endswith("bias") and parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.1)
    return generator


@pytest.fixture(scope="module")
def generator() -> Generator:
    return make()


@pytest.fixture(scope="module")
def pictures(generator: Generator) -> dict[str, Tensor]:
    """The full picture in each noise mode."""
    with torch.no_grad():
        return {mode: generator(Z, GRID, KEYS, noise=mode) for mode in MODES}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def test_shapes_and_groups(generator: Generator, pictures: dict[str, Tensor]) -> None:
    assert pictures["off"].shape == (BATCH, SIZE * SIZE, 3)
    assert len(generator.groups) == 4 and generator.layers == 9
    assert generator.widths == (64,) * 4
    assert (generator.size, generator.latent) == (SIZE, LATENT)
    assert generator.mapping(Z).shape == (BATCH, LATENT)


def test_rgb_is_the_sum_over_the_groups() -> None:
    """Written out once more, layer by layer, with the picture accumulated from zero."""
    generator = make(widths=[40, 32, 24, 16])
    w = generator.mapping(Z)
    noise = list(coordinate_noise(GRID, KEYS, SIZE, 9))
    x = generator.first(generator.encoding(GRID), w, noise.pop(0))
    assert x.shape == (BATCH, SIZE * SIZE, 40)
    rgb = torch.zeros(BATCH, SIZE * SIZE, 3)
    for group, width in zip(generator.groups, (40, 32, 24, 16), strict=True):
        assert isinstance(group, Group)
        x = group.linear_0(x, w, noise.pop(0))
        x = group.linear_1(x, w, noise.pop(0))
        assert x.shape[2] == width
        rgb = rgb + group.to_rgb(x, w)
    torch.testing.assert_close(generator(Z, GRID, KEYS), rgb, atol=1e-5, rtol=1e-5)


# Promise 6: no operation across pixels.


@pytest.mark.parametrize("mode", MODES)
def test_a_permutation_of_coordinates_permutes_the_picture_exactly(
    generator: Generator, pictures: dict[str, Tensor], mode: str
) -> None:
    order = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(generator(Z, GRID[order], KEYS, noise=mode), pictures[mode][:, order])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("points", [64, 65, 100, 129, 511, 1000])
def test_a_subset_of_64_pixels_or_more_is_exact(
    generator: Generator, pictures: dict[str, Tensor], mode: str, points: int
) -> None:
    chosen = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(points))[:points]
    with torch.no_grad():
        assert torch.equal(generator(Z, GRID[chosen], KEYS, noise=mode), pictures[mode][:, chosen])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("points", [1, 2, 7, 33, 63])
def test_a_smaller_subset_is_equal_to_rounding(
    generator: Generator, pictures: dict[str, Tensor], mode: str, points: int
) -> None:
    chosen = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(points))[:points]
    with torch.no_grad():
        part = generator(Z, GRID[chosen], KEYS, noise=mode)
    assert relative(part, pictures[mode][:, chosen]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_patch_for_each_picture_is_that_part_of_it(
    generator: Generator, pictures: dict[str, Tensor], mode: str
) -> None:
    corners = torch.tensor([[0, 0], [3, 10], [17, 1], [8, 17]])
    patches = patch_grid(corners, 8, 2)
    with torch.no_grad():
        part = generator(Z, patches, KEYS, noise=mode)
        assert part.shape == (BATCH, 64, 3)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
        assert torch.equal(generator(Z, patches[:, order], KEYS, noise=mode), part[:, order])
    index = patches[..., 1] * SIZE + patches[..., 0]
    expected = pictures[mode].gather(1, index[..., None].expand(-1, -1, 3))
    assert relative(part, expected) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_does_not_depend_on_its_batch(generator: Generator, pictures: dict[str, Tensor], mode: str) -> None:
    with torch.no_grad():
        alone = generator(Z[2:3], GRID, KEYS[2:3], noise=mode)
    assert relative(alone, pictures[mode][2:3]) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_float_coordinates_at_pixels_give_the_same_picture(
    generator: Generator, pictures: dict[str, Tensor], mode: str
) -> None:
    with torch.no_grad():
        assert relative(generator(Z, GRID.float(), KEYS, noise=mode), pictures[mode]) < 1e-6
        dense = generator(Z, dense_grid(SIZE, 2 * SIZE - 1, 2 * SIZE - 1), KEYS, noise=mode)
    every_second = dense.unflatten(1, (2 * SIZE - 1, -1))[:, ::2, ::2].flatten(1, 2)
    assert relative(every_second, pictures[mode]) < 1e-5


@pytest.mark.parametrize(("batch", "limit"), [(4, 1024), (4, 300), (1, 64), (4, 64), (3, 1_000_000)])
@pytest.mark.parametrize("grid", [GRID, GRID.expand(4, -1, -1)])
def test_fewer_pixels_in_flight_change_nothing(
    generator: Generator, pictures: dict[str, Tensor], batch: int, limit: int, grid: Tensor
) -> None:
    small = make(max_pixels_in_flight=limit)
    counts: list[int] = []
    small.encoding.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].shape[-2]))
    grid = grid[:batch] if grid.ndim == 3 else grid
    with torch.no_grad():
        rgb = small(Z[:batch], grid, KEYS[:batch], noise="random")
    assert relative(rgb, pictures["random"][:batch]) < 1e-5
    assert sum(counts) == SIZE * SIZE and min(counts) >= SMALLEST_PICTURE
    assert max(counts) <= max(limit // batch, 2 * SMALLEST_PICTURE - 1)
    counts.clear()
    small(Z[:batch], grid, KEYS[:batch], noise="random")
    assert counts == [SIZE * SIZE]  # with gradients the whole list is one piece


# Noise, truncation, styles.


def test_noise_modes_differ_and_repeat(generator: Generator, pictures: dict[str, Tensor]) -> None:
    with torch.no_grad():
        assert torch.equal(generator(Z, GRID, KEYS, noise="random"), pictures["random"])
        assert torch.equal(generator(Z, GRID, KEYS), pictures["random"])
        assert torch.equal(generator(Z, GRID, noise="fixed"), pictures["fixed"])
        assert not torch.equal(generator(Z, GRID, KEYS + 1, noise="random"), pictures["random"])
    for a, b in (("off", "fixed"), ("off", "random"), ("fixed", "random")):
        assert relative(pictures[a], pictures[b]) > 0.01


def test_fixed_noise_is_the_same_for_all_pictures(generator: Generator) -> None:
    with torch.no_grad():
        twice = generator(Z[:1].expand(2, -1), GRID, noise="fixed")
        other = generator(Z[:1].expand(2, -1), GRID, KEYS[:2], noise="random")
    assert torch.equal(twice[0], twice[1])
    assert not torch.equal(other[0], other[1])


def test_noise_starts_without_effect() -> None:
    torch.manual_seed(0)
    fresh = build_generator(ModelConfig(size=8, width=8, latent=8, mapping_layers=1))
    z, grid = torch.randn(4, 8), full_grid(8)
    assert torch.equal(fresh(z, grid, KEYS), fresh(z, grid, noise="off"))
    fresh(z, grid, KEYS).square().sum().backward()
    assert fresh.first.noise_strength.grad is not None and fresh.first.noise_strength.grad != 0


def test_every_parameter_gets_a_gradient_or_asks_for_none() -> None:
    """Data-parallel training waits for gradients that never come."""
    for noise in MODES:
        generator = make(noise=noise)
        generator(Z, GRID, KEYS).square().sum().backward()
        for name, parameter in generator.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), name
            assert parameter.requires_grad or (noise == "off" and name.endswith("noise_strength"))


def test_truncation_pulls_w_to_its_mean(generator: Generator) -> None:
    assert "mean_w" in dict(generator.named_buffers()) and generator.mean_w.shape == (LATENT,)
    w = generator.mapping(Z)
    mean = torch.randn(LATENT)
    with torch.no_grad():
        generator.mean_w.copy_(mean)
        for psi in (0.0, 0.5, 1.3):
            expected = generator.synthesis(mean + psi * (w - mean), GRID, noise="off")
            torch.testing.assert_close(generator(Z, GRID, truncation=psi, noise="off"), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(generator(Z, GRID, noise="off"), generator.synthesis(w, GRID, noise="off"))
        generator.mean_w.zero_()


def test_bfloat16_is_near_and_float32_comes_out(generator: Generator, pictures: dict[str, Tensor]) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rgb = generator(Z, GRID, KEYS)
        part = generator(Z, GRID[100:300], KEYS)
    assert rgb.dtype == torch.float32
    assert (rgb - pictures["random"]).square().mean().sqrt() < 0.02 * pictures["random"].std()
    assert torch.equal(part, rgb[:, 100:300])


def test_twice_differentiable_with_respect_to_w() -> None:
    torch.manual_seed(0)
    generator = build_generator(ModelConfig(size=8, width=4, latent=3, mapping_layers=1)).double()
    coordinates = torch.tensor([[0, 0], [3, 7], [5, 2]])
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: generator.synthesis(w, coordinates, noise="off"), (w,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g(Z, GRID), 'noise "random" needs noise_keys_B2'),
        (lambda g: g(Z, GRID, KEYS[:2]), r"noise_keys_B2 must be int64 \(4, 2\)"),
        (lambda g: g(Z, GRID, KEYS.float()), "noise_keys_B2 must be int64"),
        (lambda g: g(Z, GRID, noise="none"), "noise must be one of random, fixed, off, got 'none'"),
        (lambda g: g(Z, GRID[0], noise="off"), r"coordinates must be \(P, 2\) or \(B, P, 2\)"),
        (lambda g: g(Z, GRID.expand(3, -1, -1), noise="off"), "4 styles but coordinates for 3 pictures"),
        (lambda g: g.synthesis(Z[:, :5], GRID, noise="off"), r"w must be \(B, 48\)"),
        (lambda g: g(Z, GRID + 1, noise="off"), "0 <= x < 32"),
    ],
)
def test_bad_input_is_named(generator: Generator, call: Callable[[Generator], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(generator)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_cuda_draws_the_same_pictures(pictures: dict[str, Tensor], mode: str) -> None:
    generator = make().cuda()
    with torch.no_grad():
        rgb = generator(Z.cuda(), GRID.cuda(), KEYS.cuda(), noise=mode)
        part = generator(Z.cuda(), GRID[100:400].cuda(), KEYS.cuda(), noise=mode)
    assert rgb.is_cuda
    assert relative(rgb.cpu(), pictures[mode]) < 1e-3  # TensorFloat-32 may be on
    assert relative(part, rgb[:, 100:400]) < 1e-5


@pytest.mark.parametrize("recompute", ["none", "segment"])
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputing_changes_memory_and_no_bit_of_the_gradients(recompute: Any, bf16: bool) -> None:
    generator = make()

    def gradients(mode: Any) -> dict[str, Tensor]:
        generator.recompute = mode
        generator.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            rgb_BP3 = generator(Z, GRID, KEYS)
        rgb_BP3.square().sum().backward()
        return {name: p.grad.clone() for name, p in generator.named_parameters() if p.grad is not None}

    usual = gradients("layer")
    assert len(usual) == len(list(generator.parameters()))
    for name, gradient in gradients(recompute).items():
        assert torch.equal(gradient, usual[name]), name
