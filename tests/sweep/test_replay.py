"""A replay has the ids, configs and seeds of the SAEs that were trained, and their stops."""

from types import SimpleNamespace

import pandas as pd
import pytest

from raysae.files import read_json
from raysae.sweep import trial
from raysae.sweep.prune import Pruning, Stop
from raysae.sweep.replay import replay
from raysae.sweep.space import Common, Proposal, members
from raysae.sweep.trial import ProposedPack, Rung

SITE, D_IN = "blocks.0.resid_post", 64
TRAINED = [
    (Proposal(0, SITE, "relu", 2.3, None), 0.123456789),
    (Proposal(1, SITE, "topk", 4, None), 9),
    (Proposal(2, SITE, "relu_unit_norm", 4, None), 0.3),
    (Proposal(3, SITE, "jumprelu_l0", 16, None), 0.0123456),
]


def trained(common=Common(), seeds=(0, 3)):  # noqa: B008
    made = []
    for proposal, value in TRAINED:
        made += members(proposal, value, D_IN, seeds, common)
    return made


def table_of(made):
    rows = []
    for m in made:
        c = m.config
        knobs = {k: getattr(c, k) for k in ("l1_coefficient", "k", "target_l0", "l0_coefficient")}
        facts = {"sae_id": m.sae_id, "site": SITE, "d_sae": c.d_sae, "status": "completed", "status_reason": ""}
        rows.append({**facts, **knobs, "tokens": 1000})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("units", ["unit_norm", "mean_error"])
def test_it_trains_the_same_members(units):
    made = trained(Common(l1_units=units))
    again = []
    for proposal in replay(table_of(made)).plan:
        again += members(proposal, proposal.coefficient, D_IN, (0, 3), Common())
    assert again == made


def test_what_was_pruned_is_stopped_there():
    table = table_of(trained())
    table.loc[2, ["status", "status_reason", "tokens"]] = ["pruned", "dominated by 001", 600]
    found = replay(table)
    assert {i: (s.tokens, s.reason) for i, s in found.stops.items()} == {table["sae_id"][2]: (600, "dominated by 001")}
    assert len(found.plan) == 4 and found.fingerprint != replay(table_of(trained())).fingerprint


def test_a_table_of_other_ids_is_no_sweeps():
    table = table_of(trained())
    table.loc[0, "sae_id"] = "mine"
    with pytest.raises(ValueError, match="no id that a sweep gives"):
        replay(table)


def test_a_trial_drops_what_is_due_at_its_rung_and_says_why(monkeypatch, tmp_path):
    one, two = trained(seeds=(0,))[1], trained(seeds=(0,))[3]
    dropped = []

    def train_pack(trial, site, pack, report, *_):
        for tokens in (500, 1000):
            metrics = {m.sae_id: {"sae_id": m.sae_id, "tokens": tokens} for m in (one, two)}
            dropped.append(list(report(Rung(tokens, metrics, final=False, save=lambda folder: None))))

    monkeypatch.setattr(trial, "train_pack", train_pack)
    pruning = Pruning(stops={two.sae_id: Stop(1000, "dominated by 001")})
    pack = ProposedPack(SITE, (one, two), "a")
    assert trial.train_proposed(SimpleNamespace(root=tmp_path), pack, pruning, lambda rung: {})
    assert dropped == [[], [two.sae_id]]
    assert read_json(tmp_path / "pruned" / f"{two.sae_id}.json") == {"reason": "dominated by 001"}
