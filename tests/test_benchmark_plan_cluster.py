"""Clusters of any size: shares, networks, what binds, cost and checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.benchmark.plan_cards import CARDS
from pipeline.benchmark.plan_cluster import LINK_SHARE, checkpoint_of, link_bytes, reduce_seconds, ring_seconds, row
from pipeline.models.build import ModelConfig
from pipeline.storage import StorageConfig
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.settings import TrainConfig
from pipeline.training.state import build_state
from tests.plans import planned
from tests.small import SMALL_MODEL, small_train

PAPER = planned()


@given(st.integers(1, 10))
def test_cost_follows_from_speed(power: int) -> None:
    one = row(PAPER, 2**power)
    assert one.hours == pytest.approx(one.total_images / one.images_per_second / 3600)
    assert one.usd == pytest.approx(3.0 * one.gpu_hours) and one.gpu_hours == pytest.approx(2**power * one.hours)
    assert one.bytes_per_second == pytest.approx(50_000 * one.images_per_second)
    assert one.gets_per_second == pytest.approx(one.images_per_second / 100)
    assert 0 <= one.exposed_seconds <= one.reduce_seconds and 0 <= one.hidden_share <= 1


def test_one_gpu_computes_the_batch_and_reduces_nothing() -> None:
    one = row(PAPER, 1)
    assert (one.batch, one.share, one.reduce_seconds, one.binds) == (32, 32, 0, "compute")
    assert one.images_per_second == pytest.approx(32 / PAPER.compute_seconds(32))
    assert one.total_images == 25_000_000


def test_the_busiest_gpu_sets_the_pace() -> None:
    """Eight groups on five GPUs: shares of 4 and 8 pictures, as slow as four GPUs."""
    four, five, eight = (row(PAPER, gpus) for gpus in (4, 5, 8))
    assert (four.share, five.share, eight.share) == (8, 8, 4)
    assert five.compute_seconds == four.compute_seconds > eight.compute_seconds
    assert five.images_per_second < four.images_per_second * 1.001 < eight.images_per_second


def test_more_gpus_than_groups_need_a_larger_batch() -> None:
    eight, sixteen = row(PAPER, 8), row(PAPER, 16)
    assert (eight.batch, eight.binds) == (32, "compute")
    assert (sixteen.batch, sixteen.share, sixteen.binds) == (64, 4, "groups")
    assert sixteen.total_images == 25_000_000 and row(PAPER, 1024).batch == 4096


def test_what_does_not_fit_binds_memory_and_says_which_accumulation_does() -> None:
    one = row(planned("l4"), 1)
    assert one.binds == "memory" and one.fits and not one.fits_as_configured
    assert one.accumulation == planned("l4").fitting(32)
    configured = row(planned("l4", TrainConfig(accumulation=one.accumulation)), 1)
    assert configured.binds == "compute" and configured.fits_as_configured
    hopeless = row(replace(planned(), card=replace(CARDS["h200"], memory_gb=1)), 1)
    assert hopeless.binds == "memory" and not hopeless.fits and hopeless.accumulation == 8


def test_a_slow_store_binds() -> None:
    """One machine at 0.001 Gbit/s has 2.5 pictures of 50 kB a second."""
    one = row(planned(storage_gbps=0.001), 8)
    assert one.binds == "storage" and one.images_per_second == pytest.approx(2.5)
    assert row(planned(train=TrainConfig(batch_size=64), storage_gbps=0.001), 16).images_per_second == pytest.approx(5)


def test_a_slow_network_binds_between_machines_only() -> None:
    slow = planned(train=TrainConfig(batch_size=256), network_gbps=1.0)
    assert row(slow, 8).binds == "compute"
    assert row(slow, 16).binds == "network"
    assert row(slow, 16).images_per_second < row(slow, 8).images_per_second


@given(st.integers(1, 2000))
def test_a_ring_carries_less_than_twice_the_gradients(gpus: int) -> None:
    seconds = ring_seconds(1e9, gpus, 1e9)
    assert seconds == pytest.approx(2 * (gpus - 1) / gpus) and 0 <= seconds < 2


def test_the_narrowest_link_counts() -> None:
    card = CARDS["a100-40gb"]
    assert link_bytes(card, 400, 8) == LINK_SHARE * 300e9
    assert link_bytes(card, 400, 9) == LINK_SHARE * 50e9
    assert link_bytes(card, 8000, 9) == LINK_SHARE * 300e9, "no faster than within a machine"


def test_the_tables_gradient_is_never_hidden_and_the_rest_is_behind_long_passes() -> None:
    plan = PAPER
    total, exposed = reduce_seconds(plan, 8, 4)
    speed = LINK_SHARE * 450e9
    bytes_of_all = 4 * (45_911_076 + 28_864_129 * (1 + 1 / 16))
    assert total == pytest.approx(2 * 7 / 8 * bytes_of_all / speed)
    assert exposed == pytest.approx(2 * 7 / 8 * 4 * 33_554_432 / speed)
    assert reduce_seconds(plan, 8, 1e-9)[1] == pytest.approx(total), "nothing to hide behind"


def test_the_checkpoints_size_is_that_of_a_real_one(tmp_path: Path) -> None:
    train = small_train()
    plan = replace(planned(), model=SMALL_MODEL, train=train)
    state = build_state(SMALL_MODEL, train, 0, torch.device("cpu"))
    for optimizer in (state.optimizer_generator, state.optimizer_discriminator):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    state.images_seen = 8
    info = save_checkpoint(str(tmp_path), state, config={}, dataset_digest="", results=[], storage=StorageConfig())
    tensors = sum(value.nbytes for value in state.tensors().values())
    steps = 4 * sum(name.split(".")[2] == "step" for name in state.tensors() if name.startswith("adam."))
    assert checkpoint_of(plan, row(plan, 1)).bytes == tensors - steps
    assert sum(file["bytes"] for file in info.files.values()) >= tensors


def test_the_pause_is_the_copy_as_a_share_of_a_tick() -> None:
    """16 bytes for each parameter of G, 12 of D, and two mean styles."""
    plan = PAPER
    one = row(plan, 8)
    found = checkpoint_of(plan, one)
    assert found.bytes == 16 * 45_911_076 + 12 * 28_864_129 + 8 * 512
    assert found.copy_seconds == pytest.approx(found.bytes / 50e9)
    assert found.write_seconds == pytest.approx(found.bytes / 1.5e9 + found.bytes / 1.25e9)
    assert found.tick_seconds == pytest.approx(4000 / one.images_per_second)
    assert found.pause == pytest.approx(found.copy_seconds / found.tick_seconds)
    assert found.interval_seconds == pytest.approx(50 * found.tick_seconds)


def test_segments_trade_memory_for_another_forward_pass() -> None:
    keeping = row(PAPER, 1)
    again = row(planned(train=TrainConfig(recompute="segment")), 1)
    assert again.memory.peak < keeping.memory.peak
    assert 1.1 < again.compute_seconds / keeping.compute_seconds < 1.25


def test_a_model_of_any_size_is_planned() -> None:
    model = ModelConfig(size=32, width=128)
    small, large = row(replace(planned(), model=model), 8), row(PAPER, 8)
    assert small.images_per_second > 5 * large.images_per_second
