"""The module table carries the totals of the paper."""

from pipeline.models.build import ModelConfig
from pipeline.models.summary import summary_table


def test_the_paper_s_totals_stand_in_the_table() -> None:
    table = summary_table(ModelConfig())
    assert "45,911,076" in table and "28,864,129" in table
    rows = [line.split() for line in table.splitlines()]
    (embedding,) = [row for row in rows if row and "33,554,432" in row]
    assert embedding[0].startswith("generator.encoding")


def test_patches_have_a_discriminator_of_their_own() -> None:
    assert "26,488,833" in summary_table(ModelConfig(), patch=64)


def test_rows_add_up_to_the_total() -> None:
    for table in summary_table(ModelConfig(size=32, width=16, latent=16)).split("\n\n"):
        *rows, total = [int(line.split()[-1].replace(",", "")) for line in table.splitlines()[1:]]
        assert sum(rows) == total
