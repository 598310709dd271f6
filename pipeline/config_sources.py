"""Where configs come from: the presets and search spaces of this package, and files."""

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline import plain_yaml
from pipeline.layering import ConfigError, Layer, shown
from pipeline.storage import is_remote

PRESETS = Path(__file__).parent / "presets"


def preset_names(kind: str = ".") -> list[str]:
    """Names of the presets, or of the search spaces with `kind="spaces"`."""
    return sorted(path.stem for path in (PRESETS / kind).glob("*.yaml"))


def read_source(source: str, extending: tuple[str, ...] = ()) -> list[Layer]:
    """The layers of a preset or file, what it extends first."""
    origin, tree = read_yaml(source, ".")
    base = tree.pop("extends", None)
    if base is None:
        return [Layer(origin, tree)]
    allowed = [name for name in preset_names() if name not in (*extending, source)]
    if base not in allowed:
        raise ConfigError(f"extends is {shown(base)}: expected one of {', '.join(allowed)} ({origin})")
    return [*read_source(base, (*extending, source)), Layer(origin, tree)]


def read_yaml(source: str, kind: str) -> tuple[str, dict[str, Any]]:
    """The top-level mapping of a packaged name or a local file, with what to call it in errors."""
    is_path = source.endswith((".yaml", ".yml")) or "/" in source
    path = Path(source) if is_path else PRESETS / kind / f"{source}.yaml"
    origin = f"in {source}" if is_path else f"in {'space' if kind == 'spaces' else 'preset'} {source}"
    if is_remote(source):
        raise ConfigError(f"{source}: expected a local file; copy it here first")
    try:
        tree = plain_yaml.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(preset_names(kind))
        raise ConfigError(f"no config {source!r}: expected a path ending in .yaml, or one of {known}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {error}") from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{source} holds {shown(tree)}: expected sections such as `train:`")
    return origin, tree or {}


def absolute(uri: str) -> str:
    """A local path made absolute, `preset://NAME` found among the package's files, others as they are."""
    if uri.startswith("preset://"):
        path = PRESETS / uri.removeprefix("preset://")
        if not path.is_file():
            raise ConfigError(f"{uri}: no such file comes with the package; expected one under {PRESETS}")
        return str(path)
    if re.match(r"(?!file:)[a-z][a-z0-9+.-]*:/", uri):  # s3://..., https://..., models:/NAME@ALIAS
        return uri
    return str(Path(uri.removeprefix("file://")).expanduser().absolute())
