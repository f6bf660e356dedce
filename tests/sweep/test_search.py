"""The search: what it proposes, what it tells Optuna, and how one that is begun anew goes on."""

from pathlib import Path

import pytest

from raysae.files import write_json
from raysae.sae.train import Member
from raysae.sweep.search import PackSearch
from raysae.sweep.space import Common, proposals
from raysae.sweep.trial import ProposedPack

WIDTHS = {"blocks.0.resid_post": 16, "blocks.1.resid_post": 16}
RANGES = {"relu": (0.01, 1.0), "topk": (2, 12)}


def search(pack_size: int = 1, seeds=(0,), samples: int = 3, sites=("blocks.0.resid_post",), **known) -> PackSearch:
    widths = {site: WIDTHS[site] for site in sites}
    plan = proposals(widths, ["relu", "topk"], [2, 4], None, samples)
    return PackSearch(plan, widths, RANGES, seeds, Common(None, 1e-3), pack_size, seed=0, **known)


def outcome(pack: ProposedPack) -> dict[str, dict]:
    """A made-up rung: less L1 or more k is a lower FVU and a higher L0."""
    metrics = {}
    for member in pack.members:
        l0 = float(member.config.k or 1 / member.config.l1_coefficient)
        metrics[member.sae_id] = {"fvu": 1 / (1 + l0), "l0": l0}
    return metrics


def drain(searcher: PackSearch) -> list[ProposedPack]:
    """Every pack, each finished before the next is asked for."""
    packs = []
    while (pack := searcher.propose()) is not None:
        packs.append(pack)
        searcher.reported(outcome(pack))
        searcher.trained(pack)
    assert not searcher.may_split
    return packs


def members(packs: list[ProposedPack]) -> list[Member]:
    return [member for pack in packs for member in pack.members]


def test_each_width_and_architecture_comes_equally_often():
    found = members(drain(search()))
    count = {(m.config.architecture, m.config.d_sae): 0 for m in found}
    for m in found:
        count[m.config.architecture, m.config.d_sae] += 1
    assert count == {("relu", 32): 3, ("relu", 64): 3, ("topk", 32): 3, ("topk", 64): 3}


def test_no_sae_is_proposed_twice_though_k_is_an_integer():
    found = [(m.config.d_sae, m.config.k) for m in members(drain(search(samples=8))) if m.config.k]
    assert len(set(found)) == len(found) == 16


def test_a_range_ends_where_the_latents_do():
    plan = proposals({"s": 16}, ["topk"], [0.5, 4], None, 7)
    searcher = PackSearch(plan, {"s": 16}, {"topk": (2, 32)}, (0,), Common(), 1, seed=0)
    found = [m.config for m in members(drain(searcher))]
    narrow = sorted(c.k for c in found if c.d_sae == 8)
    assert narrow == [2, 3, 4, 5, 6, 7, 8]  # each once, where 9 to 32 would all be k = 8
    assert max(c.k for c in found if c.d_sae == 64) > 8


def test_seeds_share_their_coefficient_and_are_told_as_one():
    searcher = search(seeds=(0, 1, 2))
    found = members(drain(searcher))
    by_proposal: dict[str, set] = {}
    for m in found:
        c = m.config
        by_proposal.setdefault(m.sae_id.split("-")[0], set()).add((c.l1_coefficient, c.k))
    assert len(found) == 3 * 12 and all(len(coefficients) == 1 for coefficients in by_proposal.values())
    told = [t for study in searcher.studies.values() for t in study.trials if t.state.is_finished() and t.values]
    assert len(told) == 12 and not searcher.open


