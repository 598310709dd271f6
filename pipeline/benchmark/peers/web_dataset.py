"""WebDataset over tar files.

The pipeline of its README: files shuffled, a buffer of 1,000 samples shuffled, batches made in the workers,
`WebLoader`. Pillow decodes as for the other peers. From S3 a tar file is fetched by one GET of boto3 and read from
memory, registered as its opener for s3://; a `pipe:` to a command costs a process per file and a copy more.
"""

import importlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from ._measure import Outcome, endless, report, steady
from ._pictures import decode, is_s3, list_files, s3_client, split


def prepare(pictures: Path, folder: Path, per_file: int) -> None:
    """Packs the pictures of a folder into tar files, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(pictures.glob("*.jpg"))
    for number, start in enumerate(range(0, len(paths), per_file)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for path in paths[start : start + per_file]:
                archive.add(path, path.name)


def open_s3(url: str, *_: Any, **__: Any) -> io.BytesIO:
    """A whole object in memory."""
    bucket, key = split(url)
    return io.BytesIO(s3_client().get_object(Bucket=bucket, Key=key)["Body"].read())


def _decode_sample(sample: dict[str, Any]) -> Tensor:
    return decode(sample["jpg"])


def run(arguments: dict[str, Any]) -> Outcome:
    """Measures it as the arguments say."""
    torch.set_num_threads(1)
    webdataset = importlib.import_module("webdataset")
    importlib.import_module("webdataset.gopen").gopen_schemes["s3"] = open_s3
    uri, workers = arguments["uri"], arguments["parallel"]

    def build() -> Iterator[Tensor]:
        pictures = (
            webdataset.WebDataset(list_files(uri, ".tar"), shardshuffle=100)
            .shuffle(1000)
            .map(_decode_sample)
            .batched(arguments["batch"], collation_fn=default_collate)
        )
        loader = webdataset.WebLoader(pictures, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        return endless(lambda _: loader)

    return steady(build, arguments, ["webdataset", *(["boto3"] if is_s3(uri) else [])])


if __name__ == "__main__":
    report(run)
