"""torch DataLoader over single files, decoded by Pillow.

The way of every tutorial: a map-style dataset, `shuffle=True`, `default_collate` (which stacks straight into
shared memory in workers), workers kept from epoch to epoch. From S3 each picture is one GET by boto3, the
cheapest client in CPU time of those in common use (s3fs takes about twice as much); each worker has its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ._measure import Outcome, endless, report, steady
from ._pictures import decode, is_s3, list_files, s3_client, split


class Files(Dataset[Tensor]):
    """All pictures of a folder."""

    def __init__(self, uri: str) -> None:
        self._paths = list_files(uri, ".jpg")
        self._client: Any = None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        return decode(self._read(self._paths[index]))

    def _read(self, path: str) -> bytes:
        if not is_s3(path):
            return Path(path).read_bytes()
        if self._client is None:  # built in the worker: clients do not survive a fork
            self._client = s3_client()
        bucket, key = split(path)
        return self._client.get_object(Bucket=bucket, Key=key)["Body"].read()


def run(arguments: dict[str, Any]) -> Outcome:
    """Measures it as the arguments say."""
    torch.set_num_threads(1)
    workers = arguments["parallel"]

    def build() -> Iterator[Tensor]:
        loader = DataLoader(
            Files(arguments["uri"]),
            arguments["batch"],
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        return endless(lambda _: loader)

    return steady(build, arguments, ["torch", "pillow", *(["boto3"] if is_s3(arguments["uri"]) else [])])


if __name__ == "__main__":
    report(run)
