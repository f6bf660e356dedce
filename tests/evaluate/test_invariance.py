"""Overlaps against a plain computation, one example at a time; what did not change is averaged in nowhere."""

from __future__ import annotations

from dataclasses import replace

import helpers
import numpy as np
import pytest
import torch
from helpers import BOS, D_MODEL, tiny_block, tiny_host
from safetensors.torch import save_file

from raysae.data.perturb import ORIGINAL, kinds_for
from raysae.data.records import make_problem
from raysae.data.tokens import read_block, tokenize
from raysae.evaluate import invariance
from raysae.evaluate.statistics import Bootstrap
from raysae.files import write_json
from raysae.models.embedded import build_tokenizer
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig, initial_parameters
from raysae.sae.sae import SAE

SITE = "blocks.0.resid_post"
CONFIG = SAEConfig("topk", D_MODEL, 24, k=3, seed=2)


@pytest.fixture
def sae(tmp_path):
    made = SAE(CONFIG, initial_parameters(CONFIG, torch.zeros(D_MODEL)))
    formats.save(made, tmp_path / "sae")
    return made


def test_latents_of_each_example(tmp_path, sae, monkeypatch):
    monkeypatch.setattr(invariance, "ROWS_AT_ONCE", 5)
    host, block = tiny_host(), tiny_block("validation", 0)
    task = invariance.Reading(SITE, tmp_path / "sae", tmp_path / "out", 24)
    assert not invariance.done(task.root, block.name)
    facts = task(host, block)
    assert facts["rows"] == sum(int(m.sum()) for m in block.loss_mask) and invariance.done(task.root, block.name)
    found = formats.load_tensors(task.root / f"{block.name}.safetensors")
    for i, ids in enumerate(block.input_ids):
        x = host.read(torch.from_numpy(ids)[None], None, [SITE])[SITE][0]
        f = sae.encode(x[torch.from_numpy(ids != BOS)])
        assert torch.equal(found["active"][i], (f != 0).any(0))
        assert torch.allclose(found["mean"][i], f.mean(0), atol=1e-6)


def problems(n=12):
    words = ["Anna has {} apples.", "Ben buys {} pears, then he eats them.", "Mia finds {} toys at school"]
    return [
        make_problem(f"p/{i}", "toy", words[i % 3].format(3 + i), answer="#### 4", group=f"g{i // 2}") for i in range(n)
    ]


def test_the_sample_has_no_two_of_a_group():
    chosen = invariance.sample(problems(), 4, 0)
    assert len(chosen) == 4 == len({p.group for p in chosen})
    assert len(invariance.sample(problems(), 100, 0)) == 6
    assert invariance.sample(problems(), 4, 0) == chosen
    assert any(invariance.sample(problems(), 4, seed) != chosen for seed in range(1, 5))


def test_partners_are_others_of_the_same_stratum():
    mixed = [replace(p, stratum="a" if i < 7 else "b") for i, p in enumerate(problems(10))]
    mixed.append(replace(problems(11)[-1], stratum="lonely"))
    for seed in range(10):
        stratum = {p.example_id: p.stratum for p in mixed}
        found = invariance._partners(stratum, seed)
        assert found.pop("p/10") is None
        assert all(one != two and stratum[one] == stratum[two] for one, two in found.items())


class Collected:
    """Six examples whose latents are given by hand, written as blocks are."""

    def __init__(self, tmp_path):
        self.tmp_path, tokenizer = tmp_path, build_tokenizer()
        sampled = [make_problem(f"p/{i}", "toy", f"Ada has {i + 3} apples.", answer="#### 4") for i in range(6)]
        made = [replace(p, example_id=f"{p.example_id}#{ORIGINAL}", answer="", split="validation") for p in sampled]
        for i, p in enumerate(sampled):
            if i != 5:  # 5 holds nothing of the kind
                text = p.question if i == 4 else f"Ada has {i + 20} apples."  # 4 keeps its tokens
                made.append(
                    replace(p, example_id=f"{p.example_id}#numbers", question=text, answer="", split="validation")
                )
        self.blocks = tokenize(made, tokenizer, 64, "problems", 10_000, 0, tmp_path / "tokens")["blocks"]
        strata = {p.example_id: p.stratum for p in sampled}
        facts = {"strata": strata, "kinds": ["numbers"], "blocks": self.blocks}
        write_json(tmp_path / "tokens" / "sample.json", facts)
        self.latents = {}
        for i in range(6):
            f = np.zeros(8)
            f[[i, 6]] = [1.0, 2.0]
            self.latents[f"p/{i}#{ORIGINAL}"] = f
            after = f.copy()
            after[7] = 1.0  # one more latent: Jaccard 2/3
            self.latents[f"p/{i}#numbers"] = after

    def collect(self):
        (self.tmp_path / "latents").mkdir(exist_ok=True)
        for entry in self.blocks:
            ids = read_block(self.tmp_path / "tokens" / entry["file"]).example_ids
            mean = torch.from_numpy(np.stack([self.latents[i] for i in ids])).float()
            save_file({"active": mean != 0, "mean": mean}, self.tmp_path / "latents" / f"{entry['name']}.safetensors")
        found = invariance.collect(self.tmp_path / "latents", self.tmp_path / "tokens", Bootstrap(100, 0.95, 0))
        return found["kinds"][0]


def test_overlap_stands_beside_that_with_another_example(tmp_path):
    found = Collected(tmp_path).collect()
    assert (found["affected"], found["same_tokens"], found["not_found"]) == (4, 1, 1) and found["compared"] == 4
    assert found["jaccard"] == pytest.approx(2 / 3) and found["jaccard_null"] == pytest.approx(1 / 3)
    assert found["jaccard_above"] == pytest.approx(1 / 3)
    assert found["cosine"] == pytest.approx(5 / np.sqrt(5 * 6), abs=1e-6)
    assert found["cosine_null"] == pytest.approx(4 / 5, abs=1e-6)
    assert found["jaccard_low"] <= found["jaccard"] <= found["jaccard_high"]


def test_latents_that_always_fire_are_not_invariant_but_blind(tmp_path):
    world = Collected(tmp_path)
    world.latents = {name: np.ones(8) for name in world.latents}
    found = world.collect()
    assert found["jaccard"] == found["jaccard_null"] == 1 and found["jaccard_above"] == 0


def test_what_is_written_reworded_is_read_and_collected(tmp_path, sae, monkeypatch):
    """Another number of resamples needs the files alone, and moves nothing but the ends of intervals."""
    monkeypatch.setattr(helpers, "VOCAB", len(build_tokenizer()))
    known = [replace(p, split="validation" if i % 6 else "train") for i, p in enumerate(problems())]
    made = invariance.write_variants(tmp_path / "tokens", known, 6, build_tokenizer(), 64, 10_000, 0)
    task = invariance.Reading(SITE, tmp_path / "sae", tmp_path / "latents", 24)
    for entry in made["blocks"]:
        task(tiny_host(), read_block(tmp_path / "tokens" / entry["file"]))
    few, many = (
        invariance.collect(tmp_path / "latents", tmp_path / "tokens", Bootstrap(n, 0.95, 0)) for n in (20, 400)
    )
    assert few["examples"] == 6 and few["too_long"] == 0 and [k["kind"] for k in few["kinds"]] == [*kinds_for(known)]
    for one, two in zip(few["kinds"], many["kinds"], strict=True):
        ends = {f"{name}{end}" for name in invariance.MEASURES for end in ("_low", "_high")}
        assert {k: v for k, v in one.items() if k not in ends} == {k: v for k, v in two.items() if k not in ends}
    assert any(kind["compared"] for kind in few["kinds"])
