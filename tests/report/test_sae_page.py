"""Pages of single SAEs: whole, offline, hostile text harmless, and in a browser what a reader does with them."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from browser import visit
from test_report import Page, synthetic_decision, synthetic_run, synthetic_table

from raysae.report import sae_page, write_report

HOSTILE = '</script><img src="http://x.invalid/i.png" onerror="alert(1)"><!--'
LATENTS = 120


def synthetic_cards(latents: int = LATENTS, contexts: int = 4) -> list[dict]:
    """Cards as features.py writes them: latent i fires most on the word `w<i>`, one token has a hostile text, the last
    latent is dead."""
    rng = np.random.default_rng(0)
    cards = []
    for i in range(latents):
        if i == latents - 1:
            cards.append({"latent": i, "density": 0.0, "active_rows": 0, "dead": True, "n_contexts": 0, "n_examples": 0,
                          "histogram": [0] * 5, "top_contexts": [], "random_contexts": []})  # fmt: skip
            continue
        places = []
        for rank in range(contexts):
            tokens = [f" t{j}" for j in range(7)]
            tokens[3], tokens[5] = f" w{i}", HOSTILE
            largest = float(i + 1) * (1 - rank / 10)
            activations = [None, 0.0, round(largest / 3, 4), round(largest, 4), 0.0, -0.5, 0.0]
            places.append({"example_id": f"toy/{i}/{rank}", "position": 13, "token_id": i, "activation": activations[3],
                           "first": 10, "tokens": tokens, "activations": activations})  # fmt: skip
        cards.append(
            {
                "latent": i, "density": round(float(rng.uniform(0.001, 0.2)), 4), "active_rows": 10 * i + 1, "dead": False,
                "dense": False, "mean": (i + 1) / 2, "max": float(i + 1), "n_contexts": contexts, "n_examples": contexts,
                "token_agreement": 1.0, "token_agreement_active": 0.5, "token_agreement_null": 0.02,
                "coherence": round(float(rng.uniform()), 4), "coherence_active": 0.3, "coherence_null": 0.001,
                "nearest_latent": (i + 1) % latents, "nearest_cosine": 0.25,
                "label_step_type": "equation" if i % 2 else "other", "purity_step_type": 0.75, "entropy_step_type": 0.8,
                "base_rate_step_type": 0.4, "purity_step_type_null": 0.6,
                "histogram": [9, 5, 2, 0, 1], "top_contexts": places, "random_contexts": places[::-1][:2],
            }
        )  # fmt: skip
    return cards


def with_features(run: Path, sae_id: str, cards: list[dict]) -> None:
    folder = run / "saes" / sae_id / "features"
    folder.mkdir(parents=True)
    (folder / "cards.jsonl").write_text("".join(json.dumps(card, ensure_ascii=False) + "\n" for card in cards))
    mean = {"value": 0.61, "low": 0.55, "high": 0.66, "n": 119, "null": 0.02, "above_null": 0.59}
    summary = {
        "sae_id": sae_id, "split": "validation", "rows": 24_870, "latents": len(cards), "dead": 1, "dead_fraction": 0.01,
        "dense_fraction": 0.25, "dense_above": 0.1,
        "density_histogram": {"edges": [-2.0, -1.0, 0.0], "counts": [70, 49], "never": 1},
        "means": {"token_agreement": mean, "purity_step_type": mean},
        "untrained": {"token_agreement": mean | {"value": 0.46}},
        "silhouette": {"rows": 100, "latents": 9, "value": 0.2, "null": -0.3},
        "decoder": {"value": 0.4, "low": 0.3, "high": 0.5, "n": 119, "null": 0.2},
    }  # fmt: skip
    (folder / "features.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return synthetic_table()


@pytest.fixture(scope="module")
def run(tmp_path_factory, table) -> Path:
    decision = synthetic_decision(table)
    folder = synthetic_run(tmp_path_factory.mktemp("pages") / "run", table, decision)
    with_features(folder, decision["chosen"], synthetic_cards())
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def chosen(run, table) -> Path:
    return run / "saes" / synthetic_decision(table)["chosen"] / "index.html"


def test_every_completed_sae_has_a_page_that_the_report_links_and_that_links_back(run, table):
    report = Page((run / "report.html").read_text())
    linked = [reference for reference in report.references if reference.endswith(".html")]
    done = table.loc[table["status"] == "completed", "sae_id"]
    assert {Path(reference).parent.name for reference in linked} == set(done) and len(done) < len(table)
    for reference in linked:
        page = run / reference
        text = page.read_text()
        assert (
            page.parent.name in text
            and (page.parent / "../../report.html").resolve() == (run / "report.html").resolve()
        )
        ids = Page(text).ids
        assert len(ids) == len(set(ids))
        for other in Page(text).references:
            assert other in ("data:,", "../../report.html") or other[1:] in ids or other.startswith("#density-"), other


def test_a_page_says_what_was_measured_why_it_was_rejected_and_what_was_not(run, chosen, table):
    text = unescape(chosen.read_text())
    row = table.set_index("sae_id").loc[chosen.parent.name]
    assert "The chosen SAE" in text and "What is not reconstructed cannot be explained." in text
    assert f"[{row['fvu_low']:.4f}, {row['fvu_high']:.4f}]" in text and "fraction of variance unexplained" in text
    assert "1 of 120 latents never fired" in text and "0.460" in text and "0.610" in text
    assert {path.name for path in (chosen.parent / "figures").iterdir()} == {"density.svg", "density.png"}
    other = next(i for i in table.loc[table["status"] == "completed", "sae_id"] if i != chosen.parent.name)
    text = unescape((run / "saes" / other / "index.html").read_text())
    reason = synthetic_decision(table)["rejected"].get(other)
    assert "Not measured for this SAE" in text and 'id="data"' not in text
    assert reason is None or f"Why it was not chosen: {reason[0]}" in text
    assert text.count('class="curve"') == 2


def test_text_of_tokens_cannot_leave_its_script(chosen):
    text = chosen.read_text()
    assert "img" not in Page(text).tags and "<!--" not in text.replace("<!doctype", "")
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S).group(1))
    assert HOSTILE in data["pieces"]


def test_compact_cards_say_the_same_as_the_cards():
    cards = synthetic_cards(9)
    data = json.loads(sae_page.script_json(sae_page.compact(iter(cards), 3)))
    for i, card in enumerate(cards):
        assert len(data["top"][i]) == min(3, len(card["top_contexts"]))
        for place, context in zip(data["top"][i], card["top_contexts"], strict=False):
            example, position, first, count, *pairs = place
            name, start, pieces = data["examples"][example]
            assert (name, position) == (context["example_id"], context["position"])
            assert [data["pieces"][pieces[first - start + k]] for k in range(count)] == context["tokens"]
            values = dict(zip(pairs[::2], pairs[1::2], strict=True))
            assert [values.get(k, 0) for k in range(count)] == pytest.approx(
                [a or 0 for a in context["activations"]], rel=6e-3
            )
    assert data["numbers"]["max"] == [*range(1, 9), None]
    assert data["labels"]["step_type"][0] == ["other", 0.75, 0.8, 0.4, 0.6] and data["labels"]["step_type"][-1] is None


def test_windows_of_one_example_share_its_text_and_leave_gaps():
    card = synthetic_cards(2)[0]
    early = card["top_contexts"][0]
    late = early | {"position": 33, "first": 30, "tokens": [f" u{j}" for j in range(7)]}
    overlap = early | {"position": 15, "first": 12, "tokens": [*early["tokens"][2:], " a", " b"]}
    data = sae_page.compact(iter([card | {"top_contexts": [early, late, overlap]}]), 3)
    (example,) = [e for e in data["examples"] if e[0] == early["example_id"]]
    shown = [data["pieces"][k] if k >= 0 else None for k in example[2]]
    assert shown == [*early["tokens"], " a", " b", *[None] * 11, *late["tokens"]] and example[1] == 10


def test_a_page_too_large_shows_fewer_contexts_and_says_so(tmp_path, table, monkeypatch):
    decision = synthetic_decision(table)
    run = synthetic_run(tmp_path / "run", table, decision, extras=False)
    with_features(run, decision["chosen"], synthetic_cards(40, contexts=8))
    size = {
        n: len(sae_page.script_json(sae_page.compact(iter(synthetic_cards(40, contexts=8)), n))) for n in (50, 5, 3)
    }
    assert size[50] > size[5] > size[3]
    monkeypatch.setattr(sae_page, "FULL_SIZE", size[5])
    write_report(run)
    text = (run / "saes" / decision["chosen"] / "index.html").read_text()
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S).group(1))
    assert [len(top) for top in data["top"]] == [3] * 39 + [0] and data["numbers"]["n_contexts"][0] == 8


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


def test_the_browser_sees_errors_and_requests(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<!doctype html><title>x</title><img src="http://x.invalid/i.png">')
    seen = visit(page, tmp_path, script="undefined.nothing")
    assert "TypeError" in seen.console[0] and seen.asked == ["http://x.invalid/i.png"]


def test_in_a_browser_the_table_sorts_and_leads_to_the_chosen_sae_s_page(run, chosen, table, tmp_path):
    click = """
    [...document.querySelectorAll("#saes thead button")].find(button => button.textContent === "FVU").click();
    const link = document.querySelector("#saes tr.lead th a");
    document.title = link.href;"""
    seen = visit(run / "report.html", tmp_path, click)
    order = re.findall(r'<tr data-sae="([^"]*)"', seen.dom)
    measured = table.dropna(subset="fvu").sort_values("fvu")
    assert order[: len(measured)] == list(measured["sae_id"]) != list(table["sae_id"])
    assert f"<title>{chosen.as_uri()}</title>" in seen.dom
    assert seen.console == [] and seen.asked == []


def test_in_a_browser_the_list_sorts_searches_and_opens_a_card_with_its_contexts(chosen, tmp_path):
    act = """
    const head = name => [...document.querySelectorAll("#latents thead button")].find(b => b.textContent === name);
    const first = () => document.querySelector("#latents tbody button").textContent;
    const seen = [first()];
    head("Latent").click(); seen.push(first());
    head("Max").click(); seen.push(first());
    document.getElementById("next").click(); seen.push(first());
    const search = document.getElementById("search");
    const look = text => {
      search.value = text;
      search.dispatchEvent(new Event("input"));
      seen.push(document.getElementById("count").textContent);
    };
    look("equation"); look("dead"); look("w41");
    document.querySelector("#latents tbody button").click();
    const resources = performance.getEntriesByType("resource").length;
    document.title = JSON.stringify([...seen, document.activeElement.textContent, resources]);"""
    seen = visit(chosen, tmp_path, act)
    title = json.loads(unescape(re.search(r"<title>(.*?)</title>", seen.dom).group(1)))
    assert title == ["118", "0", "118", "68", "59 of 120", "1 of 120", "1 of 120", "Close", 0]
    card = re.search(r'<dialog id="card".*?</dialog>', seen.dom, re.S).group()
    assert ' open=""' in card[:80] and "Latent 41" in card
    lines = re.findall(r'<div class="context">(.*?)</div>', card)
    assert len(lines) == 6
    spans = [re.findall(r"<span([^>]*)>(.*?)</span>", line) for line in lines]
    assert [unescape(text) for _, text in spans[0]] == [" t0", " t1", " t2", " w41", " t4", HOSTILE, " t6"]
    shade = [re.search(r"var\((--\w+)\) / ([\d.]+)", attributes) for attributes, _ in spans[0]]
    assert [found and found.group(1) for found in shade] == [None, None, "--heat", "--heat", None, "--cold", None]
    assert float(shade[3].group(2)) > 2 * float(shade[2].group(2)) > 0
    assert 'class="at"' in spans[0][3][0] and 'title="activation 42"' in spans[0][3][0]
    for shown in ("toy/41/0, token 13", '<td class="n">0.02</td>', "step type", "<rect"):
        assert shown in card
    assert "<img" not in card and seen.console == [] and seen.asked == []


def test_a_card_can_be_linked_and_a_dead_latent_says_so(chosen, tmp_path):
    keys = """document.getElementById("card").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));"""
    dead = visit(chosen, tmp_path, fragment=f"#latent-{LATENTS - 1}")
    assert "Dead: it fired on none of 24,870 tokens" in dead.dom and dead.console == []
    assert '<h2 id="title">Latent 6</h2>' in visit(chosen, tmp_path, keys, fragment="#latent-5").dom
