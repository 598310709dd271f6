"""Hands a job to a running Ray cluster, follows its log and ends with its exit code.

    python -m jobs.submit train --address http://HEAD:8265 --config ffhq256 data.uri=s3://bucket/ffhq256
    python -m jobs.submit tune  --address http://HEAD:8265 --config ffhq256 --space patches

Everything that is not listed below is the job's own. The working directory travels without data, .git and
environments. Credentials stay here: give the nodes a role, or name variables with --pass-env, knowing that the
cluster shows them. Ctrl-C leaves the log; the job goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import failing_clearly

JOBS = tuple(
    sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if path.stem not in ("__init__", "cli", "models", "submit", "demo")
    )
)


@failing_clearly
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("job", choices=JOBS, metavar="JOB", help=f"one of {', '.join(JOBS)}")
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="the cluster's dashboard, http://HOST:8265")
    parser.add_argument("--pass-env", action="append", default=[], metavar="NAME", help="a variable that goes along")
    args, rest = parser.parse_known_args(argv)
    from pipeline.cluster.submission import submit

    sys.exit(submit(args.job, rest, args.address, args.pass_env))


if __name__ == "__main__":
    main()
