"""The page's budget: shares and bars where there are limits, red where they are passed, nothing where none was kept."""

import pytest
from report.test_report import Page, synthetic_decision, synthetic_run, synthetic_table

from raysae.files import read_json, write_json
from raysae.plan.budget import spending
from raysae.report import write_report
from raysae.report.parts.cost import budget_rows


@pytest.fixture
def page(tmp_path):
    def made(**limits):
        table = synthetic_table(4)
        run = synthetic_run(tmp_path / "run", table, synthetic_decision(table))
        ledger = read_json(run / "ledger.json")
        stages = [{**s, "gpu_seconds": 0} for s in ledger["stages"]]
        write_json(run / "ledger.json", {**ledger, "budget": spending(stages, limits)} if limits else ledger)
        html = write_report(run).read_text()
        Page(html)
        return html, run

    return made


def test_each_item_has_its_share_and_bar(page):
    html, run = page(device_hours=10.0, tokens=20_000_000)
    hours, tokens, disk = budget_rows(read_json(run / "ledger.json"))
    assert (hours["label"], hours["spent"], hours["share"], hours["width"]) == ("CPU-hours", "5.11", "51%", "51.1")
    assert (tokens["spent"], tokens["before"], tokens["over"], tokens["width"]) == (
        "24,960,000",
        "480,000",
        True,
        "100.0",
    )
    assert (disk["limit"], disk["width"]) == ("no limit", None)
    section = html[html.index("Against the budget") :]
    assert 'class="fail">125% over budget' in section and 'style="width: 51.1%"' in section
    assert section.index("CPU-hours") < section.index("Tokens, all stages") < section.index("On disk")


def test_a_ledger_without_a_budget_shows_none(page):
    html, _ = page()
    assert "What the run cost" in html and "Against the budget" not in html
