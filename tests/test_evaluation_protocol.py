"""Protocols: what a distance depends on, and which distances may be compared."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.evaluation.protocol import (
    EvaluateConfig,
    Protocol,
    ProtocolMismatch,
    Result,
    make_protocol,
    real_indices,
)

PROTOCOL = make_protocol(EvaluateConfig(images=100, input_size=64), "a" * 64, "d" * 64, 1000)
OTHER: dict[str, Any] = {
    "network": "inception",
    "weights_sha256": "b" * 64,
    "resize": "bicubic",
    "input_size": 96,
    "images": 200,
    "real_images": 500,
    "dataset": "e" * 64,
    "truncation": 0.7,
    "precision": "bf16",
    "seed": 1,
    "quick": False,
    "views": "random 8 of 10x10",
}


def test_the_protocol_is_resolved_from_config_weights_and_data() -> None:
    assert PROTOCOL.to_dict() == {
        "network": "efficientnet-lite0",
        "weights_sha256": "a" * 64,
        "resize": "bilinear, antialiased",
        "input_size": 64,
        "images": 100,
        "real_images": 1000,
        "dataset": "d" * 64,
        "truncation": 1.0,
        "precision": "fp32",
        "seed": 0,
        "quick": True,
    }


@pytest.mark.parametrize(
    ("settings", "size", "quick"),
    [({}, 224, False), ({"input_size": 224}, 224, False), ({"input_size": 223}, 223, True)],
)
def test_only_an_input_below_the_native_size_is_quick(settings: dict, size: int, quick: bool) -> None:
    protocol = make_protocol(EvaluateConfig(**settings), "a" * 64, "d", 10)
    assert (protocol.input_size, protocol.quick) == (size, quick)


def test_networks_have_metrics_of_their_own() -> None:
    inception = make_protocol(EvaluateConfig(network="inception"), "a" * 64, "d", 10)
    assert (inception.metric, inception.input_size, inception.quick) == ("fid", 299, False)
    assert PROTOCOL.metric == "fd_efficientnet_lite0"


def test_every_field_changes_the_digest_and_is_named_when_it_differs() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(Protocol)}
    digests = {PROTOCOL.digest()}
    for name, value in OTHER.items():
        changed = dataclasses.replace(PROTOCOL, **{name: value})
        digests.add(changed.digest())
        assert PROTOCOL.differing(changed) == [name]
        with pytest.raises(ProtocolMismatch, match=rf"cannot be compared \({name}: "):
            Result(1.0, PROTOCOL).better_than(Result(2.0, changed))
    assert len(digests) == 1 + len(OTHER)


def test_the_digest_does_not_change_between_versions() -> None:
    # Registered models are compared by it for years: a change here makes every one of them incomparable.
    assert PROTOCOL.digest() == "448cd6f57e42768cfa895d9d5bead2b01ac91a9d8f7448102a2bd2a989efb8ec"


def test_better_is_lower_and_not_equal() -> None:
    assert Result(1.0, PROTOCOL).better_than(Result(2.0, PROTOCOL))
    assert not Result(2.0, PROTOCOL).better_than(Result(2.0, PROTOCOL))


def test_real_statistics_depend_on_the_real_side_alone() -> None:
    generated: dict[str, Any] = {"images": 7, "truncation": 0.5, "precision": "bf16", "seed": 9}
    assert dataclasses.replace(PROTOCOL, **generated).real_key() == PROTOCOL.real_key()
    for name in OTHER.keys() - generated.keys() - {"quick"}:
        assert dataclasses.replace(PROTOCOL, **{name: OTHER[name]}).real_key() != PROTOCOL.real_key(), name


def test_results_survive_json_and_tags_of_text() -> None:
    result = Result(12.5, PROTOCOL)
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert Protocol.from_dict({name: str(value) for name, value in PROTOCOL.to_dict().items()}) == PROTOCOL
    with pytest.raises(ProtocolMismatch, match="lacks seed"):
        Protocol.from_dict({name: value for name, value in PROTOCOL.to_dict().items() if name != "seed"})


def test_the_description_says_what_matters_in_one_line() -> None:
    line = PROTOCOL.describe()
    for part in (
        "fd_efficientnet_lite0",
        "100 generated",
        "1,000 real",
        "at 64",
        "quick",
        PROTOCOL.digest()[:12],
    ):
        assert part in line
    assert "\n" not in line


def test_too_few_real_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"real_images is 50, but the data set has 40"):
        make_protocol(EvaluateConfig(real_images=50), "a", "d", 40)
    with pytest.raises(ValueError, match="at least 2 real"):
        make_protocol(EvaluateConfig(), "a", "d", 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "inception", "input_size": 128}, "resizes to 299 by itself"),
        ({"weights": "x.pt"}, "brings its own"),
        ({"weights_sha256": "a" * 64}, "brings its own"),
        ({"weights_sha256": "A"}, "weights_sha256"),
        ({"images": 1}, "images"),
        ({"imagse": 10}, "imagse"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluateConfig.model_validate(settings)


@given(st.integers(2, 10**6), st.data())
def test_real_pictures_are_spread_evenly(samples: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, min(samples, 2000)))
    chosen = real_indices(samples, count)
    steps = np.diff(chosen)
    assert chosen.dtype == np.int64 and len(chosen) == count and chosen[0] == 0 and chosen[-1] < samples
    assert steps.min() >= samples // count and steps.max() <= -(-samples // count)


def test_all_real_pictures_are_all_of_them() -> None:
    assert np.array_equal(real_indices(7, 7), np.arange(7))
