"""What is installed and in which versions: pyproject.toml, constraints.txt, Makefile and image."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS: dict[str, str] = {
    canonicalize_name(line.split("==")[0]): line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]


def imports_of(*folders: str) -> set[str]:
    """Top-level names that the sources import."""
    found = set()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found |= set(re.findall(r"^\s*(?:from|import) ([a-zA-Z0-9_]+)", path.read_text(), re.MULTILINE))
    return found


def test_training_without_ray_needs_few_packages() -> None:
    names = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    assert names == {
        "aiohttp", "botocore", "fsspec", "numpy", "pillow", "pyarrow", "pydantic", "pyyaml", "s3fs", "safetensors",
        "tenacity", "torch", "tqdm",
    }  # fmt: skip


def test_what_the_sources_import_is_declared() -> None:
    declared = {canonicalize_name(requirement.name) for texts in EXTRAS.values() for requirement in texts}
    declared |= {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    names = {"PIL": "pillow", "yaml": "pyyaml", "nvidia": "nvidia-dali-cuda130", "pydantic_core": "pydantic"}
    for name in sorted(imports_of("pipeline", "jobs") - set(sys.stdlib_module_names) - {"pipeline", "jobs"}):
        assert names.get(name, canonicalize_name(name)) in declared, f"{name} is imported but not declared"


@pytest.mark.parametrize("requirement", [*REQUIREMENTS, *(one for extra in EXTRAS.values() for one in extra)], ids=str)
def test_every_requirement_is_pinned_within_its_range(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    if name != canonicalize_name(PROJECT["name"]):
        assert requirement.specifier.contains(PINS[name]), f"{requirement}: the pin is {PINS[name]}"


def test_pins_are_exact_and_name_no_place() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert (PINS["torch"], PINS["ray"], PINS["mlflow"], PINS["pyarrow"]) == (
        "2.13.0",
        "2.60.0",
        "3.17.2",
        "25.0.1",
    )
    # torch's CUDA build takes no other Triton, which no machine without a GPU would notice.
    assert PINS["triton"] == {"2.13.0": "3.7.1"}[PINS["torch"]]
    assert "torchvision" not in PINS


def test_what_is_installed_is_what_is_pinned() -> None:
    installed: dict[str, str] = {
        canonicalize_name(found.metadata["Name"]): found.version
        # Not all of sys.path: setuptools adds its own copies of some packages once it is imported.
        for found in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    }
    for name in PINS.keys() & installed.keys():
        assert installed[name].split("+")[0] == PINS[name], f"{name} {installed[name]} is installed"


def test_all_brings_what_a_node_needs() -> None:
    (everything,) = EXTRAS["all"]
    assert everything.extras == {"cluster", "tracking", "dali", "turbo", "evaluation", "lmdb", "benchmark"}
    assert set(EXTRAS) == {*everything.extras, "all", "aws", "services", "test"}
    (ray,) = EXTRAS["cluster"]
    assert {"default", "train", "tune"} <= ray.extras  # `ray job submit` needs the dashboard


def test_the_wheel_holds_the_code_and_its_data_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "jobs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("pipeline", "jobs"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in names
    outside = {name for name in names if name.split("/")[0] not in ("pipeline", "jobs")}
    assert all(".dist-info/" in name for name in outside)
    assert any(name.endswith("LICENSE") for name in outside)


# ---- make and CI ---------------------------------------------------------------------------------


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables})


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_alone_lists_its_targets() -> None:
    done = make()
    assert done.returncode == 0
    for target in ("demo", "test", "lint", "help"):
        assert f"make {target} " in done.stdout


@needs_make
def test_make_test_is_lint_types_and_tests() -> None:
    plan = make("--dry-run", "test", "--old-file=.venv/.installed").stdout
    for tool in ("ruff check .", "ruff format --check .", "mypy", "pytest"):
        assert f"python -m {tool}" in plan
    assert "python -m jobs.demo" in make("--dry-run", "demo", "--old-file=.venv/.installed").stdout


@needs_make
def test_an_interpreter_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("lint", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"Python 3.11 or newer is needed, and {old} is not" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_both_halves_of_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    assert script.read_text().endswith("\nmake test\nmake test-cluster\n")


@needs_make
def test_the_two_halves_are_all_tests() -> None:
    marks = {}
    for target in ("test", "test-cluster"):
        plan = make("--dry-run", target, "--old-file=.venv/.installed").stdout
        (line,) = [line for line in plan.splitlines() if " -m pytest " in line]
        assert "--durations=15" in line  # slow ones are seen
        marks[target] = shlex.split(line.split(" -m pytest ")[1])[1]
    assert marks == {"test": "not cluster", "test-cluster": "cluster"}


def test_tests_that_start_ray_are_marked() -> None:
    """They run in the half that has the time for it. A fault in a mark shows here, not as a `make test` of an hour."""
    starts = re.compile(
        r"\b(ray_nodes\(|ray_cluster\(|ray\.init\(|run_on_ray\(|cluster_utils|ray_session\(|ray_address: str\b)"
    )
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if starts.search(text) and path != Path(__file__):
            assert "pytest.mark.cluster" in text, f"{path.name} starts Ray: mark it cluster"


# ---- image ---------------------------------------------------------------------------------------


def test_the_image_copies_only_what_exists_and_is_let_through() -> None:
    dockerfile = (ROOT / "infra/docker/Dockerfile").read_text()
    let_through = {
        line[1:] for line in (ROOT / "infra/docker/Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for name in line.split()}
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)
    assert "-c constraints.txt" in dockerfile
    assert re.search(r"^USER ray$", dockerfile, re.MULTILINE)
