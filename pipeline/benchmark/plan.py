"""A training on paper: FLOPs, memory, speed, cost and bytes for 1 to 1,024 GPUs, and which resource binds.

    python -m jobs.benchmark plan --config ffhq256 --gpus 8 --gpu h200
    python -m jobs.benchmark plan --config ffhq256 --gpu h100 --rate 95   # images per second, measured on one GPU
    python -m jobs.benchmark plan --config ffhq256 --gpus 8,64 --gpu l4 train.batch_size=256 train.accumulation=2

Nothing is run. What shapes do not say is assumed, and every assumption is printed with the option that replaces it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmark.arguments import amount, counts, share
from pipeline.benchmark.plan_cards import CARDS
from pipeline.benchmark.plan_cluster import checkpoint_of, row
from pipeline.benchmark.plan_text import as_json, text
from pipeline.benchmark.plan_worker import Assumptions, Planned
from pipeline.config import Config, load_config
from pipeline.data.manifest import DataError, read_manifest
from pipeline.layering import ConfigError
from pipeline.storage import StorageError

SCALE = [2**power for power in range(11)]
"""GPUs that the table always has."""
GENERATOR_SHARE, DISCRIMINATOR_SHARE, R1_SHARE = 0.55, 0.35, 0.5
STORAGE_GBPS = 10.0
PIXEL_BYTES = {"jpeg": 0.65, "png": 1.7, "keep": 1.7}
"""Bytes a pixel of photographs: JPEG of quality 95 without subsampling; "keep" stores PNG of what was resized."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jobs.benchmark plan`."""
    add = parser.add_argument
    known = ", ".join(CARDS)
    add("--config", metavar="PRESET_OR_FILE", required=True, help="the training: a preset or a YAML file")
    add("--gpu", type=_card, default="h200", metavar="CARD", help=f"one of {known} (default h200)")
    add("--gpus", type=counts, metavar="N[,N]", help="numbers to show memory and checkpoints for (cluster.workers)")
    add("--rate", type=amount, metavar="IMG_PER_S", help="measured on one GPU, instead of FLOPs and shares")
    add("--share", type=share, default=GENERATOR_SHARE, help="of the matrix rate that G reaches (%(default)s)")
    add("--share-discriminator", type=share, default=DISCRIMINATOR_SHARE, help="that D reaches (%(default)s)")
    add("--share-r1", type=share, default=R1_SHARE, help="of the fp32 matrix rate that R1 reaches (%(default)s)")
    add("--matmul-tflops", type=amount, help="measured rate of matrix products, instead of the data sheet's")
    add("--price", type=amount, metavar="USD", help="of one GPU for one hour")
    add("--network-gbps", type=amount, help="Gbit/s between machines, of one machine")
    add("--storage-gbps", type=amount, default=STORAGE_GBPS, help="Gbit/s from and to storage, of one machine (10)")
    add("--picture-kb", type=amount, help="mean size of a stored picture (data.uri's, else by ingest.format)")
    add("--json", type=Path, metavar="FILE", help="write everything that was computed")
    add("overrides", nargs="*", metavar="key=value", help="replaces one setting of the config")


def run(args: argparse.Namespace) -> None:
    """Prints the plan. Raises ConfigError for a config or a file that cannot be used."""
    if args.json and not args.json.absolute().parent.is_dir():
        raise ConfigError(f"--json is {args.json}: there is no folder {args.json.parent}; make it, or name another")
    # The numbers of GPUs that are planned stand in for cluster.workers, which the batch may have too few groups for.
    overrides = [*args.overrides, *(["cluster.workers=1"] if args.gpus else [])]
    config = load_config(args.config, overrides)
    pictures = stored_pictures(config, args.picture_kb)
    planned = plan(config, args, pictures)
    asked = args.gpus or [config.workers]
    rows = [row(planned, gpus) for gpus in sorted({*SCALE, *asked})]
    checkpoints = {one.gpus: checkpoint_of(planned, one) for one in rows if one.gpus in asked}
    print(text(args.config, planned, rows, checkpoints, pictures.origin))
    if args.json:
        args.json.write_text(as_json(args.config, planned, rows, checkpoints, pictures.origin))
        print(f"wrote {args.json}")


def plan(config: Config, args: argparse.Namespace, pictures: "Pictures") -> Planned:
    """The config, the card, and what the options say."""
    card = CARDS[args.gpu]
    return Planned(
        config.model,
        config.train,
        card,
        Assumptions(
            generator_share=args.share,
            discriminator_share=args.share_discriminator,
            r1_share=args.share_r1,
            product_tflops=args.matmul_tflops,
            images_per_second=args.rate,
            network_gbps=args.network_gbps or card.network_gbps,
            storage_gbps=args.storage_gbps,
            usd_per_hour=args.price or card.usd_per_hour,
            picture_bytes=pictures.bytes,
            rows_per_get=pictures.rows,
        ),
    )


# ---- stored pictures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """How the data set is stored, or would be."""

    bytes: float
    """Mean of a picture."""
    rows: float
    """Mean pictures in a row group."""
    origin: str
    """Where this is known from."""


def stored_pictures(config: Config, given_kb: float | None = None) -> Pictures:
    """From the size that was given, else from the data set's manifest, else assumed by resolution and format."""
    ingest = config.ingest
    pixels = PIXEL_BYTES[ingest.format]
    size, origin = pixels * ingest.size**2, f"{pixels} bytes a pixel, as photographs with ingest.format={ingest.format}"
    if given_kb is not None:
        size, origin = 1000 * given_kb, "--picture-kb"
    elif config.data.uri:
        try:
            # One try: a plan must not wait for a store that is not there.
            manifest = read_manifest(config.data.uri, config.storage.model_copy(update={"attempts": 1}))
        except (DataError, StorageError) as error:
            origin += f"; data.uri cannot be read: {error}"
        else:
            groups = manifest.row_groups
            mean = sum(group.bytes for group in groups) / manifest.samples
            return Pictures(mean, manifest.samples / len(groups), f"the manifest of {config.data.uri}")
    rows = max(1.0, min(ingest.row_group_rows, ingest.row_group_bytes / size))
    return Pictures(size, rows, origin)


# ---- options -------------------------------------------------------------------------------------


def _card(name: str) -> str:
    if name not in CARDS:
        raise argparse.ArgumentTypeError(f"{name!r}: expected one of {', '.join(CARDS)}")
    return name
