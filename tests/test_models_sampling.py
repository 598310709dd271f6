"""A drawn picture depends on the seed and its number alone."""

import numpy as np
import torch

from pipeline.models.build import build_generator
from pipeline.models.cips import Generator
from pipeline.models.sampling import sample_images, sample_sheet
from pipeline.randomness import Purpose
from tests.small import SMALL_MODEL


def a_generator() -> Generator:
    torch.manual_seed(0)
    generator = build_generator(SMALL_MODEL).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.5)
    return generator


def test_pictures_do_not_depend_on_their_company() -> None:
    generator = a_generator()
    together = sample_images(generator, range(6), seed=1)
    assert together.dtype == torch.uint8 and together.shape == (6, 16, 16, 3)
    for number in range(6):
        alone = sample_images(generator, [number], seed=1)
        assert (alone[0].int() - together[number].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[1])


def test_seed_purpose_and_noise_change_the_picture() -> None:
    generator = a_generator()
    base = sample_images(generator, [0], seed=1)
    assert not torch.equal(base, sample_images(generator, [0], seed=2))
    assert not torch.equal(base, sample_images(generator, [0], seed=1, purpose=Purpose.EVALUATE))
    assert not torch.equal(base, sample_images(generator, [0], seed=1, noise="off"))


def test_a_denser_grid_passes_through_the_native_corners() -> None:
    generator = a_generator()
    native = sample_images(generator, [3], seed=1, noise="off")
    dense = sample_images(generator, [3], seed=1, size=31, noise="off")
    assert dense.shape == (1, 31, 31, 3)
    assert (dense[:, ::2, ::2].int() - native.int()).abs().max() <= 1


def test_full_truncation_draws_the_mean_style() -> None:
    generator = a_generator()
    generator.mean_w.copy_(torch.randn(generator.latent))
    first, second = sample_images(generator, [0, 1], seed=1, truncation=0.0, noise="off")
    assert torch.equal(first, second)


def test_a_sheet_shows_the_first_pictures() -> None:
    generator = a_generator()
    sheet = sample_sheet(generator, 3, 2, seed=5, batch_size=4)
    assert sheet.shape == (2 * 17 - 1, 3 * 17 - 1, 3)
    picture = sample_images(generator, [4], seed=5, noise="fixed").numpy()[0]
    assert np.abs(sheet[17:, 17:33].astype(int) - picture.astype(int)).max() <= 1
