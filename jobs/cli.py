"""The command line that every job shares.

    python -m jobs.NAME --config PRESET_OR_FILE [key=value ...] [--dry-run]

A job calls `parse(__doc__)` and gets its validated config; a config that cannot be used ends the process with
code 2 and one message. `--help` shows the job's own text and every setting.
"""

import argparse
import contextlib
import difflib
import functools
import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, ParamSpec

from pipeline import fields
from pipeline.config import Config, ConfigError, describe_fields, load_config, preset_names, to_yaml

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
P = ParamSpec("P")


class _Parser(argparse.ArgumentParser):
    def __init__(self, doc: str, prog: str) -> None:
        super().__init__(prog=prog, add_help=True, allow_abbrev=False)
        self.doc = doc.strip()

    def format_help(self) -> str:
        return f"{self.doc}\n\n{super().format_help()}\n{settings_help(_width())}\n"

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")

    def options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def parse(
    doc: str | None,
    argv: Sequence[str] | None = None,
    extra: Callable[[argparse.ArgumentParser], object] | None = None,
    *,
    default: str | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Reads a job's command line.

    Args:
        doc: the job's docstring, the top of `--help`.
        argv: the arguments; None takes the process's.
        extra: adds the job's own options and positionals; positionals stand before the overrides. An option
            `--space` names a search space and is read into the `tune` section.
        default: the config where `--config` is not given; None makes it required, empty text is the bare defaults.

    Returns:
        The config, and the arguments: `dry_run`, `config`, `overrides` and those of `extra`. With `--dry-run`
        the resolved config is printed already; the job adds its summary and does nothing else.

    Ends the process with code 2 and a message on stderr when the command line or the config cannot be used.
    """
    parser = _Parser(doc or "", prog=_program())
    names = ", ".join(preset_names())
    config_help = f"a preset ({names}) or a YAML file" + (f"; {default} unless given" if default else "")
    parser.add_argument("--config", metavar="PRESET_OR_FILE", default=default, help=config_help)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    if extra is not None:
        extra(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one setting; all are listed below")

    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0], parser.options(), n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the options; settings are written key=value"
        parser.error(f"unknown option {unknown[0]}: {hint}")
    if args.config is None:
        parser.error(f"--config is missing: expected a YAML file or one of {names}")
    try:
        config = load_config(args.config or None, args.overrides, space=getattr(args, "space", None))
    except ConfigError as error:
        parser.error(_as_message(error))
    if args.dry_run:
        print(to_yaml(config), end="", flush=True)
    return config, args


def failing_clearly(main: Callable[P, None]) -> Callable[P, None]:
    """Decorates a job's `main`: errors that this project explains become one message, without a traceback.

    The process ends with code 2 for a config that cannot be used, 1 for other failures, 130 after Ctrl-C.
    Errors of other kinds are defects, and keep their traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except KeyboardInterrupt as stop:
            _end(INTERRUPTED, "; ".join(["interrupted", *map(str, stop.args)]))
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("pipeline", "jobs"):
                raise
            _end(USAGE_ERROR if isinstance(error, ConfigError) else FAILURE, _as_message(error))

    return wrapped


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """Around work that the same command takes up again: the message after Ctrl-C says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where it was") from None


def _as_message(error: Exception) -> str:
    lines = str(error).splitlines()
    if len(lines) > 1 and isinstance(error, ConfigError):
        return "\n  ".join(["the config cannot be used", *lines])
    return str(error)


def _end(code: int, message: str) -> NoReturn:
    print(f"{_program()}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def settings_help(width: int) -> str:
    """Every setting by section: key, default, type and help, wrapped to `width` columns."""
    lines, section = [], None
    for key, kind, default, text in describe_fields():
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines += ["", f"{section}: {_section_doc(section)}"]
        lines.append(f"  {key} = {_as_typed(default)}    ({kind})")
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(["settings, with their defaults:", *lines])


def _section_doc(name: str) -> str:
    section = fields.section_of(Config.model_fields[name].annotation)
    return inspect.cleandoc(section.__doc__ or "").partition("\n")[0] if section else ""


def _as_typed(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "(empty)" if value is None else str(value)


def _width() -> int:
    return max(60, min(110, shutil.get_terminal_size((100, 24)).columns))


def _program() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name if spec is not None and spec.name.startswith("jobs.") else "jobs.NAME"
    return f"python -m {name}"
