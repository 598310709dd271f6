"""The virtual environment of the peers: their pins clash with ours, so they never meet."""

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

DEFAULT = "~/.cache/cips-pipeline/peers"
INSTALL_DEADLINE_S = 1800.0


def ours(name: str) -> str:
    """A requirement of exactly the version that runs here: the same torch and Pillow for everybody."""
    return f"{name}=={importlib.metadata.version(name).partition('+')[0]}"


@dataclass(frozen=True)
class Group:
    """Packages that are installed together."""

    name: str
    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Installed without what they ask for."""


def shared() -> tuple[str, ...]:
    """What all peers have. Part of every installation, so that none moves another's versions."""
    return ("numpy==2.1.3", ours("torch"), ours("pillow"), "boto3==1.43.117", "s3fs==2026.9.0")


def groups() -> tuple[Group, ...]:
    """The peers' own packages, by the name of the peer's script.

    Exact versions, because a number belongs to one. MosaicML Streaming asks for torchvision, for an older
    transformers than `datasets` can live with, and for clients of clouds that are not used here.
    """
    needs = ("Brotli", "catalogue", "python-snappy", "requests", "tqdm", "transformers", "xxhash<4", "zstd")
    return (
        Group("torch_files", ()),
        Group("hugging_face", ("datasets==5.2.0",)),
        Group("web_dataset", ("webdataset==1.0.2",)),
        Group("mosaic", needs, ("mosaicml-streaming==0.13.0",)),
    )


def prepare(folder: Path, progress: bool = True) -> tuple[Path, dict[str, str]]:
    """Makes the environment, or uses what is there already.

    Returns: its Python, and for each group that could not be installed the reason.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    failed: dict[str, str] = {}
    bar = tqdm(groups(), "peers' environment", unit=" groups", disable=None if progress else True)
    for group in bar:
        bar.set_postfix_str(group.name)
        stamp = folder / f"installed-{group.name}-{_hash(group)}"
        if stamp.exists():
            continue
        try:
            install = [str(python), "-m", "pip", "install", "--quiet"]
            _run([*install, *shared(), *group.requirements])
            if group.without:
                _run([*install, "--no-deps", *group.without])
        except subprocess.SubprocessError as error:
            failed[group.name] = _reason(error)
            continue
        stamp.touch()  # only now is it complete
    return python, failed


def _run(command: list[str]) -> None:
    # What leads to our packages must not lead the peers' pip to them.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_DEADLINE_S, env=environment)


def _reason(error: subprocess.SubprocessError) -> str:
    """The last line that pip wrote as an error."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"pip did not end within {INSTALL_DEADLINE_S:.0f} s"
    text = getattr(error, "stderr", "") or str(error)
    lines = [line for line in text.strip().splitlines() if line.startswith("ERROR")] or text.strip().splitlines()
    return f"not installed: {lines[-1].removeprefix('ERROR: ')}"


def _hash(group: Group) -> str:
    content = repr((shared(), group, sys.version_info[:2]))
    return hashlib.sha256(content.encode()).hexdigest()[:12]
