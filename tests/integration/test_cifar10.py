"""CIFAR-10: ingested in one command, and an epoch of it through the streams of two workers.

CIFAR10=path/to/train.zip pytest -s tests/integration/test_cifar10.py      # prints images per second
"""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from jobs import ingest
from pipeline.config import load_config
from pipeline.data.manifest import read_manifest
from pipeline.data.order import Order

SOURCE = Path(os.environ.get("CIFAR10", Path(__file__).parents[3] / "shared/data/cifar10/train.zip"))
BATCH = 64

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCE.exists(), reason=f"CIFAR-10 is not at {SOURCE}; set CIFAR10 to its train.zip"),
]

WORKER = """
import sys, time
import torch
from pipeline.config import load_config
from pipeline.data.manifest import read_manifest
from pipeline.data.stream import DataStream
uri, rank, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
config = load_config("cifar10", [f"data.uri={uri}", "data.threads=1"])
manifest = read_manifest(uri, config.storage)
share = range(rank * batch // 2, (rank + 1) * batch // 2)
stream = DataStream(manifest, config.data, config.storage, seed=0, batch_size=batch, positions=share)
first = next(stream)
print("ready", flush=True)
sys.stdin.readline()
began, batches = time.perf_counter(), manifest.samples // batch - 1
for _ in range(batches):
    pictures = next(stream)
    assert pictures.shape == (batch // 2, 32, 32, 3)
print(batches * len(share) / (time.perf_counter() - began), flush=True)
stream.close()
"""


def test_an_epoch_of_cifar10_on_two_workers(tmp_path: Path) -> None:
    uri = str(tmp_path / "data")
    began = time.perf_counter()
    ingest.main(["--config", "cifar10", f"ingest.source={SOURCE}", f"data.uri={uri}"])
    ingested = time.perf_counter() - began
    manifest = read_manifest(uri, load_config().storage)
    assert manifest.samples == 50_000 and (manifest.width, manifest.height) == (32, 32)

    order = Order([group.rows for group in manifest.row_groups], manifest.digest, 0, BATCH, 2)
    halves = [order.at(0, range(rank * 32, rank * 32 + 32), 50_000 // BATCH + 1) for rank in range(2)]
    seen = [int(index) for pair in zip(*halves, strict=True) for half in pair for index in half][:50_000]
    assert Counter(seen) == Counter(range(50_000))

    command = [sys.executable, "-c", WORKER, uri]
    workers = [
        subprocess.Popen([*command, str(rank), str(BATCH)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = []
    try:
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        for worker in workers:  # both decode at the same time
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    rates = [float(output) for output in outputs]
    print(f"\ningest {ingested:.1f} s; an epoch on 2 workers at {sum(rates):,.0f} images per second")
