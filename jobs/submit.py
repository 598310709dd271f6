"""Hands a job to a running Ray cluster, follows its log and ends with its exit code.

    python -m jobs.submit train --address http://HEAD:8265 --config my-run.yaml
    python -m jobs.submit tune  --address http://HEAD:8265 --config my-run.yaml --space my-space.yaml run.name=sweep
    python -m jobs.submit train ... --dry-run                  # what would be sent, and nothing is
    python -m jobs.submit --list | --status RUN | --logs RUN | --stop RUN

What is not listed below is the job's own, and is checked here before anything is sent. The job is called
JOB-RUN-ATTEMPT: while one goes on, the same is refused; once it has ended, the same command continues the run as its
next attempt. The project's folder travels without data, .git and environments. Credentials stay here: give the nodes a
role, or name variables with --pass-env, knowing that the cluster shows them to all who may use it. Ctrl-C asks whether
to stop the job or to leave its log; where nobody can be asked the job goes on. Jobs join the cluster that they run on:
cluster.address need not be given.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.cli import INTERRUPTED, failing_clearly, parse
from pipeline.cluster import job_names, packing, places, submission
from pipeline.cluster.job_log import JobLog, Screen
from pipeline.cluster.session import ClusterError
from pipeline.config import Config

JOBS = tuple(
    sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if path.stem not in ("__init__", "cli", "models", "submit", "demo", "status")
    )
)
"""All but what is no job, and `status`, which any machine answers from storage."""
OPTIONS = {"ingest": "_actions", "tune": "_space", "evaluate": "_model", "promote": "_version", "synthesize": "_kind"}
"""The function of a job that adds its own options to those that all share."""
LOCAL = "http://127.0.0.1:8265"


class Resolved(NamedTuple):
    """What a job's arguments come to."""

    run: str
    """`run.name`, or for a job without a run the kind of work."""
    config: Config | None
    """None for a job that has no config."""
    sources: dict[str, str | None]
    """Options that may name a file, with their values."""


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.list or args.status or args.stop or args.logs:
        if args.dry_run:
            parser.error(
                "--dry-run: expected a job to submit; --list, --status, --logs and --stop have nothing to rehearse"
            )
        if rest:
            parser.error(f"{rest[0]}: expected nothing beside --list, --status, --stop or --logs but --address")
        sys.exit(_manage(args))
    if not rest or rest[0] not in JOBS:
        parser.error(f"{rest[0] if rest else 'nothing to submit'}: expected one of {', '.join(JOBS)}, or --list")
    sys.exit(_submit(rest[0], rest[1:], args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        usage="%(prog)s JOB [options] [the job's own arguments]\n       %(prog)s --list | --status RUN | --logs RUN | "
        "--stop RUN  [--address URL]",
        description=__doc__,
        epilog=f"jobs: {', '.join(JOBS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or LOCAL
    parser.add_argument("--address", metavar="URL", default=address, help=f"the cluster's dashboard; now {address}")
    parser.add_argument("--pass-env", action="append", default=[], metavar="NAME", help="a variable that goes along")
    parser.add_argument(
        "--shared", action="append", default=[], metavar="FOLDER", help="a folder that all machines have mounted"
    )
    parser.add_argument("--detach", action="store_true", help="submit, and do not follow the log")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="a table of the jobs that the cluster has seen")
    instead.add_argument("--status", metavar="RUN", help="what is known of a job: by its run's name or its id")
    instead.add_argument("--logs", metavar="RUN", help="follow a job's log from its beginning")
    instead.add_argument("--stop", metavar="RUN", help="end a job")
    return parser


# ---- what is asked for ---------------------------------------------------------------------------


def resolve(job: str, arguments: Sequence[str]) -> Resolved:
    """Reads a job's arguments as the job itself will.

    Ends the process with the job's own message and code 2 where they cannot be used.
    """
    module = importlib.import_module(f"jobs.{job}")
    if not hasattr(module, "parse"):
        with contextlib.redirect_stdout(io.StringIO()):
            module.main([*arguments, "--dry-run"])
        kind = next((word for word in arguments if not word.startswith("-")), job)
        return Resolved(kind, None, {})
    extra = getattr(module, OPTIONS[job]) if job in OPTIONS else None
    words = list(arguments)
    if job == "synthesize" and not any(word in module.KINDS for word in words):
        words.insert(0, module.KINDS[0])  # as the job does
    config, args = parse(module.__doc__, words, extra)
    return Resolved(config.run.name, config, {"--config": args.config, "--space": getattr(args, "space", None)})


def _submit(job: str, arguments: Sequence[str], args: argparse.Namespace) -> int:
    """Checks, submits and follows a job; returns its exit code."""
    resolved = resolve(job, arguments)
    environment = submission.chosen_environment(args.pass_env)
    files = packing.packed(packing.ROOT, packing.excluded(packing.ROOT))
    packing.check_package(files)
    for option, source in resolved.sources.items():
        places.travelling(option, source, files, packing.ROOT)
    run = job_names.fit(resolved.run)
    client: submission.Client | None = None
    others: list[str] = []
    name = job_names.Name(job, run, 1)
    try:
        client = submission.connect(args.address)
    except ClusterError as cause:
        if not args.dry_run:
            raise
        print(f"note: {cause}\nShown as the run's first attempt, on a cluster of this machine alone", file=sys.stderr)
    else:
        others = places.elsewhere(submission.nodes(args.address))
        name = submission.free_name(client, job, run, arguments, args.address)
    overrides = places.settled(job, resolved.config, others, args.shared) if resolved.config else []
    for text in places.warnings(resolved.config, others, environment):
        print(f"warning: {text}", file=sys.stderr, flush=True)
    request = submission.Request(name, (*arguments, *overrides), environment)
    if args.dry_run or client is None:
        _show(request, files)
        return 0
    submitted = submission.submit(client, request)
    print(f"submitted {submitted} to {args.address}: {request.entrypoint}", flush=True)
    if args.detach:
        return 0
    print("its log follows as soon as the cluster has started it, which Ray tries for 15 minutes", flush=True)
    return follow(client, submitted, args.address)


def _show(request: submission.Request, files: dict[str, int]) -> None:
    """What would be sent."""
    total, limit = packing.package_bytes(files) / 1e6, packing.limit_bytes() / 1e6
    print(f"id:           {request.name.id}")
    print(f"entrypoint:   {request.entrypoint}")
    print(f"environment:  {', '.join(request.environment) or 'nothing passed on'}")
    print(f"package:      {len(files)} files of {packing.ROOT}, {total:.1f} MB of at most {limit:.1f}; the largest:")
    print("\n".join(packing.largest(files)))


# ---- what goes on --------------------------------------------------------------------------------


def _manage(args: argparse.Namespace) -> int:
    """--list, --status, --logs or --stop."""
    client = submission.connect(args.address)
    known = client.list_jobs()
    if args.list:
        print(job_names.table(job_names.submitted(known)))
        return 0
    job = job_names.find(known, args.status or args.logs or args.stop)
    if args.logs:
        return follow(client, job.submission_id, args.address)
    if args.status:
        print(f"{job_names.table([job])}\n\n{submission.described(job, args.address)}")
    elif job.status.is_terminal():
        print(f"nothing to stop: {submission.outcome(job)}")
    else:
        print(submission.outcome(submission.stop(client, job)))
    return 0


def follow(client: submission.Client, submitted: str, address: str) -> int:
    """Shows a job's log until it ends; its exit code, or 130 where the log was left."""
    screen = Screen()
    log = JobLog(client, submitted, screen)
    stopping = False
    while True:
        try:
            job = log.follow()
            print(submission.outcome(job), flush=True)
            return submission.exit_code(job)
        except KeyboardInterrupt:
            screen.end_line()
            answer = "leave" if stopping else _asked(submitted)
        if answer == "leave":
            print(
                f"left the log; {submitted} goes on. Follow it again with --logs {submitted}, end it with --stop "
                f"{submitted}, both with --address {address}",
                file=sys.stderr,
                flush=True,
            )
            return INTERRUPTED
        if answer == "stop":
            stopping = True
            print(f"stopping {submitted}; Ctrl-C leaves its log", file=sys.stderr, flush=True)
            client.stop_job(submitted)


def _asked(submitted: str) -> str:
    """`stop`, `leave` or `follow`, as whoever pressed Ctrl-C wants it; `leave` where nobody can be asked."""
    if not sys.stdin.isatty():
        return "leave"
    print(
        f"\n{submitted}: [s]top the job, [l]eave its log and let it go on, or [f]ollow on? (leave) ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    try:
        answer = sys.stdin.readline().strip().lower()[:1]
    except KeyboardInterrupt:
        print(file=sys.stderr)
        answer = ""
    return {"s": "stop", "f": "follow"}.get(answer, "leave")


if __name__ == "__main__":
    main()
