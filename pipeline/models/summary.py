"""The table of modules that a run prints at its start: what G and D consist of, and how large they are."""

import torch
from torch import nn

from pipeline.models.build import ModelConfig, build_discriminator, build_generator


def summary_table(model: ModelConfig, patch: int | None = None) -> str:
    """Modules, shapes of their weights and numbers of parameters of G and of D, with totals.

    Built without memory or time: the tensors are on torch's meta device.

    Args:
        patch: pixels along the discriminator's input where it is not the whole picture.
    """
    with torch.device("meta"):
        generator = build_generator(model)
        discriminator = build_discriminator(model.discriminator, patch or model.size)
    return f"{module_table('generator', generator)}\n\n{module_table('discriminator', discriminator)}"


def module_table(name: str, module: nn.Module) -> str:
    """One row per module that owns parameters, then the total."""
    rows = [("module", "weights", "parameters")]
    for path, part in module.named_modules():
        own = list(part.named_parameters(recurse=False))
        if own:
            shapes = "  ".join(f"{key} {'x'.join(map(str, value.shape)) or '1'}" for key, value in own)
            rows.append((f"{name}.{path}", shapes, f"{sum(value.numel() for _, value in own):,}"))
    rows.append((f"{name} in all", "", f"{sum(value.numel() for value in module.parameters()):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows)