@pytest.mark.parametrize("size", [1, 4, 5, 100])
def test_packs_hold_every_sae_once_and_one_site_each(size):
    searcher = search(pack_size=size, seeds=(0, 1), sites=WIDTHS)
    packs = drain(searcher)
    ids = [m.sae_id for m in members(packs)]
    assert len(packs) <= searcher.most_packs and len(set(ids)) == len(ids) == 48
    assert len(packs) == 2 * -(-24 // size)
    assert all(len(pack.members) <= size for pack in packs)


def test_a_member_that_its_pack_dropped_is_told_by_its_last_rung():
    searcher = search(pack_size=2)
    pack = searcher.propose()
    rung = outcome(pack)
    searcher.reported(rung)
    searcher.reported({i: m for i, m in rung.items() if i != pack.members[0].sae_id})
    searcher.trained(pack)
    told = [t.values for study in searcher.studies.values() for t in study.trials if t.values]
    assert sorted(told) == sorted([m["fvu"], m["l0"]] for m in rung.values())


def test_optuna_hears_of_failures_and_goes_on():
    searcher = search(samples=2)
    searcher.failed(searcher.propose())
    assert not searcher.open
    (failed,) = [t for study in searcher.studies.values() for t in study.trials if t.state.name == "FAIL"]
    assert failed.params
    assert len(drain(searcher)) == 7


def ended_of(packs: list[dict]) -> dict[str, dict]:
    return {sae_id: rung for pack in packs for sae_id, rung in outcome(pack).items()}


def test_a_search_begun_anew_over_the_same_folder_goes_on_the_same(tmp_path: Path):
    whole = drain(search(root=tmp_path / "whole"))
    first = search(root=tmp_path)
    begun = [first.propose() for _ in range(5)]  # one ended in another order, the fifth is running: then a kill
    ended = ended_of(begun[:4])
    again = search(root=tmp_path, ended=ended)
    assert not again.nothing_left
    rest = drain(again)
    assert begun[:4] + rest == whole and rest[0] == begun[4]
    told = [t.values for study in again.studies.values() for t in study.trials if t.values]
    assert len(told) == 12 and not again.open, "Optuna did not hear of those that had ended"
    assert search(root=tmp_path, ended=ended | ended_of(rest)).nothing_left


def test_what_was_proposed_before_is_proposed_again_whatever_optuna_thinks_now(tmp_path: Path):
    ids = [m.sae_id for m in members(drain(search(root=tmp_path)))]
    (file, *others) = sorted((tmp_path / "proposed").iterdir())
    write_json(file, {"coefficient": 0.123456789012345})
    others[0].write_text('{"coeff')  # a power cut: chosen anew
    found = members(drain(search(root=tmp_path)))
    assert found[0].config.l1_coefficient == 0.123456789012345
    assert len(found) == 12 and [m.sae_id for m in found][2:] == ids[2:]


def test_a_search_whose_proposals_are_not_all_made_has_something_left(tmp_path: Path):
    assert not search(root=tmp_path).nothing_left and not search().nothing_left


@pytest.mark.parametrize("size", [2, 5])
def test_packs_are_the_same_when_some_of_their_members_have_ended(tmp_path: Path, size):
    whole = drain(search(size, seeds=(0, 1), root=tmp_path))
    ended = ended_of(whole[:1]) | {whole[1].members[0].sae_id: {"fvu": 0.5, "l0": 3.0}}
    rest = drain(search(size, seeds=(0, 1), root=tmp_path, ended=ended))
    assert [pack.state for pack in rest] == [pack.state for pack in whole[1:]], "their state would not be found"
    assert rest[0].members == whole[1].members[1:] and rest[1:] == whole[2:]


def test_a_pack_that_did_not_fit_comes_again_in_halves_and_nothing_is_lost():
    searcher = search(pack_size=6, seeds=(0, 1))
    first = searcher.propose()
    searcher.did_not_fit(first)
    rest = drain(searcher)
    assert {len(pack.members) for pack in rest} == {3}
    ids = [m.sae_id for m in members(rest)]
    assert len(set(ids)) == len(ids) == 24 and {m.sae_id for m in first.members} < set(ids)
    assert not searcher.open, "an Optuna trial was not told"


def test_the_search_waits_for_packs_that_may_yet_be_split():
    searcher = search(pack_size=24)
    pack = searcher.propose()
    assert searcher.propose() is None and searcher.may_split
    searcher.did_not_fit(pack)
    assert not searcher.may_split
    assert len(searcher.propose().members) == 6
