"""MosaicML Streaming over its own format, MDS.

`StreamingDataset(shuffle=True)` with its default algorithm in a torch DataLoader. The pictures are stored as plain
bytes and decoded by Pillow as for the other peers, which is what its `jpeg` column does. From S3 it fills a local
cache: each epoch that is measured starts with an empty one and counts from the first batch that is asked for, after
the data set was constructed. It wants torchvision, of which it uses nothing here: an empty stand-in serves.
"""

import collections
import importlib
import importlib.machinery
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ._measure import Outcome, Stretch, add, endless, first_batch, measure, report, server_of, steady, versions
from ._pictures import decode, is_s3

PACKAGES = ["mosaicml-streaming"]


def import_streaming() -> Any:
    """The library, beside stand-ins for the modules of torchvision that it imports."""
    names: dict[str, dict[str, Any]] = {"datasets": {"VisionDataset": object, "CIFAR10": object}, "transforms": {}}
    names["transforms.functional"] = {"to_tensor": None}
    for name, content in {"": {}, **names}.items():
        module = types.ModuleType(f"torchvision.{name}".rstrip("."))
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        vars(module).update(content)
        sys.modules.setdefault(module.__name__, module)
    return importlib.import_module("streaming")


def prepare(arguments: dict[str, Any]) -> None:
    """Writes the pictures of a folder as MDS."""
    streaming = import_streaming()
    paths = sorted(Path(arguments["pictures"]).glob("*.jpg"))
    with streaming.MDSWriter(
        out=arguments["folder"], columns={"image": "bytes"}, size_limit=arguments["bytes_per_file"]
    ) as writer:
        for path in paths:
            writer.write({"image": path.read_bytes()})


def run(arguments: dict[str, Any]) -> Outcome | None:
    """Measures it as the arguments say; with `pictures` among them, makes the data instead."""
    if "pictures" in arguments:
        prepare(arguments)
        return None
    torch.set_num_threads(1)
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()  # of runs that were killed
    uri, workers = arguments["uri"], arguments["parallel"]

    class Pictures(streaming.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, index: int) -> Tensor:
            return decode(super().__getitem__(index)["image"])

    def loader(epochs: bool, **places: str) -> DataLoader[Tensor]:
        pictures = Pictures(**places, shuffle=True, batch_size=arguments["batch"])
        keep = epochs and workers > 0
        return DataLoader(pictures, arguments["batch"], num_workers=workers, persistent_workers=keep)

    def endless_local() -> Iterator[Tensor]:
        batches = loader(epochs=True, local=uri)
        return endless(lambda _: batches)

    if is_s3(uri):
        return _cold(loader, arguments)
    return steady(endless_local, arguments, PACKAGES)


def _cold(loader: Any, arguments: dict[str, Any]) -> Outcome:
    """Whole epochs, each with an empty cache; the first is the warm-up and tells the time to the first batch."""
    with tempfile.TemporaryDirectory(prefix="mosaic-") as cache:
        batches, first = first_batch(
            lambda: iter(loader(epochs=False, remote=arguments["uri"], local=cache)), arguments["size"]
        )
        collections.deque(batches, maxlen=0)
    total = Stretch()
    while total.images < arguments["images"] or total.seconds < arguments["seconds"]:
        with tempfile.TemporaryDirectory(prefix="mosaic-") as cache:
            pictures = loader(epochs=False, remote=arguments["uri"], local=cache)
            epoch = (batch for batch in pictures)  # begins, and begins to download, with its first batch
            total = add(total, measure(epoch, sys.maxsize, 0.0, server_of(arguments)))
    return Outcome(total, first, versions([*PACKAGES, "boto3"]))


if __name__ == "__main__":
    report(run)
