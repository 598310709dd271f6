"""Measuring loaders: the pictures, the meter, the table, and tiny runs of real loaders."""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.benchmark import contenders, environment, loader, report
from pipeline.benchmark.contenders import PEERS, Contender, Run, Work
from pipeline.benchmark.own import bare_dali, bare_pillow, bare_turbo, read_encoded
from pipeline.benchmark.peers import _measure, _pictures, web_dataset
from pipeline.benchmark.pictures import make_picture, make_pictures
from pipeline.benchmark.s3 import local_s3, upload
from pipeline.data.manifest import read_manifest
from pipeline.storage import StorageConfig, read_bytes

SMALL = Work(size=64, batch=4, images=8, seconds=0.0, warmup=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small pictures and their shards."""
    folder = tmp_path_factory.mktemp("made")
    loader.make_data(folder, pictures=10, size=64, row_group_rows=4)
    return folder


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    loader.add_arguments(parser)
    return parser.parse_args(words)


# ---- pictures -------------------------------------------------------------------------------------


def test_pictures_compress_like_photographs() -> None:
    sizes = [len(make_picture(number, 256)) for number in range(24)]
    assert 20_000 < np.mean(sizes) < 30_000
    with Image.open(io.BytesIO(make_picture(0, 256))) as picture:
        assert (picture.size, picture.mode, picture.format) == ((256, 256), "RGB", "JPEG")
        assert picture.layer[0][1:3] == (2, 2)  # type: ignore[attr-defined]  # luma at twice the chroma: 4:2:0


def test_pictures_are_the_same_every_time_and_differ_from_each_other(tmp_path: Path) -> None:
    mean = make_pictures(tmp_path, 3, 64, progress=False)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    assert [path.read_bytes() for path in files] == [make_picture(number, 64) for number in range(3)]
    assert len({path.read_bytes() for path in files}) == 3
    assert mean == sum(path.stat().st_size for path in files) / 3


def test_shards_hold_the_bytes_of_the_files(made: Path) -> None:
    shards = str(made / "shards")
    manifest = read_manifest(shards, StorageConfig())
    assert [group.rows for group in manifest.row_groups] == [4, 4, 2]
    encoded = [one.tobytes() for one in read_encoded(manifest, shards, StorageConfig())]
    assert encoded == [path.read_bytes() for path in sorted((made / "pictures").iterdir())]


def test_data_is_made_once_and_again_when_other_data_is_wanted(tmp_path: Path) -> None:
    loader.make_data(tmp_path, 3, 64, 2)
    first = (tmp_path / "pictures/00000.jpg").stat().st_mtime_ns
    loader.make_data(tmp_path, 3, 64, 2)
    assert (tmp_path / "pictures/00000.jpg").stat().st_mtime_ns == first
    loader.make_data(tmp_path, 2, 64, 2)
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_tar_files_hold_the_pictures_in_order(made: Path, tmp_path: Path) -> None:
    web_dataset.prepare(made / "pictures", tmp_path / "tars", per_file=6)
    names = []
    for path in sorted((tmp_path / "tars").iterdir()):
        with tarfile.open(path) as archive:
            names.append(archive.getnames())
    assert [len(one) for one in names] == [6, 4]
    assert sum(names, []) == [f"{number:05d}.jpg" for number in range(10)]


# ---- real loaders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_the_torch_peer_runs_without_this_package(made: Path, workers: int) -> None:
    python = Path(sys.executable)
    run = contenders.measure_once(contenders.peer("torch_files", str(made), "local", workers, SMALL, None, python))
    assert run.reason == ""
    assert run.outcome is not None
    assert run.outcome.stretch.images >= 8
    assert run.outcome.stretch.seconds > 0
    assert run.outcome.stretch.bytes_read is not None and run.outcome.stretch.bytes_read > 8 * 500
    assert set(run.outcome.versions) == {"torch", "pillow"}


@pytest.mark.parametrize("decoder, package", [("dali", "nvidia.dali"), ("turbo", "simplejpeg")])
def test_this_loader_runs_with_other_decoders(made: Path, decoder: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    run = contenders.measure_once(contenders.own(str(made / "shards"), "local", decoder, 1, SMALL, None))
    assert run.reason == ""
    assert run.outcome is not None and run.outcome.stretch.images >= 8


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_bare_decoding_gives_the_pictures(made: Path) -> None:
    shards = str(made / "shards")
    encoded = read_encoded(read_manifest(shards, StorageConfig()), shards, StorageConfig())
    batches = bare_pillow(encoded, 8)
    first, second, third = next(batches), next(batches), next(batches)
    assert (first.shape, second.shape) == ((8, 64, 64, 3), (2, 64, 64, 3))
    with Image.open(made / "pictures/00008.jpg") as picture:
        assert np.array_equal(second[0].numpy(), np.asarray(picture))
    assert torch.equal(first, third)


def test_bare_decoding_by_dali_is_close_to_pillows(made: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    shards = str(made / "shards")
    encoded = read_encoded(read_manifest(shards, StorageConfig()), shards, StorageConfig())
    by_dali, by_pillow = next(bare_dali(encoded, 4, 1)), next(bare_pillow(encoded, 4))
    assert by_dali.shape == by_pillow.shape
    assert (by_dali.int() - by_pillow.int()).abs().float().mean() < 2  # decoders round chroma differently


def test_bare_decoding_by_turbo_gives_pillows_pixels(made: Path) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    shards = str(made / "shards")
    encoded = read_encoded(read_manifest(shards, StorageConfig()), shards, StorageConfig())
    by_turbo, by_pillow = next(bare_turbo(encoded, 4, 64)), next(bare_pillow(encoded, 4))
    assert (by_turbo.int() - by_pillow.int()).abs().max() <= 2


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_peer_mirrors_half_of_the_pictures(made: Path) -> None:
    encoded = (made / "pictures/00000.jpg").read_bytes()
    with Image.open(io.BytesIO(encoded)) as picture:
        plain = torch.from_numpy(np.array(picture))
    seen = [_pictures.decode(encoded) for _ in range(64)]
    mirrored = sum(torch.equal(one, plain.flip(1)) for one in seen)
    assert sum(torch.equal(one, plain) for one in seen) == 64 - mirrored
    assert 12 < mirrored < 52


@pytest.mark.parametrize("script", ["hugging_face", "web_dataset", "mosaic"])
def test_a_peer_that_cannot_be_imported_is_named_with_the_reason(made: Path, tmp_path: Path, script: str) -> None:
    # An interpreter that has torch and Pillow, in which the peer's own package cannot be imported.
    package = {"hugging_face": "datasets", "web_dataset": "webdataset", "mosaic": "streaming"}[script]
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no {package} today')")
    contender = contenders.peer(script, str(made), "local", 0, SMALL, None, Path(sys.executable))
    path = f"{tmp_path}:{contender.environment['PYTHONPATH']}"
    broken = Contender(contender.name, "local", 0, contender.command, contender.arguments, {"PYTHONPATH": path})
    rows, missing = report.summarise([contenders.measure_once(broken)])
    assert rows == []
    assert missing == [report.Missing(PEERS[script], "local", f"ImportError: no {package} today")]
    assert f"not measured: ImportError: no {package} today" in report.table(rows, missing, "local")


def test_a_peer_that_could_not_be_installed_is_not_run() -> None:
    contender = Contender("WebDataset", "local", 0, ("/nonexistent",), {}, {})
    (run,) = loader.measure_all([contender], 3, {"WebDataset": "not installed: no network"})
    assert (run.outcome, run.reason) == (None, "not installed: no network")


def test_a_script_that_hangs_or_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "RUN_DEADLINE_S", 0.2)
    with pytest.raises(subprocess.SubprocessError, match="did not end within 0 s"):
        contenders.run_script([sys.executable, "-c", "import time; time.sleep(60)"], {}, {})
    monkeypatch.setattr(contenders, "RUN_DEADLINE_S", 60.0)
    with pytest.raises(subprocess.SubprocessError, match="ended with code 3"):
        contenders.run_script([sys.executable, "-c", "import os; os._exit(3)"], {}, {})


def test_packages_of_peers_that_cannot_be_had_are_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = str(tmp_path / "no-such-package")
    monkeypatch.setattr(environment, "shared", lambda: ())
    monkeypatch.setattr(
        environment, "groups", lambda: (environment.Group("broken", (nothing,)), environment.Group("fine", ("pip",)))
    )
    python, failed = environment.prepare(tmp_path / "venv", progress=False)
    assert list(failed) == ["broken"]
    assert failed["broken"].startswith("not installed: ") and "no-such-package" in failed["broken"]
    assert subprocess.run([python, "-c", "import pip"]).returncode == 0
    stamps = [path.name for path in (tmp_path / "venv").glob("installed-*")]
    assert len(stamps) == 1 and stamps[0].startswith("installed-fine-")


@pytest.mark.integration
def test_bytes_from_s3_are_counted_by_the_server(made: Path, tmp_path: Path) -> None:
    before = os.environ.get("AWS_ENDPOINT_URL")
    with local_s3(tmp_path / "server") as server:
        upload(made / "shards", "s3://benchmark/some/shards")
        data = b""

        def batches() -> Iterator[bytes]:
            nonlocal data
            data = read_bytes("s3://benchmark/some/shards/manifest.json", StorageConfig())
            yield data

        stretch = _measure.measure(batches(), images=1, seconds=0.0, server=server)
        assert stretch.bytes_read == len(data)
        assert data == (made / "shards/manifest.json").read_bytes()
        assert stretch.server_cpu_seconds is not None and stretch.server_cpu_seconds >= 0
        run = contenders.measure_once(contenders.own("s3://benchmark/some/shards", "s3", "pillow", 1, SMALL, server))
        assert run.reason == ""
    assert os.environ.get("AWS_ENDPOINT_URL") == before


# ---- the command ----------------------------------------------------------------------------------


def test_a_small_benchmark_prints_a_table_and_writes_json(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    words = f"--data {made / 'shards'} --threads 1 --decoders pillow --batch 4 --seconds 0 --rounds 1 --json {file}"
    loader.run(options(*words.split()))
    printed = capsys.readouterr().out
    assert "10 pictures of 64x64" in printed
    assert "| this loader, Pillow" in printed
    content = json.loads(file.read_text())
    assert {run["name"] for run in content["runs"]} == {"bare decoding, Pillow", "this loader, Pillow"}
    assert content["pictures"]["number"] == 10
    assert all(run["stretch"]["images"] >= 10 for run in content["runs"])


def test_options_are_checked() -> None:
    assert (options().threads, options().workers, options().s3) == ([1, 2], [0, 1, 2], None)
    assert options("--s3").s3 == ""
    assert options("--threads", "4", "--workers", "0,8").workers == [0, 8]
    for words in (["--threads", "0"], ["--workers", "x"], ["--decoders", "jpeg"], ["--pictures", "0"]):
        with pytest.raises(SystemExit):
            options(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "somewhere", "--peers"], "leave it out for --peers"),
        (["--data", "somewhere", "--s3"], "leave it out for --peers and --s3"),
        (["--s3", "bucket/prefix"], "expected s3://BUCKET/PREFIX"),
        (["--plot", "/nonexistent/x.png"], "its folder does not exist"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(loader.BenchmarkError, match=message):
        loader.run(options(*words))


def test_nothing_measured_is_an_error() -> None:
    broken = Contender("a", "local", 0, (), {}, {})
    settings = {
        "machine": {"cpu": "some", "cores": 1, "load": 0.0},
        "pictures": {"number": 1, "height": 8, "width": 8, "mean_bytes": 100, "row_groups": 1},
        "work": {"batch": 1},
    }
    with pytest.raises(loader.BenchmarkError, match="nothing could be measured; the first reason: a: broken"):
        loader.conclude([Run(broken, None, "broken")], settings, options())


def test_repeated_pictures_make_more_data_of_the_same_bytes(tmp_path: Path) -> None:
    loader.make_data(tmp_path, pictures=3, size=64, row_group_rows=4, repeat=3)
    files = sorted((tmp_path / "pictures").iterdir())
    assert len(files) == 9 and len({path.read_bytes() for path in files}) == 3
    for name in ("shards", "hub"):
        assert read_manifest(str(tmp_path / name), StorageConfig()).samples == 9


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(loader.BenchmarkError, match="is not empty and was not made by this command"):
        loader.make_data(tmp_path, pictures=10, size=64, row_group_rows=4)
    assert (tmp_path / "pictures" / "mine.jpg").read_bytes() == b"precious"
