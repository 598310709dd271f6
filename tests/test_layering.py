"""Layers, overrides and what is said about bad ones, on a schema small enough to see."""

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import PositiveInt, model_validator

from pipeline.layering import ConfigError, Layer, build, merge, parse_override, put, shown
from pipeline.schema import Section


class Patch(Section):
    """A part of a part."""

    size: PositiveInt | None = None
    """K."""
    strides: list[PositiveInt] = [1]
    """Sigma."""


class Train(Section):
    """A part."""

    batch_size: PositiveInt = 32
    """Pictures."""
    rate: float = 0.5
    """Rate."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Betas."""
    noise: Literal["fixed", "off"] = "fixed"
    """Noise."""
    fast: bool = False
    """Fast."""
    patch: Patch = Patch()
    """Patches."""
    tile: Patch | None = None
    """Tiles."""


class Root(Section):
    """The whole."""

    name: str = "x"
    """Name."""
    uri: str | None = None
    """Place."""
    space: dict[str, list[Any]] = {}
    """Grid."""
    train: Train = Train()
    """Part."""

    @model_validator(mode="after")
    def _sensible(self) -> "Root":
        if self.train.batch_size == 13:
            raise ValueError("train.batch_size is 13: expected a luckier number")
        return self


def built(*overrides: str, tree: dict[str, Any] | None = None) -> Root:
    return build(Root, [Layer("in file", tree or {})], overrides)


def problem(*overrides: str, tree: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        built(*overrides, tree=tree)
    return str(caught.value)


def test_later_layers_win_key_by_key() -> None:
    layers = [
        Layer("one", {"name": "a", "train": {"rate": 1, "patch": {"size": 8, "strides": [1, 2]}}}),
        Layer("two", {"train": {"patch": {"strides": [4]}}}),
    ]
    config = build(Root, layers, ["train.rate=2"])
    assert config.name == "a"
    assert config.train.rate == 2
    assert config.train.patch == Patch(size=8, strides=[4])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.batch_size=7", "batch_size", 7),
        ("train.rate=1e-3", "rate", 0.001),
        ("train.betas=[0, 0.9]", "betas", (0.0, 0.9)),
        ("train.noise=off", "noise", "off"),
        ("train.fast=true", "fast", True),
        ("train.fast=yes", "fast", True),
        ("train.patch={size: 8}", "patch", Patch(size=8)),
        ("train.tile.size=8", "tile", Patch(size=8)),
        ("train.tile={}", "tile", Patch()),
    ],
)
def test_an_override_takes_the_type_of_its_setting(text: str, key: str, value: object) -> None:
    assert getattr(built(text).train, key) == value


def test_text_stays_the_text_it_is() -> None:
    assert built("name=2026").name == "2026"
    assert built("name=1e-3").name == "1e-3"
    assert built("name=true").name == "true"
    assert built("name=").name == ""
    assert built("name=a=b: c").name == "a=b: c"
    assert built("uri=007").uri == "007"
    assert built("name=a #b").name == "a #b"
    assert built("name='a b'").name == "a b"
    assert built("uri=", tree={"uri": "x"}).uri is None


def test_an_optional_section_can_be_taken_away() -> None:
    assert built("train.tile=", tree={"train": {"tile": {"size": 4}}}).train.tile is None


def test_overriding_a_section_keeps_its_other_keys() -> None:
    train = built("train={rate: 2}", tree={"train": {"batch_size": 8, "patch": {"size": 4}}}).train
    assert (train.rate, train.batch_size, train.patch.size) == (2.0, 8, 4)


def test_a_mapping_setting_is_replaced_by_files_and_added_to_by_overrides() -> None:
    tree = {"space": {"train.rate": [1]}}
    assert build(Root, [Layer("a", tree), Layer("b", {"space": {"name": ["y"]}})]).space == {"name": ["y"]}
    config = built("space.train.batch_size=[4, 8]", "space.name=[z]", tree=tree)
    assert config.space == {"train.rate": [1], "train.batch_size": [4, 8], "name": ["z"]}


