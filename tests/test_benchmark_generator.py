import json
from pathlib import Path

import pytest

from jobs.benchmark import main


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "generator.json"
    words = f"generator --size 8 --width 16 --batch 2 --rounds 1 --precisions fp32 --recompute none,layer --json {file}"
    main(words.split())
    output = capsys.readouterr().out
    assert "fast, fp32, recompute=none" in output and "reference, fp32, memory returned" in output
    content = json.loads(file.read_text())
    assert len(content["rows"]) == 4 and content["rates"]["fp32"] > 0


@pytest.mark.parametrize("words", ["--size 12", "--width 0", "--precisions fp8", "--recompute all", "--forms slow"])
def test_nonsense_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generator", *words.split()])
    assert "expected" in capsys.readouterr().err
