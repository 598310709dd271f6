"""Jobs handed to a running cluster with token authentication: named, refused, followed, left, stopped, continued."""

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.storage import StorageConfig
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.observers import read_log
from tests.relay import relay_to
from tests.servers import free_ports
from tests.small import SMALL_SETTINGS, small_data, small_pictures
from tests.watched import PATIENCE_S, Watched, until

pytestmark = [pytest.mark.integration, pytest.mark.cluster, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
COUNTING = """import time
for number in range({count}):
    print("number", number, flush=True)
    time.sleep({pause})
"""


def caught(command: Sequence[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A process that has ended, with its output; nobody can be asked anything."""
    nobody, limit = subprocess.DEVNULL, 2 * PATIENCE_S
    return subprocess.run(
        command, stdin=nobody, capture_output=True, text=True, timeout=limit, cwd=cwd, env=environment
    )


@dataclass(frozen=True)
class Head:
    """A cluster of one node, and what a shell needs to use it."""

    port: int
    """Of the dashboard."""
    environment: dict[str, str]
    binaries: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self, *words: str, address: str | None = None) -> list[str]:
        return [sys.executable, "-m", "jobs.submit", *words, "--address", address or self.address]

    def submit(
        self, *words: str, cwd: Path = ROOT, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`jobs.submit`, with its output caught."""
        environment = self.environment | {"PYTHONPATH": str(ROOT)} | dict(variables or {})
        return caught(self.command(*words), cwd, environment)

    def ray(self, *words: str) -> str:
        """Ray's own command line; its output."""
        command = [str(self.binaries / "ray"), "job", *words]
        environment = self.environment | {"RAY_ADDRESS": self.address}
        done = caught(command, ROOT, environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name: str, code: str) -> None:
        """A job of any kind under an id, with no package of ours."""
        path = Path(self.environment["HOME"]) / f"{name}.py"
        path.write_text(code)
        self.ray("submit", "--no-wait", "--submission-id", name, "--", "python", str(path))

    def status(self, name: str) -> str:
        """What Ray says of a job."""
        return self.ray("status", name)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head with dashboard, as `ray start` makes it."""
    home = tmp_path_factory.mktemp("home")
    binaries = Path(sys.executable).parent
    environment = os.environ | {
        "HOME": str(home),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    for name in ("RAY_ADDRESS", "PYTHONPATH"):  # of this process, which has clusters of its own
        environment.pop(name, None)
    port, dashboard, agent, client = free_ports(4)
    command = [
        str(binaries / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=2",
        f"--temp-dir={tmp_path_factory.mktemp('r')}",
    ]  # fmt: skip
    with (home / "head.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_open(dashboard, process)
            yield Head(dashboard, environment, binaries)
        finally:
            end_with_children(process)


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """Kills it and all that it has started; Ray's own way takes half a minute."""
    if process.poll() is None:
        head = psutil.Process(process.pid)
        for one in (head, *head.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards to train from."""
    uri = small_data(tmp_path_factory.mktemp("data")).uri
    assert uri is not None
    return uri


def wait_until_open(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns once somebody listens on the port; fails if the process ends first or a minute passes."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the head's dashboard did not open port {port}")


@contextlib.contextmanager
def watched(head: Head, *words: str, terminal: bool = False, address: str | None = None) -> Iterator[Watched]:
    """`jobs.submit` while it runs."""
    one = Watched(head.command(*words, address=address), head.environment, terminal)
    try:
        yield one
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        one.reader.join(10)
        os.close(one.here)


# ---- submitting ----------------------------------------------------------------------------------


def test_a_job_runs_on_the_cluster_and_its_log_comes_here(head: Head, tmp_path: Path) -> None:
    pictures = small_pictures(tmp_path / "pictures")
    settings = ["--config", "demo", f"ingest.source={pictures}", "ingest.tile=", f"data.uri={tmp_path}/data"]
    settings += ["model.size=16", "ingest.size=16", f"run.dir={tmp_path}/runs"]
    done = head.submit("ingest", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted ingest-demo-1 to" in done.stdout
    assert "ingest as tasks of the Ray cluster at " in done.stdout, "on all machines, not the head alone"
    assert "wrote 40 pictures" in done.stdout and "ingest-demo-1 SUCCEEDED" in done.stdout
    assert (tmp_path / "data" / "manifest.json").exists()


def test_a_failing_jobs_code_is_passed_on(head: Head, tmp_path: Path) -> None:
    settings = ["--config", "demo", "run.name=fails", f"ingest.source={tmp_path}/nowhere", f"data.uri={tmp_path}/data"]
    done = head.submit("ingest", *settings)
    assert done.returncode == 1
    assert "nowhere" in done.stdout and re.search(r"ingest-fails-1 FAILED after \S+ with code 1$", done.stdout.strip())


def test_a_shell_without_python_is_told(head: Head) -> None:
    head.ray("submit", "--no-wait", "--submission-id", "lost", "--", "python-that-is-not-there", "-m", "jobs.train")
    done = head.submit("--logs", "lost")
    assert done.returncode == 127
    assert "the cluster's shell found no `python`" in done.stdout


@pytest.mark.timeout(600)  # ten processes that import torch and Ray, one after the other
def test_a_run_is_never_doubled_and_an_ended_one_goes_on(head: Head, data: str, tmp_path: Path) -> None:
    """Submitted, refused the second time, listed, stopped, and continued from its checkpoint by the same command."""
    folder = f"{tmp_path}/runs/story"
    settings = ["--config", "demo", *SMALL_SETTINGS, f"data.uri={data}", "data.decoder=pillow", "cluster.backend=local"]
    settings += ["tracking.enabled=false", "train.evaluate_kimg=", "train.tick_kimg=0.08", "train.checkpoint_kimg=0.08"]
    settings += ["run.name=story", "run.dir=runs"]  # of this shell, not of the folder that the job runs in
    first = head.submit("train", *settings, "train.total_kimg=1000", "--detach", cwd=tmp_path)
    assert (first.returncode, first.stdout.count("\n")) == (0, 1), first.stdout + first.stderr
    assert "submitted train-story-1 to" in first.stdout and f"run.dir={tmp_path}/runs" in first.stdout

    second = head.submit("train", *settings, "train.total_kimg=2000", cwd=tmp_path)
    assert second.returncode == 1
    assert re.search(rf"train-story-1 is (PENDING|RUNNING) at {head.address}, the same job", second.stderr)
    assert "--stop train-story-1, or give another run.name" in second.stderr

    until("the first checkpoint", lambda: bool(list_checkpoints(folder, StorageConfig())))
    listed = [line.split() for line in head.submit("--list").stdout.splitlines()]
    assert listed[0][:3] == ["id", "status", "run"]
    assert ["train-story-1", "RUNNING", "story"] in [line[:3] for line in listed]
    status = head.submit("--status", "story").stdout
    assert "python -m jobs.train --config demo" in status and f"{head.address}/#/jobs/train-story-1" in status
    stopped = head.submit("--stop", "story")
    assert stopped.returncode == 0 and "train-story-1 STOPPED" in stopped.stdout

    reached = list_checkpoints(folder, StorageConfig())[-1]
    kept = [line for line in read_log(folder, StorageConfig()) if line["images_seen"] <= reached]
    again = head.submit("train", *settings, f"train.total_kimg={(reached + 160) / 1000:g}", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "submitted train-story-2 to" in again.stdout and "train-story-2 SUCCEEDED" in again.stdout
    assert f"trained {(reached + 160) / 1000:g} kimg" in again.stdout
    log = read_log(folder, StorageConfig())
    assert log[: len(kept)] == kept, "it began anew"
    assert log[-1]["images_seen"] == reached + 160

    unknown = head.submit("--logs", "stroy")
    assert unknown.returncode == 1 and "no job or run stroy: did you mean story?" in unknown.stderr
    dry = head.submit("train", *settings, "--dry-run", "--pass-env", "RAY_AUTH_TOKEN", cwd=tmp_path)
    assert dry.returncode == 0 and "id:           train-story-3" in dry.stdout
    assert "RAY_AUTH_TOKEN" in dry.stdout and head.environment["RAY_AUTH_TOKEN"] not in dry.stdout + dry.stderr


def test_rays_own_submission_works_as_well(head: Head, data: str, tmp_path: Path) -> None:
    settings = ["--config", "demo", *SMALL_SETTINGS, f"data.uri={data}", "data.decoder=pillow", f"run.dir={tmp_path}"]
    settings += ["tracking.enabled=false", "train.evaluate_kimg=", "train.total_kimg=0.064", "train.tick_kimg=0.032"]
    said = head.ray("submit", "--working-dir", str(ROOT), "--", "python", "-m", "jobs.train", *settings)
    assert "trained 0.064 kimg" in said and "succeeded" in said
    assert list_checkpoints(f"{tmp_path}/demo", StorageConfig())[-1] == 64


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, "has another token than this shell"),
        ({"RAY_AUTH_TOKEN": ""}, "wants a token and this shell has none"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token and this shell has none"),
    ],
    ids=["wrong", "missing", "disabled"],
)
def test_without_the_token_nothing_runs(head: Head, variables: dict[str, str], text: str) -> None:
    refused = head.submit("--list", variables=variables)
    assert refused.returncode == 1
    assert text in refused.stderr and "Traceback" not in refused.stderr


# ---- following -----------------------------------------------------------------------------------


def test_ctrl_c_asks_what_to_do_and_the_job_goes_on_unless_told(head: Head) -> None:
    head.start("counts", COUNTING.format(count=100_000, pause=0.2))
    with (
        watched(head, "--logs", "counts", terminal=True) as asked,
        watched(head, "--logs", "counts", terminal=True) as twice,
        watched(head, "--logs", "counts") as unasked,
    ):
        for one in (asked, twice, unasked):
            one.wait_for("number 0")
        asked.type("\x03")
        there = asked.wait_for(r"\[s\]top the job, \[l\]eave its log")
        asked.type("f\n")
        asked.wait_for(r"number \d+", there)  # it follows on

        twice.type("\x03")
        twice.wait_for(r"\[s\]top the job")
        twice.type("\x03")
        assert twice.ended() == 130
        assert "left the log; counts goes on" in twice.said

        unasked.process.send_signal(signal.SIGINT)  # nobody can be asked
        assert unasked.ended() == 130
        assert "[s]top" not in unasked.said and "left the log; counts goes on" in unasked.said

        assert "RUNNING" in head.status("counts")
        asked.type("\x03")
        asked.wait_for(r"\[s\]top the job", there)
        asked.type("s\n")
        assert asked.ended() == 130
        assert "counts STOPPED" in asked.said
    assert "was stopped" in head.status("counts")


def test_a_lost_connection_is_made_anew_and_no_line_is_lost_or_shown_twice(head: Head, tmp_path: Path) -> None:
    ending = tmp_path / "may-end"
    code = "import pathlib\n" + COUNTING.format(count=60, pause=0.05)
    head.start(
        "long",
        f"{code}    while number == 40 and not pathlib.Path({str(ending)!r}).exists():\n        time.sleep(0.1)\n",
    )
    with relay_to(head.port) as relay, watched(head, "--logs", "long", address=f"http://{relay.address}") as follower:
        follower.wait_for("number 20\n")
        relay.cut()
        follower.wait_for("connection lost, the job goes on; trying again for 600 s")
        relay.mend()
        follower.wait_for("connected again after")
        ending.touch()
        assert follower.ended() == 0
    assert re.findall(r"number (\d+)", follower.said) == [str(number) for number in range(60)]
    assert "long SUCCEEDED" in follower.said


def test_a_progress_bar_is_a_bar_on_a_terminal_and_lines_elsewhere(head: Head) -> None:
    code = "import sys, time\nfrom tqdm import tqdm\nprint('before', flush=True)\n"
    code += "for _ in tqdm(range(30), 'working', mininterval=0, file=sys.stdout):\n    time.sleep(0.05)\n"
    head.start("bar", code + "print('after', flush=True)")
    with watched(head, "--logs", "bar", terminal=True) as terminal, watched(head, "--logs", "bar") as pipe:
        assert terminal.ended() == pipe.ended() == 0
    lines = pipe.said.splitlines()
    frames = [line for line in lines if line.startswith("working:")]
    assert len(frames) > 30 and "100%|" in frames[-1]
    assert lines.index("before") < lines.index(frames[0]) < lines.index("after")
    assert "\r" not in pipe.said
    rows = [row.rpartition("\x1b[K")[2].strip() for row in terminal.said.split("\n")]  # what is left of each
    assert [row[:14] for row in rows if row.startswith("working:")] == ["working: 100%|"]
    assert terminal.said.count("\r\x1b[Kworking:") == len(frames)
