"""The dashboard: what Grafana needs of its file, and no metric in it that nobody exports."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import metrics

ROOT = Path(__file__).parents[1]
DASHBOARD = json.loads((ROOT / "infra/grafana/training.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OWN = {*metrics.GAUGES, metrics.SCALAR, metrics.DISTANCE, f"{metrics.CHECKPOINTS}_total"}


def queries() -> list[str]:
    """Every expression of the dashboard, those of its variables too."""
    panels = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return panels + [each["definition"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]


def names(query: str) -> set[str]:
    """The metrics of an expression."""
    return set(re.findall(r"\bray_(\w+)", query))


def test_grafana_can_load_it() -> None:
    assert re.fullmatch(r"[a-z-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD  # of the database it was exported from, and refused by any other
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_has_a_place_a_source_and_queries(panel: dict[str, Any]) -> None:
    place = panel["gridPos"]
    assert place["w"] > 0 and place["h"] > 0 and 0 <= place["x"] and place["x"] + place["w"] <= 24
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["description"] and panel["targets"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        assert names(target["expr"]), target
        for metric, tags in re.findall(r"\bray_(\w+)(?:\{(.*?)\})?", target["expr"]):
            assert tags.startswith('run=~"$run"' if metric.startswith("cips_") else 'instance=~"$instance"')


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_source_is_chosen_by_a_variable() -> None:
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert {name for query in queries() for name in re.findall(r"\$(\w+)", query)} == {"run", "instance"}
    assert variables.keys() == {"datasource", "run", "instance"}


def test_it_draws_what_runs_export_and_all_of_it() -> None:
    drawn = {name for query in queries() for name in names(query) if name.startswith("cips_")}
    assert drawn == OWN
