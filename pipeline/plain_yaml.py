"""YAML read and written with the scalars of YAML 1.2, so that what one types is what one gets.

PyYAML follows YAML 1.1, where `noise: off` is false, `1e-3` text, `1:30` ninety and `2026-01-01` a date.
Here true, false, null, integers and numbers are themselves and everything else is text; a key that stands
twice in one mapping is an error instead of the last one winning silently.
"""

import re
from typing import Any

import yaml

_SCALARS = (
    ("tag:yaml.org,2002:null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+(?:_[0-9]+)*", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", mark)
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    # Its own copy, added to: text is quoted where YAML 1.1 or 1.2 would read something else.
    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=not mapping)

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Line breaks and control characters are escaped: PyYAML loses some of them elsewhere.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


def _construct_integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))  # decimal, also with leading zeros: 010 is ten


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Dumper.add_representer(str, _represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_integer)


def parse(text: str) -> Any:
    """Reads one YAML document; `yaml.YAMLError` (with line and column) when it is not one."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain data only


def dump(value: Any) -> str:
    """Writes plain data in the order given, mappings as blocks, lists on a line; `parse` reads it back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
