"""Pictures into files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.models.build import build_generator
from pipeline.storage import StorageConfig
from pipeline.synthesis.generate import SynthesizeConfig, generate, write_pictures
from tests.small import SMALL_MODEL


def test_sheet_and_single_pictures_hold_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = build_generator(SMALL_MODEL).eval()
    sheet = SynthesizeConfig(out=str(tmp_path / "sheet.png"), images=5, columns=3, scale=2, batch_size=2)
    folder = sheet.model_copy(update={"out": str(tmp_path / "singles"), "batch_size": 5})
    assert write_pictures(generate(generator, sheet), sheet, StorageConfig()) == sheet.out
    write_pictures(generate(generator, folder), folder, StorageConfig())
    names = sorted(path.name for path in (tmp_path / "singles").iterdir())
    assert names == [f"seed0-{number:06d}.png" for number in range(5)]
    with Image.open(sheet.out) as image:
        pixels = np.asarray(image).astype(int)
    assert pixels.shape == (2 * (2 * 17 - 1), 2 * (3 * 17 - 1), 3)
    with Image.open(tmp_path / "singles" / names[4]) as image:
        assert np.abs(pixels[34:66, 34:66] - np.asarray(image).astype(int)).max() <= 1
