"""The precision of matrix products: what the processor can, what all workers can, and a sentence that says so."""

import torch

from pipeline.training.world import World

CPU_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")


def native_bf16(device: torch.device) -> str | None:
    """What makes this device multiply bf16 natively, in words; None where nothing does."""
    if device.type == "cuda":
        return "the GPU has bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else None
    capabilities = torch.cpu.get_capabilities()
    found = [name for name in CPU_CAPABILITIES if capabilities.get(name, False)]
    return f"the processor has {found[0]}" if found else None


def resolve_precision(setting: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: auto is bf16 where the processor multiplies bf16 natively."""
    if setting != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[setting]
    return torch.bfloat16 if native_bf16(device) else torch.float32


def agreed_precision(setting: str, device: torch.device, world: World) -> torch.dtype:
    """bf16 only where every worker has it: machines of two kinds must not train in two precisions."""
    mine = resolve_precision(setting, device)
    if world.size == 1:
        return mine
    votes = world.sum_(torch.tensor([float(mine == torch.bfloat16)], device=device))
    return torch.bfloat16 if int(votes.item()) == world.size else torch.float32


def forbid_tf32_for(agreed: torch.dtype) -> None:
    """Keeps cuDNN from computing convolutions in TF32, which torch allows by default, where fp32 was agreed on."""
    if agreed == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


def precision_sentence(setting: str, device: torch.device, agreed: torch.dtype) -> str:
    """What was chosen and why, for the top of a run's output."""
    if resolve_precision(setting, device) != agreed:
        reason = "not every worker has bf16"
    elif setting != "auto":
        reason = f"train.precision={setting}"
    else:
        reason = native_bf16(device) or f"the {'GPU' if device.type == 'cuda' else 'processor'} has no bf16"
    return f"matrix products in {'bf16' if agreed == torch.bfloat16 else 'fp32'}: {reason}"
