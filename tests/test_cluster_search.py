"""The grid and its table, without a cluster."""

from pipeline.cluster.search import Trial, ranked, table, trial_configs
from pipeline.config import load_config

SPACE = "tune.space={train.patch.size: [16, null], train.learning_rate: [0.001, 0.002]}"


def test_every_point_is_a_run_of_its_own() -> None:
    configs = trial_configs(load_config("demo", [SPACE, "run.name=grid", "train.evaluate_kimg="]))
    assert [config.run.name for config in configs] == ["grid-000", "grid-001", "grid-002", "grid-003"]
    assert {(config.train.patch.size, config.train.learning_rate) for config in configs} == {
        (16, 0.001), (16, 0.002), (None, 0.001), (None, 0.002)
    }  # fmt: skip
    assert all(config.train.evaluate_kimg == config.train.total_kimg for config in configs)


def test_the_best_comes_first_and_the_failed_last() -> None:
    found = [
        Trial("a", {"x": 1}, 5.0, 80),
        Trial("b", {"x": 2}, None, 0, "out of memory"),
        Trial("c", {"x": 3}, 4.0, 80),
    ]
    assert [trial.name for trial in ranked(found, "min")] == ["c", "a", "b"]
    assert [trial.name for trial in ranked(found, "max")] == ["a", "c", "b"]
    lines = table(ranked(found, "min"), "fid").splitlines()
    assert lines[0].split() == ["trial", "x", "fid", "kimg"]
    assert lines[1].split() == ["c", "3", "4.00", "80"]
    assert lines[3].split() == ["b", "2", "failed", "0"]
    assert lines[4] == "b: out of memory"
