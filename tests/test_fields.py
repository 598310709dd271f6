"""Descriptions of a schema, on a schema small enough to see."""

from typing import Literal

from pydantic import Field as Limits
from pydantic import PositiveInt

from pipeline import fields, plain_yaml
from pipeline.schema import Section


class Patch(Section):
    """A part."""

    size: PositiveInt | None = None
    """K."""
    strides: list[PositiveInt] = [1, 2]
    """Sigma."""


class Tile(Section):
    """May be left out."""

    step: int = Limits(default=3, ge=1, le=9)
    """A step."""


class Root(Section):
    """The whole."""

    name: str = "x"
    """Help that
    goes on."""
    mode: Literal["a", "b"] = "a"
    """Mode."""
    betas: tuple[float, float] = (0.0, 0.5)
    """Two."""
    space: dict[str, list[int]] = {}
    """Free."""
    patch: Patch = Patch(size=4)
    """Part."""
    tile: Tile | None = None
    """Optional part."""


def test_sections_are_found_inside_optional_annotations() -> None:
    assert fields.section_of(Patch) is Patch
    assert fields.section_of(Tile | None) is Tile
    assert fields.section_of(int | None) is None
    assert fields.section_of(list[Tile]) is None


def test_leaves_are_in_the_order_of_the_schema() -> None:
    keys = [key for key, _ in fields.leaves(Root)]
    assert keys == ["name", "mode", "betas", "space", "patch.size", "patch.strides", "tile.step"]


def test_describe_tells_type_default_and_help() -> None:
    found = {field.key: field for field in fields.describe(Root)}
    assert found["name"] == ("name", "text", "x", "Help that goes on.")
    assert found["mode"].type == "a | b"
    assert found["betas"][1:3] == ("[number, number]", "[0.0, 0.5]")
    assert found["space"].type == "mapping of text to list of integer"
    # The default is the one in force, not the one of the part alone.
    assert found["patch.size"][1:3] == ("integer > 0 or empty", 4)
    assert found["patch.strides"].default == "[1, 2]"
    assert found["tile"] == ("tile", "section or empty", None, "Optional part.")
    assert found["tile.step"][1:3] == ("integer >= 1 and <= 9", 3)


def test_flatten_gives_scalars_that_an_override_reads_back() -> None:
    flat = fields.flatten(Root(patch=Patch(strides=[4]), tile=Tile(step=2)))
    assert flat == {
        "name": "x",
        "mode": "a",
        "betas": "[0.0, 0.5]",
        "space": "{}",
        "patch.size": None,
        "patch.strides": "[4]",
        "tile.step": 2,
    }
    assert plain_yaml.parse(flat["betas"]) == [0.0, 0.5]
    assert fields.flatten(Root())["tile.step"] is None
