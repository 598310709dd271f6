"""What is said of a file that is too short."""

import pickle

from pipeline.data.fetch_errors import truncated


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(truncated("s3://b/k", 4, 6, 7)))
    assert str(error) == "s3://b/k: has 7 bytes, fewer than the 10 needed; restore it from a copy" and error.size == 7


def test_the_size_may_be_unknown() -> None:
    assert str(truncated("s3://b/k", 4, 6, None)).startswith("s3://b/k: has fewer than the 10 needed")
