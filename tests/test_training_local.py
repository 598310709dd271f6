"""Training without Ray: only the few packages that a bare machine has."""

import pickle
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.small import small_data, small_plan

NEEDED = ("torch", "numpy", "pyarrow", "fsspec", "pillow", "pydantic", "safetensors", "tqdm")
ROOT = Path(__file__).parents[1]

SCRIPT = """
import pickle, sys
sys.path[:0] = sys.argv[2:]
from pipeline.training.local import train_here
print("images", train_here(pickle.load(open(sys.argv[1], "rb"))).images_seen)
"""


def bare_machine(folder: Path) -> Path:
    """A folder with links to the needed distributions and what they require, and to nothing else."""
    folder.mkdir()
    waiting, seen = list(NEEDED), set()
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        requirements = [Requirement(text) for text in found.requires or []]
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return folder


def test_the_loop_without_ray_needs_only_the_few_packages(tmp_path: Path) -> None:
    plan = small_plan(tmp_path / "run", small_data(tmp_path))
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    packages = bare_machine(tmp_path / "packages")
    assert not (packages / "ray").exists() and not (packages / "mlflow").exists()
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", SCRIPT, str(tmp_path / "plan"), str(ROOT), str(packages)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "images 64" in done.stdout
    assert done.stdout.count("kimg") >= 3  # a status line at 0, 32 and 64 images
