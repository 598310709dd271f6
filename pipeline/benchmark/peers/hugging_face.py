"""Hugging Face `datasets`, streaming the same Parquet shards that this package's loader reads.

`load_dataset("parquet", streaming=True)` with only the column of pictures, shuffled by its own buffer of 1,000
examples and its order of files, in a torch DataLoader. `Image(decode=False)` hands out the encoded bytes, and
Pillow decodes them as for the other peers, which takes as long as the library's own decoding. It sleeps for 5
seconds at the end of each epoch while its threads end: switched off, for it would dominate short epochs. On S3 it
reads through s3fs, as its documentation says.
"""

import functools
import importlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ._measure import Outcome, endless, report, steady
from ._pictures import decode, is_s3, list_files


def collate(examples: list[dict[str, Any]]) -> Tensor:
    """A batch, decoded in the worker."""
    return default_collate([decode(example["image"]["bytes"]) for example in examples])


def run(arguments: dict[str, Any]) -> Outcome:
    """Measures it as the arguments say."""
    torch.set_num_threads(1)
    datasets = importlib.import_module("datasets")
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    uri, workers = arguments["uri"], arguments["parallel"]

    def build() -> Iterator[Tensor]:
        options = {"endpoint_url": os.environ.get("AWS_ENDPOINT_URL")} if is_s3(uri) else None
        pictures = datasets.load_dataset(
            "parquet",
            data_files=list_files(uri, ".parquet"),
            split="train",
            streaming=True,
            columns=["image"],
            storage_options=options,
        )
        pictures = pictures.cast_column("image", datasets.Image(decode=False)).shuffle(seed=0)
        loader = DataLoader(
            pictures,
            arguments["batch"],
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
        )
        return endless(functools.partial(_epoch, pictures, loader))

    return steady(build, arguments, ["datasets", "pyarrow", *(["s3fs"] if is_s3(uri) else [])])


def _epoch(pictures: Any, loader: Iterable[Tensor], number: int) -> Iterable[Tensor]:
    pictures.set_epoch(number)  # shared with the workers
    return loader


if __name__ == "__main__":
    report(run)
