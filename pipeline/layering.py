"""Layers of plain data (defaults, preset, file, command line) to one validated `Section`; pure functions.

Nothing here knows a particular key: the root class says what exists. All problems of all layers are told in
one `ConfigError`, each on a line with the dotted key, the value, what was expected and where it was written.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pipeline import plain_yaml
from pipeline.fields import leaves, optional, section_of
from pipeline.schema import Section

S = TypeVar("S", bound=Section)
Tree = dict[str, Any]

COMMAND_LINE = "on the command line"
SECRET_KEY = re.compile(r"secret|passw(or)?d|passphrase|token|credential|(access|api|private)[_-]?key", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"^[a-z][a-z0-9+.-]*://[^/@\s]*:[^/@\s]+@", re.IGNORECASE)
_SECRET_FIX = (
    "secrets come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD, "
    "...) or from an instance role, never from a config"
)
_WANTED = (
    (r"Input should be a valid boolean", "true or false"),
    (r"Input should be a valid integer", "a whole number"),
    (r"Input should be a valid number", "a number"),
    (r"Input should be a valid string", "text (write numbers and true, false and null in quotes)"),
    (r"Input should be a valid (list|tuple)", "a list such as [1, 2]"),
    (r"Input should be a valid dictionary", "keys with values"),
    (r"Input should be ((?:greater|less).*)", r"a number \1"),
    (r"Input should be (.*)", r"\1"),
    (r"String should match pattern (.*)", r"text that matches \1"),
    (r"String should have (.* characters?)", r"text of \1"),
    (r"(?:List|Tuple) should have (.* items?)", r"a list of \1"),
    (r"Field required", "a value"),
)


class ConfigError(ValueError):
    """A config that cannot be used; the text names each key, value, expectation and origin."""


class Layer(NamedTuple):
    """One source of values: `origin` says in errors where a value was written."""

    origin: str
    tree: Mapping[str, Any]


# ---- trees and dotted keys -----------------------------------------------------------------------


def merge(root: type[Section], base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Lays `over` on `base`: sections key by key; any other value, a mapping too, is replaced whole."""
    merged = dict(base)
    for name, value in over.items():
        section = section_of(root.model_fields[name].annotation) if name in root.model_fields else None
        if section is not None and isinstance(value, Mapping):
            below = merged.get(name)
            merged[name] = merge(section, below if isinstance(below, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged


def put(root: type[Section], tree: Mapping[str, Any], key: str, value: Any) -> Tree:
    """A copy of the tree with the value at a dotted key.

    Inside a mapping-valued setting the rest of the key is one key: `tune.space.train.r1_gamma` is the entry
    `train.r1_gamma` of `tune.space`.
    """
    name, _, rest = key.partition(".")
    field = root.model_fields.get(name)
    section = section_of(field.annotation) if field is not None else None
    below = tree.get(name)
    below = below if isinstance(below, Mapping) else {}
    if not rest:
        if section is not None and isinstance(value, Mapping):
            value = merge(section, below, value)
        return {**tree, name: value}
    if section is not None:
        return {**tree, name: put(section, below, rest, value)}
    if field is not None and _mapping_valued(field):
        return {**tree, name: {**below, rest: value}}
    return {**tree, key: value}  # an unknown key, left whole so that the error names it as it was written


def _mapping_valued(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is dict


def parse_override(root: type[Section], text: str) -> tuple[str, Any]:
    """Splits `a.b.c=value`; the value is YAML, but stays the text it is where the setting holds text."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {text!r}: expected key=value, for example train.batch_size=32")
    try:
        value = plain_yaml.parse(raw)
    except yaml.YAMLError:
        value = raw
    field = dict(leaves(root)).get(key)
    kinds = set(get_args(field.annotation) or (field.annotation,)) if field is not None else {None}
    quoted = isinstance(value, str) and raw.strip()[:1] in ("'", '"')
    if kinds <= {str, type(None)} and value is not None and not quoted:
        value = raw.strip()  # run.name=2026 is a name, and s3://a: b an address
    if kinds == {str} and not raw.strip():
        value = ""
    return key, value


# ---- checking ------------------------------------------------------------------------------------


def problems_of(root: type[Section], layer: Layer) -> list[str]:
    """What is wrong with one layer's keys: unknown ones, secrets, a value where a section belongs."""
    known = [key for key, _ in leaves(root)]
    return [f"{problem} ({layer.origin})" for problem in _key_problems(root, layer.tree, "", known)]


def _key_problems(root: type[Section], tree: Mapping[str, Any], prefix: str, known: Sequence[str]) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if SECRET_KEY.search(key):
            yield f"{key} looks like a secret: {_SECRET_FIX}"
        elif isinstance(value, str) and _SECRET_VALUE.match(value):
            yield f"{key} holds a password inside an address: {_SECRET_FIX}"
        elif not isinstance(name, str) or name not in root.model_fields:
            yield f"unknown key {key}: {_suggestion(key, known)}"
        else:
            field = root.model_fields[name]
            section = section_of(field.annotation)
            if section is not None and isinstance(value, Mapping):
                yield from _key_problems(section, value, f"{key}.", known)
            elif section is not None and value is not None:
                example = f"{key}.{next(iter(section.model_fields))}"
                yield f"{key} is {shown(value)}: expected a section, with keys such as {example}"
            elif isinstance(value, Mapping):
                yield from (
                    f"{key}.{inner} looks like a secret: {_SECRET_FIX}"
                    for inner in value
                    if SECRET_KEY.search(str(inner))
                )


def _suggestion(key: str, known: Sequence[str]) -> str:
    if key in known:
        parts = key.split(".")
        return f"nest it: {parts[0]}: {{{'.'.join(parts[1:])}: ...}}"
    same_leaf = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or same_leaf[:1]
    return f"did you mean {near[0]}?" if near else "--help lists the keys"


def shown(value: Any) -> str:
    """A value as one would type it, cut to a readable length."""
    text = "empty" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def build(root: type[S], layers: Sequence[Layer], overrides: Sequence[str] = ()) -> S:
    """Lays later layers over earlier ones, overrides on top, and validates the whole.

    Args:
        overrides: `a.b.c=value` each; one inside a mapping-valued setting adds to it.

    Raises:
        ConfigError: with all problems.
    """
    problems = [problem for layer in layers for problem in problems_of(root, layer)]
    entries: list[tuple[str, Any]] = []
    for text in overrides:
        try:
            entries.append(parse_override(root, text))
            problems += problems_of(root, Layer(COMMAND_LINE, put(root, {}, *entries[-1])))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    tree: Tree = {}
    for layer in layers:
        tree = merge(root, tree, _without_empty_sections(root, layer.tree))
    last = Layer(COMMAND_LINE, {})
    for key, value in entries:
        last = Layer(last.origin, put(root, last.tree, key, value))
        tree = _without_empty_sections(root, put(root, tree, key, value))
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(root, error, [*layers, last]))) from None


def _without_empty_sections(root: type[Section], tree: Mapping[str, Any]) -> Tree:
    """Drops `train:` with nothing under it, as a file has where all its keys are commented out."""
    cleaned: Tree = {}
    for name, value in tree.items():
        field = root.model_fields[name]
        section = section_of(field.annotation)
        if section is not None and isinstance(value, Mapping):
            cleaned[name] = _without_empty_sections(section, value)
        elif section is None or optional(field):
            cleaned[name] = value
    return cleaned


def _explain(root: type[Section], error: ValidationError, layers: Sequence[Layer]) -> list[str]:
    """One line per value; the alternatives of a union stand on the same line."""
    lines: list[str] = []
    expected: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for item in error.errors(include_url=False):
        key, index = _key_of(root, item["loc"])
        origin = origin_of(key, layers)
        place = f" ({origin})" if origin else ""
        if item["type"] in ("value_error", "assertion_error"):
            text = str(item["ctx"]["error"])
            lines.append((text if not key or key in text else f"{key}: {text}") + place)
        else:
            wanted = "text" if item["type"] == "string_type" and item["input"] is None else _wanted(item["msg"])
            expected.setdefault(key + index + place, []).append(wanted)
            values[key + index + place] = item["input"]
    for named, nouns in expected.items():
        key, _, place = named.partition(" ")
        alternatives = " or ".join(dict.fromkeys(nouns))
        lines.append(f"{key} is {shown(values[named])}: expected {alternatives}" + (place and f" {place}"))
    return lines


def _wanted(message: str) -> str:
    """What pydantic's message asks for, as a noun."""
    for pattern, noun in _WANTED:
        if found := re.match(pattern, message):
            return found.expand(noun)
    return message[0].lower() + message[1:]


def _key_of(root: type[Section], location: Sequence[int | str]) -> tuple[str, str]:
    """The dotted key of a pydantic location and the place in a list, without the names of union branches."""
    names, section = [], root
    for part in location:
        if not isinstance(part, str) or part not in section.model_fields:
            break
        names.append(part)
        below = section_of(section.model_fields[part].annotation)
        if below is None:
            break
        section = below
    return ".".join(names), "".join(f"[{part}]" for part in location if isinstance(part, int))


def origin_of(key: str, layers: Sequence[Layer]) -> str | None:
    """Where the value of a dotted key was last written."""
    for layer in reversed(layers):
        value: Any = layer.tree
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
        else:
            return layer.origin
    return None