def test_an_empty_section_of_a_file_is_its_defaults() -> None:
    assert built(tree={"train": None}) == Root()
    assert built(tree={"train": {"patch": None}}) == Root()


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("train.batchsize", "did you mean train.batch_size?"),
        ("trian.batch_size", "did you mean train.batch_size?"),
        ("batch_size", "did you mean train.batch_size?"),
        ("train.patch.stride", "did you mean train.patch.strides?"),
        ("train.patch.size.x", "did you mean train.patch.size?"),
        ("zzz", "--help lists the keys"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(key: str, answer: str) -> None:
    assert problem(f"{key}=3") == f"unknown key {key}: {answer} (on the command line)"


def test_an_unknown_key_of_a_file_says_so_too() -> None:
    text = problem(tree={"train": {"batchsize": 3, "patch": {"sizes": 4}}})
    assert "unknown key train.batchsize: did you mean train.batch_size? (in file)" in text
    assert "unknown key train.patch.sizes: did you mean train.patch.size? (in file)" in text
    assert "nest it: train: {rate: ...}" in problem(tree={"train.rate": 3})
    assert "unknown key 3" in problem(tree={3: 4})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("train.batch_size=many", 'train.batch_size is "many": expected a whole number'),
        ("train.batch_size=2.5", "train.batch_size is 2.5: expected a whole number"),
        ("train.batch_size=0", "train.batch_size is 0: expected a number greater than 0"),
        ("train.batch_size=", "train.batch_size is empty: expected a whole number"),
        ("train.rate=.inf", "train.rate is Infinity: expected a finite number"),
        ("train.rate=fast", 'train.rate is "fast": expected a number'),
        ("train.noise=maybe", "train.noise is \"maybe\": expected 'fixed' or 'off'"),
        ("train.fast=3", "train.fast is 3: expected true or false"),
        ("train.patch.strides=3", "train.patch.strides is 3: expected a list such as [1, 2]"),
        ("train.patch.strides=[1, x]", 'train.patch.strides[1] is "x": expected a whole number'),
        ("train.betas=[1, 2, 3]", "train.betas is [1, 2, 3]: expected a list of at most 2 items"),
        ("train=3", "train is 3: expected a section, with keys such as train.batch_size"),
        ("space=3", "space is 3: expected keys with values"),
        ("name=null", "name is empty: expected text"),
    ],
)
def test_a_bad_value_is_told_with_its_key_the_value_and_what_was_expected(text: str, answer: str) -> None:
    assert problem(text) == f"{answer} (on the command line)"


def test_the_origin_is_the_layer_that_wrote_the_value() -> None:
    assert problem("train.rate=1", tree={"train": {"batch_size": "x"}}).endswith("(in file)")
    assert problem("train.batch_size=y", tree={"train": {"batch_size": "x"}}).endswith("(on the command line)")


def test_all_problems_are_told_at_once() -> None:
    lines = problem("train.batchsize=3", "train=4", "nothing", tree={"nmae": 1}).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "unknown key nmae",
        "unknown key train.batchsize",
        "train is 4",
        "override 'nothing'",
    ]
    assert len(problem("train.rate=x", "train.batch_size=y").splitlines()) == 2


def test_what_a_validator_says_is_passed_on() -> None:
    assert problem("train.batch_size=13") == "train.batch_size is 13: expected a luckier number"


@pytest.mark.parametrize(
    "key",
    [
        "aws_secret_access_key",
        "train.password",
        "train.patch.token",
        "train.access_key",
        "space.api_key",
        "x.credentials",
    ],
)
def test_secrets_are_refused_and_not_repeated(key: str) -> None:
    text = problem(f"{key}=hunter2")
    assert f"{key} looks like a secret" in text
    assert "AWS_ACCESS_KEY_ID" in text
    assert "hunter2" not in text


def test_a_password_inside_an_address_is_refused_too() -> None:
    for text in (problem("uri=http://me:hunter2@host/x"), problem(tree={"uri": "s3://me:hunter2@bucket"})):
        assert "uri holds a password" in text
        assert "hunter2" not in text
    assert built("uri=http://host:5000/a@b").uri == "http://host:5000/a@b"


def test_a_secret_in_a_nested_mapping_of_a_file_is_refused() -> None:
    assert "train.storage.secret" in problem(tree={"train": {"storage.secret": 1}})
    assert "space.secret_key looks like a secret" in problem(tree={"space": {"secret_key": [1]}})


def test_an_override_without_value_is_explained() -> None:
    for text in ("train.rate", "=3"):
        with pytest.raises(ConfigError, match="expected key=value"):
            parse_override(Root, text)


TREES = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=3),
        "space": st.dictionaries(st.sampled_from("ab"), st.lists(st.integers(), max_size=2), max_size=2),
        "train": st.fixed_dictionaries(
            {},
            optional={
                "rate": st.floats(0, 1),
                "patch": st.fixed_dictionaries({}, optional={"size": st.integers(1, 9)}),
            },
        ),
    },
)


@given(TREES, TREES, TREES)
def test_merging_is_associative_and_changes_none_of_its_arguments(a: dict, b: dict, c: dict) -> None:
    before = repr((a, b, c))
    assert merge(Root, merge(Root, a, b), c) == merge(Root, a, merge(Root, b, c))
    assert merge(Root, a, {}) == a
    assert merge(Root, {}, a) == a
    assert repr((a, b, c)) == before


@given(TREES, st.floats(0, 1))
def test_put_changes_one_value_of_a_copy(tree: dict, rate: float) -> None:
    before = repr(tree)
    changed = put(Root, tree, "train.rate", rate)
    assert repr(tree) == before
    assert changed["train"]["rate"] == rate
    assert build(Root, [Layer("", changed)]) == build(Root, [Layer("", tree)], [f"train.rate={rate!r}"])


def test_long_values_are_cut() -> None:
    assert len(shown("x" * 1000)) == 80
    assert shown(None) == "empty"
