"""Every job that the README shows is one that can be started so."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """The words of each `python -m jobs....` line in a code block, shell variables filled in; submit as its job."""
    variables: dict[str, str] = {}
    found = []
    for line in "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL)).splitlines():
        if match := re.match(r'([A-Z]+)="(.*)"$', line):
            variables[match[1]] = match[2]
        elif line.startswith("python -m jobs."):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            job, *arguments = shlex.split(line.removeprefix("python -m jobs."), comments=True)
            if job == "submit":
                job, option, _, *arguments = arguments
                assert option == "--address"
            found.append([job, *arguments])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_its_commands_resolve(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    job, *arguments = command
    try:
        importlib.import_module(f"jobs.{job}").main([*arguments, "--dry-run"])
    except SystemExit as ended:
        assert (job, ended.code) == ("ingest", 1), "only an ingest looks at its source, which is not here"
    assert ("kind:" if job == "benchmark" else "run:") in capsys.readouterr().out


def test_it_shows_commands_and_its_pictures_are_there() -> None:
    assert len(commands()) >= 4
    for path in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    for job in re.findall(r"`jobs\.(\w+)`", README):
        assert (ROOT / "jobs" / f"{job}.py").is_file(), job
