"""What is typed is what is read; what is written is read back."""

import math

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import plain_yaml

KEYS = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@given(VALUES)
@example({"noise": "off", "name": "1e-3", "date": "2026-01-01", "<<": "~", "": "", "octal": "010", "y": "0x1f"})
@example(["1_000", "1:30", ".inf", "yes", "NULL", "=", "- a", "é: x #"])
@example({"a": [{"b": 1}, []], "c": {}})
def test_what_is_written_is_read_back(value: object) -> None:
    assert plain_yaml.parse(plain_yaml.dump(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("no", "no"),
        ("1e-3", 0.001),
        ("2E5", 200000.0),
        ("-.5", -0.5),
        ("25_000", 25000),
        ("010", 10),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("", None),
        ("~", None),
        ("null", None),
        ("'1'", "1"),
        ("[1, 2.0, x]", [1, 2.0, "x"]),
        ("{a.b: [1e-3]}", {"a.b": [0.001]}),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("-x", "-x"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = plain_yaml.parse(text)
    assert read == value
    assert type(read) is type(value)


def test_infinity_is_a_number() -> None:
    assert plain_yaml.parse("-.inf") == -math.inf


def test_mappings_are_blocks_and_lists_stand_on_a_line() -> None:
    assert plain_yaml.dump({"a": {"b": [1, 2]}, "c": None}) == "a:\n  b: [1, 2]\nc: null\n"


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "x: {a: 1, a: 1}"])
def test_a_key_that_stands_twice_is_an_error(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="'a' stands twice"):
        plain_yaml.parse(text)


def test_code_is_not_run() -> None:
    with pytest.raises(yaml.YAMLError):
        plain_yaml.parse("!!python/object/apply:os.getcwd []")
