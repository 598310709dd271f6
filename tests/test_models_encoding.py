import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.coordinates import dense_grid, full_grid, normalised
from pipeline.models.encoding import CoordinateEmbedding, Encoding, FourierFeatures, coordinate_noise
from pipeline.ops.philox import philox4x32
from pipeline.randomness import normal_from_words

SIZE = 16
KEYS = torch.tensor([[1, 2], [3, 4], [0xFFFFFFFF, 0]])


def test_fourier_features_start_uniform_within_their_bounds() -> None:
    torch.manual_seed(0)
    fourier = FourierFeatures(20_000)
    for values, bound in ((fourier.weight, math.sqrt(9 / 2)), (fourier.bias, 1 / math.sqrt(2))):
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.999 * bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_fourier_features_are_plain_sines() -> None:
    fourier = FourierFeatures(8)
    place = torch.tensor([[0.25, -0.75]])
    expected = torch.sin(0.25 * fourier.weight[:, 0] - 0.75 * fourier.weight[:, 1] + fourier.bias)
    torch.testing.assert_close(fourier(place)[0], expected)


def test_fourier_features_tell_neighbours_apart_under_autocast() -> None:
    torch.manual_seed(0)
    fourier = FourierFeatures(64)
    places = normalised(full_grid(1024)[:1024], 1024)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fourier(places), fourier(places).float())
        features = fourier(places)
    assert (features[1:] - features[:-1]).abs().amax(dim=1).min() > 1e-4


def test_embedding_is_the_table_at_pixels_and_bilinear_between() -> None:
    torch.manual_seed(0)
    embedding = CoordinateEmbedding(SIZE, 6)
    assert embedding.weight.std().item() == pytest.approx(1.0, abs=0.05)
    grid = full_grid(SIZE)
    assert torch.equal(embedding(grid), embedding.weight)
    assert torch.equal(embedding(grid.float()), embedding.weight)
    table = embedding.weight.t().reshape(1, 6, SIZE, SIZE)
    places = torch.cat([dense_grid(SIZE, 37, 23), torch.tensor([[-2.0, 3.5], [15.5, 99.0]])])
    sampled = F.grid_sample(
        table,
        normalised(places, SIZE)[None, None],
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    torch.testing.assert_close(embedding(places), sampled[0, :, 0].t(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_embedding_gradient_reaches_only_the_pixels_asked_for(dtype: torch.dtype) -> None:
    embedding = CoordinateEmbedding(SIZE, 6)
    embedding(torch.tensor([[3, 5], [3, 5]], dtype=dtype)).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    expected = torch.zeros(SIZE * SIZE, 6)
    expected[5 * SIZE + 3] = 2.0
    assert torch.equal(gradient, expected)


def test_encoding_is_fourier_then_embedding() -> None:
    encoding = Encoding(SIZE, 6)
    pixels = torch.tensor([[[0, 15], [3, 4]]])
    assert encoding(pixels).shape == (1, 2, 12)
    torch.testing.assert_close(encoding(pixels)[..., :6], encoding.fourier(pixels * (2 / 15) - 1))
    assert torch.equal(encoding(pixels)[0, :, 6:], encoding.embedding.weight[[15 * SIZE, 4 * SIZE + 3]])
    with pytest.raises(ValueError, match="0 <= x < 16"):
        encoding(torch.tensor([[16, 0]]))


def test_noise_is_philox_of_pixel_and_layer() -> None:
    noise = coordinate_noise(full_grid(SIZE), KEYS, SIZE, 7)
    assert noise.shape == (7, 3, SIZE * SIZE) and noise.dtype == torch.float32
    for layer, picture, pixel in ((0, 0, 0), (1, 1, 17), (2, 2, 255), (3, 0, 100), (6, 2, 31)):
        words = [
            torch.tensor(word)
            for word in philox4x32((pixel, layer // 4, 0, 0), tuple(int(word) for word in KEYS[picture]))  # type: ignore[arg-type]
        ]
        four = [*normal_from_words(words[0], words[1]), *normal_from_words(words[2], words[3])]
        torch.testing.assert_close(noise[layer, picture, pixel], four[layer % 4])


def test_noise_is_standard_normal_and_independent_between_layers_pictures_and_neighbours() -> None:
    noise = coordinate_noise(full_grid(64), KEYS, 64, 6).double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert noise.var().item() == pytest.approx(1.0, abs=0.02)
    for values in (noise, noise.square()):
        correlation = torch.corrcoef(values.flatten(0, 1)) - torch.eye(18)
        assert correlation.abs().max() < 5 / 64
        rows = values.flatten(0, 1).reshape(18, 64, 64)
        beside = torch.corrcoef(torch.stack([rows[:, :, 1:].flatten(), rows[:, :, :-1].flatten()]))
        assert abs(beside[0, 1]) < 5 / (18 * 64 * 63) ** 0.5


def test_noise_depends_on_the_coordinate_alone() -> None:
    whole = coordinate_noise(full_grid(SIZE), KEYS, SIZE, 5)
    order = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coordinate_noise(full_grid(SIZE)[order], KEYS, SIZE, 5), whole[:, :, order])
    assert torch.equal(coordinate_noise(full_grid(SIZE)[40:47], KEYS[1:2], SIZE, 5), whole[:, 1:2, 40:47])
    assert torch.equal(coordinate_noise(full_grid(SIZE), KEYS, SIZE, 3), whole[:3])
    own = torch.stack([full_grid(SIZE)[:9], full_grid(SIZE)[9:18], full_grid(SIZE)[18:27]])
    expected = torch.stack([whole[:, b, 9 * b : 9 * b + 9] for b in range(3)], dim=1)
    assert torch.equal(coordinate_noise(own, KEYS, SIZE, 5), expected)


def test_noise_between_pixels_is_bilinear_and_exact_at_pixels() -> None:
    whole = coordinate_noise(full_grid(SIZE), KEYS, SIZE, 5)
    assert torch.equal(coordinate_noise(full_grid(SIZE).float(), KEYS, SIZE, 5), whole)
    between = coordinate_noise(torch.tensor([[2.25, 3.5]]), KEYS, SIZE, 5)
    rows = whole.reshape(5, 3, SIZE, SIZE)[:, :, 3:5, 2:4].mean(dim=2)
    torch.testing.assert_close(between[..., 0], 0.75 * rows[..., 0] + 0.25 * rows[..., 1])
