"""Two workers of a cluster are killed in turn through an epoch: what was trained on is each sample once."""

import hashlib
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pipeline.cluster import training
from pipeline.cluster.follow import read_restarts
from pipeline.config import load_config
from pipeline.data.manifest import read_manifest
from pipeline.data.stream import read_images
from pipeline.training.step import Updates
from tests.small import SMALL_SETTINGS, small_data

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow]

SAMPLES, BATCH = 96, 8
KILLS = {24: 1, 56: 0}
"""At so many images seen, this rank is killed; once each."""
SMALL = [
    *SMALL_SETTINGS,
    f"train.total_kimg={SAMPLES / 1000}",
    "train.precision=fp32",
    "train.tick_kimg=0.016",
    "train.checkpoint_kimg=0.016",
    "data.decoder=pillow",
    "data.flip=false",
    "cluster.workers=2",
    "cluster.threads_per_worker=1",
    "cluster.health_check_interval_s=0.5",
    "cluster.max_failures=5",
    "tracking.enabled=false",
]


def watched(settings: dict[str, Any]) -> dict[str, Any]:
    """A worker that notes each picture after it was trained on, and kills itself where it was told to."""
    folder, update = Path(settings["config"]["run"]["dir"]), Updates.__call__

    def noted(self: Updates, real_BHWC: Tensor) -> None:
        images_seen, rank = self.state.images_seen, self.world.rank
        mark = folder / f"killed-{images_seen}"
        if KILLS.get(images_seen) == rank and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, real_BHWC)
        note = {"seen": images_seen, "rank": rank, "pictures": [digest(picture) for picture in real_BHWC]}
        with (folder / f"notes-{rank}-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")

    Updates.__call__ = noted  # type: ignore[method-assign]
    return worker(settings)


worker = training.worker


def digest(picture: Tensor) -> str:
    return hashlib.sha256(picture.numpy().tobytes()).hexdigest()


def test_each_sample_is_trained_on_once(ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_data(tmp_path / "data", SAMPLES, row_group_rows=7)
    places = [f"data.uri={data.uri}", f"run.dir={tmp_path}", "run.name=killed"]
    monkeypatch.setattr(training, "worker", watched)
    config = load_config(None, [*SMALL, *places, f"cluster.address={ray_address}"])
    outcome = training.train_on_ray(config, None)
    assert outcome.images_seen == SAMPLES
    assert len(read_restarts(config.run_uri, config.storage)) == len(KILLS)
    assert all((tmp_path / f"killed-{images_seen}").exists() for images_seen in KILLS)

    notes = [json.loads(line) for path in tmp_path.glob("notes-*.jsonl") for line in path.read_text().splitlines()]
    trained: dict[tuple[int, int], list[str]] = {}
    for note in notes:
        place = (note["seen"], note["rank"])
        assert trained.setdefault(place, note["pictures"]) == note["pictures"]  # again after a restart: the same
    assert len(notes) > len(trained), "no update was repeated, so nothing was lost and found"
    assert set(trained) == {(seen, rank) for seen in range(0, SAMPLES, BATCH) for rank in range(2)}
    manifest = read_manifest(data.uri, config.storage)
    stored = [digest(one) for batch in read_images(manifest, data, config.storage, range(SAMPLES), 16) for one in batch]
    assert Counter(one for pictures in trained.values() for one in pictures) == Counter(stored)
    assert len(set(stored)) == SAMPLES
