"""What of the project's folder travels to a cluster with a job: the code, not the data, history and environments."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from pipeline.cluster.session import ClusterError

ROOT = Path(__file__).parents[2]
# In the syntax of .gitignore, and beside it: Ray leaves out what .gitignore names too, where there is one.
EXCLUDED = (
    ".git",
    ".venv",
    "venv",
    ".env",
    "__pycache__",
    "*.egg-info",
    "*.db",
    ".*_cache",
    ".hypothesis",
    "/runs",
    "/mlruns",
    "/build",
    "/dist",
)
SHOWN = 5
_QUIET = logging.getLogger(__name__)  # Ray says at each folder which .gitignore it honours


def excluded(root: Path) -> list[str]:
    """Patterns of what stays here: the known ones, and every virtual environment directly below `root`."""
    environments = sorted(f"/{path.parent.name}" for path in root.glob("*/pyvenv.cfg"))
    return [*EXCLUDED, *(name for name in environments if name.strip("/") not in EXCLUDED)]


def packed(root: Path, patterns: Sequence[str]) -> dict[str, int]:
    """The files that Ray packs, each with its bytes: its own walk, which honours .gitignore and .rayignore.

    Args:
        root: the folder that becomes the job's working directory.
        patterns: what to leave out, in the syntax of .gitignore.
    """
    files = {}

    def note(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path.stat().st_size

    root = root.absolute()
    # The same three rules as ray.job_submission's own upload.
    rules = [*ray_constants.get_runtime_env_default_excludes(), *patterns]
    honoured = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(root, [_get_excludes(root, rules)], note, include_gitignore=honoured, logger=_QUIET)
    return dict(sorted(files.items()))


def package_bytes(files: Mapping[str, int]) -> int:
    """Size of the package, an uncompressed zip: 76 bytes and its name twice for a file, 22 for the end."""
    return 22 + sum(size + 76 + 2 * len(name.encode()) for name, size in files.items())


def largest(files: Mapping[str, int], count: int = SHOWN) -> list[str]:
    """Lines with the size in MB and the name of the largest files."""
    order = sorted(files, key=lambda name: (-files[name], name))
    return [f"{files[name] / 1e6:10.2f} MB  {name}" for name in order[:count]]


def limit_bytes() -> int:
    """What a cluster's dashboard takes at most."""
    return int(ray_constants.DASHBOARD_CLIENT_MAX_SIZE)


def check_package(files: Mapping[str, int], root: Path = ROOT) -> None:
    """Raises ClusterError where there is no checkout to pack, or it is too large for Ray; names the largest files."""
    if "jobs/train.py" not in files or "pyproject.toml" not in files:
        raise ClusterError(
            f"{root} is no checkout of this project: jobs are submitted from one, for its files travel along. Where "
            "the cluster has the package installed: ray job submit --address http://HOST:8265 -- python -m jobs.JOB ..."
        )
    if package_bytes(files) >= limit_bytes():
        raise ClusterError(
            f"{root} has {len(files)} files with {package_bytes(files) / 1e6:.1f} MB to pack, and Ray takes less than "
            f"{limit_bytes() / 1e6:.1f} MB: move data elsewhere, or name it in .gitignore or .rayignore. The largest:\n"
            + "\n".join(largest(files))
        )
