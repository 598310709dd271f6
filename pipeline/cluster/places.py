"""Which of a job's addresses the machines of a cluster will not find: paths of this machine, services on loopback."""

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.config import Config, ConfigError, absolute

DATABASE = "sqlite:///"


def is_mine(address: str) -> bool:
    """Whether an IP address is one of this machine's: only to those can a socket be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def elsewhere(nodes: Iterable[str]) -> list[str]:
    """Those of a cluster's nodes, by IP address, that are other machines."""
    return sorted({node for node in nodes if not is_mine(node)})


def settled(job: str, config: Config, others: Sequence[str], shared: Sequence[str] = ()) -> list[str]:
    """Overrides that make the job's local addresses mean on the cluster what they mean here.

    The job runs in a folder of its own on the cluster's head, which is removed after it: a relative path would lead
    there, so each is made absolute.

    Args:
        job: such as `train`; each has other addresses that it uses.
        others: nodes that are other machines; none where the cluster is this machine alone.
        shared: folders that all machines have mounted under the same path.

    Raises:
        ConfigError: other machines would look for a path of this one; all such keys, one a line.
    """
    overrides, problems = [], []
    mounted = [Path(absolute(folder)) for folder in shared]
    for key, value in local_places(job, config).items():
        prefix = DATABASE if value.startswith(DATABASE) else ""
        path = absolute(value.removeprefix(prefix))
        if others and not any(Path(path).is_relative_to(folder) for folder in mounted):
            problems.append(
                f"{key} is {value}, a path of this machine, and the cluster has others ({_few(others)}): expected "
                f"{'http://HOST:PORT' if key == 'tracking.uri' else 's3://BUCKET/...'}, or a path below a folder "
                "that all of them have mounted, named by --shared FOLDER"
            )
        elif prefix + path != value:
            overrides.append(f"{key}={prefix}{path}")
    if problems:
        raise ConfigError("\n".join(problems))
    return overrides


def local_places(job: str, config: Config) -> dict[str, str]:
    """The settings that the job uses and that hold a path of this machine."""
    tracking = config.tracking.uri if config.tracking.enabled else None
    needs_run = job in ("train", "tune", "evaluate") or (job == "promote" and tracking is None)
    used = {
        "ingest.source": config.ingest.source if job == "ingest" else None,
        "data.uri": config.data.uri if job in ("ingest", "train", "tune", "evaluate") else None,
        "run.dir": config.run.dir if needs_run or (job == "synthesize" and not config.synthesize.model) else None,
        "evaluate.weights": config.evaluate.weights if job in ("train", "tune", "evaluate") else None,
        "synthesize.model": config.synthesize.model if job == "synthesize" else None,
        "synthesize.out": config.synthesize.out if job == "synthesize" else None,
        "tracking.uri": tracking if job != "ingest" else None,
    }
    return {key: value for key, value in used.items() if value and _is_path(value)}


def _is_path(value: str) -> bool:
    if value.startswith("preset://"):
        return False  # comes with the package, on every machine
    return value.startswith(DATABASE) or absolute(value).startswith("/")


def warnings(config: Config | None, others: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """What is probably meant otherwise: on another machine, loopback is that machine."""
    named: dict[str, str | None] = {}
    if config is not None:
        named["tracking.uri"] = config.tracking.uri if config.tracking.enabled else None
        named["storage.endpoint"] = config.storage.endpoint
    named |= {name: value for name, value in environment.items() if name.startswith("AWS_ENDPOINT_URL")}
    return [
        f"{key} is {value}, which on the cluster is each machine itself and not this one: give an address that "
        f"{_few(others)} can reach"
        for key, value in named.items()
        if others and value and is_loopback(value)
    ]


def is_loopback(url: str) -> bool:
    """Whether a URL's host is the machine that asks."""
    host = ""
    try:
        host = urlsplit(url).hostname or ""
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def travelling(option: str, source: str | None, files: Iterable[str], root: Path) -> None:
    """Checks that a config file, if it is one, goes along under the name that the job will look for.

    Raises:
        ConfigError: it is not among the `files` that travel from `root`, or is named from another folder.
    """
    if source is None or not (source.endswith((".yaml", ".yml")) or "/" in source):
        return  # a preset
    here = Path(os.path.normpath(Path.cwd().resolve() / Path(source).expanduser()))
    root = root.resolve()
    name = here.relative_to(root).as_posix() if here.is_relative_to(root) else ""
    if name not in files:
        raise ConfigError(
            f"{option} {source}: this file does not travel to the cluster: expected one in {root} that .gitignore "
            "does not name"
        )
    if Path(source) != Path(name):
        raise ConfigError(f"{option} {source}: the job starts in {root}, so write {option} {name}, and start it there")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
