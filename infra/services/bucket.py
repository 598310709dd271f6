"""Says whether an S3 service stores objects, and makes the bucket on the way.

    AWS_ENDPOINT_URL=http://HOST:PORT AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... python bucket.py NAME --wait 60

local.sh and compose.yaml call it. Exit code 0: an object was written; 1: not within the time, and why.
"""

import argparse
import os
import sys
import time

import pyarrow.fs as pafs

PAUSE_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the bucket")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="how long to try; once if left out")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.wait
    while True:
        try:
            store_an_object(arguments.name)
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                sys.exit(f"{os.environ.get('AWS_ENDPOINT_URL')} stores no object in bucket {arguments.name}: {error}")
            time.sleep(PAUSE_S)


def store_an_object(bucket: str) -> None:
    """Writes a mark into the bucket, made if it is missing. Raises OSError where that fails.

    An answering port is not enough: the gateway answers before the volumes behind it take data.
    """
    scheme, _, address = os.environ["AWS_ENDPOINT_URL"].partition("://")
    filesystem = pafs.S3FileSystem(
        endpoint_override=address,
        scheme=scheme,
        region=os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        connect_timeout=2,
        request_timeout=10,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
        allow_bucket_creation=True,
        allow_delayed_open=True,
    )
    if filesystem.get_file_info(bucket).type == pafs.FileType.NotFound:
        filesystem.create_dir(bucket)
    with filesystem.open_output_stream(f"{bucket}/.ready") as stream:
        stream.write(b"ready\n")


if __name__ == "__main__":
    main()
