"""A page is a list of parts: a study brings its own, and reuses the common ones, from its own file."""

import re
import subprocess
import sys

import pytest
from report.test_report import Page

from raysae.files import write_json
from raysae.gates.criteria import Gate
from raysae.gates.decision import settle
from raysae.gates.metrics import METRICS, Metric, register
from raysae.report import Part, page
from raysae.report.parts import config, decision, gate, nulls, probes

ASKED = {"criterion": "the factors are found", "metric": "parts_recovery", "op": ">=", "threshold": 0.5, "why": "so"}


@pytest.fixture(autouse=True, scope="module")
def _of_a_study():
    register(Metric("parts_recovery", "higher"))
    yield
    del METRICS["parts_recovery"]  # other files' tests know the metrics of the package alone


def factors(run_dir):
    return {"factors": ["<b>colour</b>", "shape"], "links": [("factors.csv", "All factors")]}


OWN = Part("factors", "Factors", "<h2>Factors</h2>{% for name in factors %}<p>{{ name }}</p>{% endfor %}", factors)


def study(folder, value=0.75):
    """A study's folder: no table, no SAE that was chosen."""
    gate_of_study = Gate.model_validate({"name": "factors", "criteria": [ASKED], "choose": None})
    null = {"kind": "shuffled", "parts_recovery": 0.1, "parts_recovery_low": 0.05, "parts_recovery_high": 0.15}
    write_json(folder / "decision.json", settle(gate_of_study, "g.yaml", {"parts_recovery": value}, {"n": null}))
    return folder


def test_a_study_s_page_has_its_own_part_between_the_common_ones(tmp_path):
    made = page([decision.PART, OWN, gate.PART, probes.PART, nulls.PART, config.PART], study(tmp_path))
    text = made.read_text()
    seen = Page(text)
    assert made == tmp_path / "report.html" and f"<title>go: {tmp_path.name}</title>" in text
    assert re.findall(r'<section id="(\w+)"', text) == ["decision", "factors", "gate", "nulls", "config"]
    assert seen.references == ["data:,", "#factors", "#gate", "#config", "factors.csv"], "probes have nothing to show"
    assert "&lt;b&gt;colour" in text and "SAE" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    assert "parts_recovery" in text and "≥ 0.5" in text and "✓ pass" in text and "is met on the test split" in text
    assert "shuffled" in text and "[0.05, 0.15]" in text and "fails, as it must" in text


def test_a_template_lies_in_a_file_and_a_page_may_have_another_name(tmp_path):
    (tmp_path / "own.html.j2").write_text('<table>{{ heads("Name", "#Value") }}<tr>{{ number(cell) }}</tr></table>')
    own = Part("own", "", tmp_path / "own.html.j2", lambda run_dir: {"cell": {"value": "1", "interval": "[0, 2]"}})
    text = page([decision.PART, own], study(tmp_path, 0.4), "factors.html").read_text()
    Page(text)
    assert '<th scope="col" class="n">Value</th>' in text and '<td class="n">1<small>[0, 2]</small></td>' in text
    assert "no-go" in text and "parts_recovery 0.4, must be &gt;= 0.5" in text and 'href="#own"' not in text


def test_what_names_parts_needs_nothing_that_draws():
    code = """
import sys
for name in ("ray", "jinja2", "markupsafe", "matplotlib"):
    sys.modules[name] = None
import raysae.report.sae_page, raysae.run_folder
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
