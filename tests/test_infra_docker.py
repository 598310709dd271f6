"""infra/docker/: what the image is made of. That it builds was not tested: it takes a docker daemon and a registry."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.infra import ROOT

PATHS = [ROOT / "infra/docker/Dockerfile", ROOT / "infra/services/Dockerfile"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
each_image = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.parent.name)


def instructions(text: str) -> list[tuple[str, str]]:
    """Instructions with their arguments, comments gone and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def installs(text: str) -> list[list[str]]:
    """The words of each `pip install`."""
    runs = " && ".join(rest for word, rest in instructions(text) if word == "RUN")
    return [command.split()[2:] for command in re.split(r"&&|;", runs) if command.split()[:2] == ["pip", "install"]]


@each_image
def test_its_python_is_the_tested_one(path: Path) -> None:
    (base,) = [rest for word, rest in instructions(path.read_text()) if word == "FROM"]
    found = re.fullmatch(r"python:(3\.\d+)-slim-bookworm", base)
    assert found is not None, base
    wanted = f"{sys.version_info.major}.{sys.version_info.minor}"
    if found[1] != wanted:
        pytest.skip(f"these tests run with Python {wanted}, the image's is {found[1]}")
    assert PROJECT["requires-python"] == f">={found[1]}"


def test_dependencies_are_pyprojects_own_list() -> None:
    """The image installs an extra by its name, so there is no second list to fall behind."""
    first, second = installs(PATHS[0].read_text())
    assert first == ["-c", "constraints.txt", "'.[all]'"]
    assert second == ["--no-deps", "."]
    assert "all" in PROJECT["optional-dependencies"]


def test_the_services_install_what_their_extras_name() -> None:
    """Without the project itself, which would bring torch: so its list is a second one, held to the first here."""
    (words,) = installs(PATHS[1].read_text())
    assert words[:2] == ["-c", "/opt/services/constraints.txt"]
    named = {word.strip("'") for word in words[2:]}
    extras = [re.match(r"[^<>=;\s]+", text) for name in ("tracking", "services") for text in extra(name)]
    of_runs = {"psutil", "nvidia-ml-py"}  # measure the machine that trains
    assert named == {match[0] for match in extras if match} - of_runs | {"pyarrow"}  # bucket.py's


def extra(name: str) -> list[str]:
    return PROJECT["optional-dependencies"][name]


@each_image
def test_nothing_runs_as_root(path: Path) -> None:
    words = instructions(path.read_text())
    (user,) = [rest for word, rest in words if word == "USER"]
    assert user != "root"
    assert re.search(rf"useradd --create-home --uid 1000 {user}\b", path.read_text())
    after = [word for word, _ in words[words.index(("USER", user)) :]]
    assert "COPY" not in after and after.count("RUN") == 1, "after USER only the check that the image works"


@each_image
def test_no_secret_and_no_cache_goes_in(path: Path) -> None:
    text = path.read_text()
    assert not any(word in ("ARG", "ADD") for word, _ in instructions(text)), "what is built in stays in"
    variables = " ".join(rest for word, rest in instructions(text) if word == "ENV")
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", variables)
    assert "PIP_NO_CACHE_DIR=1" in variables
    assert "apt-get install" not in text or "rm -rf /var/lib/apt/lists/*" in text


@each_image
def test_only_named_files_reach_the_build(path: Path) -> None:
    ignored = path.with_name("Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_through = {rule[1:] for rule in rules if rule.startswith("!")}
    copies = [rest.split() for word, rest in instructions(path.read_text()) if word == "COPY"]
    assert {name for words in copies for name in words[:-1]} == let_through
    assert all((ROOT / name).exists() for name in let_through)


def test_kubernetes_finds_its_probes_program() -> None:
    """KubeRay's own liveness probes call wget."""
    assert re.search(r"apt-get install .*\bwget\b", " ".join(rest for _, rest in instructions(PATHS[0].read_text())))
