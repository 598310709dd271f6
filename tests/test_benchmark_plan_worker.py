"""Seconds and precision of one worker."""

from dataclasses import replace
from typing import Literal

import pytest

from pipeline.benchmark.plan_cards import CARDS
from pipeline.training.settings import TrainConfig
from tests.plans import planned


def test_a_picture_takes_each_parts_flops_by_its_rate() -> None:
    plan = planned(product_tflops=800.0)
    flops, exact = plan.flops, 67e12 * plan.card.product_share
    expected = flops.generator / 400e12 + flops.discriminator / 200e12 + flops.r1 / (0.5 * exact)
    assert plan.image_seconds == pytest.approx(expected)
    assert plan.compute_seconds(8) == pytest.approx(8 * expected + plan.optimizer_seconds)


def test_without_a_measurement_a_product_reaches_part_of_the_peak() -> None:
    assert planned().product_rate == pytest.approx(989e12 * 0.7)
    assert planned("cpu").product_rate == pytest.approx(0.735e12)


def test_the_optimisers_move_bytes_once_an_update() -> None:
    """40 bytes a parameter of G, 28 of D, and those once more each 16 updates."""
    moved = 40 * 45_911_076 + 28 * 28_864_129 * (1 + 1 / 16)
    assert planned().optimizer_seconds == pytest.approx(moved / 4800e9)
    without = planned(train=TrainConfig(r1_gamma=0)).optimizer_seconds
    assert without == pytest.approx((40 * 45_911_076 + 28 * 28_864_129) / 4800e9)


def test_a_measured_rate_decides_alone_and_scales_the_parts() -> None:
    plan = planned(images_per_second=20.0)
    assert plan.compute_seconds(4) == pytest.approx(0.2)
    assert plan.scale * plan.image_seconds == pytest.approx(1 / 20)
    assert planned().scale == 1


@pytest.mark.parametrize(
    ("card", "precision", "half"),
    [("h200", "auto", True), ("h200", "fp32", False), ("v100", "auto", False), ("v100", "bf16", False)],
)
def test_bf16_where_the_card_has_it(card: str, precision: Literal["auto", "fp32", "bf16"], half: bool) -> None:
    plan = planned(card, TrainConfig(precision=precision))
    assert plan.half is half
    assert plan.product_rate == pytest.approx(
        1e12 * plan.card.product_share * (plan.card.half_tflops if half else plan.card.fp32_tflops)
    )
    assert plan.memory(4).generator_update < planned("v100").memory(4).generator_update or not half


def test_a_measured_rate_of_fp32_products_holds_for_r1_too() -> None:
    plan = planned(train=TrainConfig(precision="fp32"), product_tflops=30.0)
    assert plan.exact_rate == plan.product_rate == 30e12
    assert planned(product_tflops=800.0).exact_rate == pytest.approx(67e12 * 0.7)


def test_a_smaller_card_needs_more_accumulation() -> None:
    assert planned().fitting(32) == 1
    small = planned("l4").fitting(32)
    assert small is not None and small > 1
    assert replace(planned(), card=replace(CARDS["l4"], memory_gb=2)).fitting(32) is None


def test_every_card_makes_sense() -> None:
    for name, card in CARDS.items():
        assert card.name == name
        assert card.half_tflops > card.fp32_tflops > 0 and 0 < card.product_share <= 1
        assert card.memory_gb < card.bandwidth_gb and card.usd_per_hour > 0 and card.per_node >= 1
