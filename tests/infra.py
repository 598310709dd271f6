"""What tests of the files in infra/ share."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pinned(package: str) -> str:
    """The version in constraints.txt."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None, f"constraints.txt does not pin {package}"
    return found[1]
