"""What a `Section` class holds: dotted keys, types, defaults and help; pure functions of the class."""

import json
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.schema import Section

_PLAIN_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "anything"}
_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


class Field(NamedTuple):
    """One documented setting."""

    key: str
    type: str
    default: Any
    help: str


def section_of(annotation: Any) -> type[Section] | None:
    """The Section class that an annotation such as `PatchConfig | None` holds, if it holds one."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    found = [
        section_of(part) for part in get_args(annotation) if get_origin(annotation) in (Union, UnionType, Annotated)
    ]
    return next((section for section in found if section is not None), None)


def leaves(root: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every (dotted key, field) that holds a value, in the order of the schema."""
    for name, field in root.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield prefix + name, field
        else:
            yield from leaves(section, f"{prefix}{name}.")


def describe(root: type[Section], defaults: Section | None = None, prefix: str = "") -> list[Field]:
    """Every setting with its type, its default and its help (the text under the field).

    A section that may be left out is listed too, before the settings it has once one of them is given.
    """
    defaults, found = defaults or root(), []
    for name, field in root.model_fields.items():
        value, text = getattr(defaults, name), " ".join((field.description or "").split())
        section = section_of(field.annotation)
        if section is None:
            kind = _type_name(field.annotation, field.metadata)
            found.append(Field(prefix + name, kind, _scalar(defaults.model_dump(mode="json")[name]), text))
        else:
            if optional(field):
                found.append(Field(prefix + name, "section or empty", None, text))
            found += describe(section, value, f"{prefix}{name}.")
    return found


def optional(field: FieldInfo) -> bool:
    """Whether the field may be empty."""
    return type(None) in get_args(field.annotation)


def _scalar(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0], [*parts[1:], *metadata])
    if origin is Literal:
        name = " | ".join(str(part) for part in parts)
    elif origin in (Union, UnionType):
        name = " or ".join(_type_name(part) for part in parts if part is not type(None))
    elif origin is list:
        name = f"list of {_type_name(parts[0])}"
    elif origin is tuple:
        name = f"[{', '.join(_type_name(part) for part in parts)}]"
    elif origin is dict:
        name = f"mapping of {_type_name(parts[0])} to {_type_name(parts[1])}"
    else:
        name = _PLAIN_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
    bounds = [
        f"{sign} {value}"
        for item in metadata
        for word, sign in _BOUNDS
        if (value := getattr(item, word, None)) is not None
    ]
    if origin not in (list, tuple, dict) and bounds:
        name += " " + " and ".join(bounds)
    return name + (" or empty" if type(None) in parts and origin in (Union, UnionType) else "")


def flatten(section: Section) -> dict[str, Any]:
    """Dotted keys to values; lists and mappings as the text that `key=TEXT` would read back."""
    tree, flat = section.model_dump(mode="json"), {}
    for key, _ in leaves(type(section)):
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        flat[key] = _scalar(value)
    return flat
