"""Who is measured, and one measurement: a process of its own that prints one line of JSON."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmark.peers._measure import Outcome, Server, Stretch

PEERS = {
    "torch_files": "torch DataLoader, files",
    "hugging_face": "Hugging Face datasets",
    "web_dataset": "WebDataset",
    "mosaic": "MosaicML Streaming",
}
"""Scripts in `peers`, and what they are called in tables."""
FOLDERS = {"torch_files": "pictures", "hugging_face": "hub", "web_dataset": "tars", "mosaic": "mds"}
OWN = {"dali": "this loader, DALI", "turbo": "this loader, turbo", "pillow": "this loader, Pillow"}
BARE = {"dali": "bare decoding, DALI", "turbo": "bare decoding, turbo", "pillow": "bare decoding, Pillow"}
RUN_DEADLINE_S = 300.0


@dataclass(frozen=True)
class Work:
    """What every contender has to do."""

    size: int
    batch: int
    images: int
    """At least so many are measured, after `warmup`."""
    seconds: float
    """And at least for so long."""
    warmup: int
    longest: float = math.inf
    """Seconds after which a slow one is stopped: its rate is known by then."""


@dataclass(frozen=True)
class Contender:
    """A loader in one setting."""

    name: str
    place: str
    """"local" or "s3"; "memory" for bare decoding."""
    parallel: int
    """Threads of this loader and of bare decoding, worker processes of a peer."""
    command: tuple[str, ...]
    arguments: dict[str, Any]
    environment: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One measurement, or why there is none."""

    contender: Contender
    outcome: Outcome | None
    reason: str = ""


def own(uri: str, place: str, decoder: str, threads: int, work: Work, server: Server | None) -> Contender:
    """This package's loader."""
    return _ours("stream", OWN[decoder], uri, place, decoder, threads, work, server)


def bare(uri: str, decoder: str, work: Work) -> Contender:
    """Decoding alone, of the same bytes."""
    return _ours("bare", BARE[decoder], uri, "memory", decoder, 1, work, None)


def peer(
    script: str, root: str, place: str, workers: int, work: Work, server: Server | None, python: Path
) -> Contender:
    """Another loader; `root` holds the pictures in each one's format."""
    arguments = {**_arguments(f"{root}/{FOLDERS[script]}", workers, work, server)}
    return Contender(PEERS[script], place, workers, peer_command(script, python), arguments, peer_environment())


def peer_command(script: str, python: Path) -> tuple[str, ...]:
    """Runs a peer's script, without arguments yet."""
    return (str(python), "-m", f"peers.{script}")


def peer_environment() -> dict[str, str]:
    """Leads to the scripts, to the S3 endpoint under the name that MosaicML reads, and never to the internet."""
    environment = {"PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        environment["S3_ENDPOINT_URL"] = endpoint
    return environment


def measure_once(contender: Contender) -> Run:
    """Runs a contender. What goes wrong in its process becomes the reason."""
    try:
        output = run_script(contender.command, contender.arguments, contender.environment)
    except subprocess.SubprocessError as error:
        return Run(contender, None, str(error))
    content = json.loads(output)
    return Run(contender, Outcome(**{**content, "stretch": Stretch(**content["stretch"])}))


def run_script(command: Sequence[str], arguments: dict[str, Any], environment: dict[str, str]) -> str:
    """The last line that a script prints. Raises SubprocessError with the last line of its error.

    The script's whole process group ends with it: workers that hang do not burden the next run.
    """
    process = subprocess.Popen(
        [*command, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=RUN_DEADLINE_S)
    except subprocess.TimeoutExpired as error:
        raise subprocess.SubprocessError(f"did not end within {RUN_DEADLINE_S:.0f} s") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"ended with code {process.returncode}"]
        raise subprocess.SubprocessError(lines[-1])
    return output.strip().splitlines()[-1]


def _ours(
    what: str, name: str, uri: str, place: str, decoder: str, threads: int, work: Work, server: Server | None
) -> Contender:
    arguments = {**_arguments(uri, threads, work, server), "what": what, "decoder": decoder}
    command = (sys.executable, "-m", "pipeline.benchmark.own")
    return Contender(name, place, threads, command, arguments, {})


def _arguments(uri: str, parallel: int, work: Work, server: Server | None) -> dict[str, Any]:
    known = dataclasses.asdict(server) if server else None
    return {**dataclasses.asdict(work), "uri": uri, "parallel": parallel, "server": known}
