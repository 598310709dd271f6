"""Processors to plan for: what their data sheets say, what joins them, and what renting one costs."""

from dataclasses import dataclass

PRICES_OF = "2025"
"""Prices are what clouds of that year asked for an hour on demand, rounded: an assumption, `--price` replaces it."""


@dataclass(frozen=True)
class Card:
    """One accelerator, or one processor, in a machine of several. Sizes are decimal (GB = 1e9 bytes)."""

    name: str
    half_tflops: float
    """Peak of dense matrix products in bf16 (V100: fp16), without sparsity."""
    bf16: bool
    """Whether it multiplies bf16 natively; without, training runs in fp32."""
    fp32_tflops: float
    """Peak in fp32 (not TF32)."""
    product_share: float
    """Part of those peaks that a large matrix product reaches; 1 where the peaks themselves were measured."""
    memory_gb: float
    bandwidth_gb: float
    """GB per second between the processor and its memory."""
    link_gb: float
    """GB per second, each way, between two cards of a machine."""
    host_gb: float
    """GB per second from the card to the machine's memory."""
    per_node: int
    """Cards in a machine."""
    network_gbps: float
    """Gbit per second, each way, of a machine of so many cards."""
    usd_per_hour: float


CARDS = {
    card.name: card
    for card in (
        Card("h200", 989, True, 67, 0.7, 141, 4800, 450, 50, 8, 3200, 3.50),
        Card("h100", 989, True, 67, 0.7, 80, 3350, 450, 50, 8, 3200, 2.75),
        Card("a100-80gb", 312, True, 19.5, 0.8, 80, 2039, 300, 25, 8, 1600, 1.80),
        Card("a100-40gb", 312, True, 19.5, 0.8, 40, 1555, 300, 25, 8, 400, 1.30),
        Card("l40s", 362, True, 91.6, 0.6, 48, 864, 32, 25, 8, 400, 1.20),
        Card("l4", 121, True, 30.3, 0.5, 24, 300, 32, 25, 8, 100, 0.70),
        Card("v100", 125, False, 15.7, 0.8, 32, 900, 150, 12, 8, 100, 0.80),
        # Two cores with AVX512-BF16, measured: products of 16,384 x 512 by 512 x 512 (README, Engine).
        Card("cpu", 0.735, True, 0.275, 1.0, 8, 20, 20, 10, 1, 12.5, 0.10),
    )
}
"""By name. A machine of `cpu` is one worker: two cores of a server processor."""
