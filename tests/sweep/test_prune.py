"""Who is stopped early, and who never is."""

import inspect
import json
import math
from dataclasses import fields, replace

import pytest

from raysae.sweep.prune import Pruning, Rungs, Standing, Stop, reason_to_stop

ME = Standing("me", "relu", d_sae=256, fvu=0.30, l0=20.0)
BETTER = Standing("better", "relu", d_sae=256, fvu=0.20, l0=10.0)


def test_loss_is_not_even_known():
    assert {f.name for f in fields(Standing)} == {"sae_id", "architecture", "d_sae", "fvu", "l0"}
    assert set(inspect.signature(reason_to_stop).parameters) == {"sae", "peers", "margin"}


def test_a_peer_better_in_both_by_the_margin_dominates():
    assert "dominated by better" in reason_to_stop(ME, [BETTER], 0.1)
    assert reason_to_stop(ME, [], 0.1) is None and reason_to_stop(ME, [ME], 0.0) is None


@pytest.mark.parametrize(
    "peer",
    [
        replace(BETTER, fvu=0.31),  # better in one only
        replace(BETTER, l0=21.0),
        replace(BETTER, fvu=0.28),  # better in both, but within the margin in one
        replace(BETTER, l0=18.5),
        replace(BETTER, d_sae=257),  # another width learns at another pace
        replace(BETTER, d_sae=64),
        replace(BETTER, architecture="topk"),  # another architecture
        replace(BETTER, fvu=math.nan),
        replace(BETTER, l0=math.nan),
    ],
)
def test_who_does_not_dominate(peer):
    assert reason_to_stop(ME, [ME, peer], 0.1) is None


def test_two_saes_never_dominate_each_other():
    assert reason_to_stop(ME, [BETTER], 0.0) and reason_to_stop(BETTER, [ME], 0.0) is None


@pytest.mark.parametrize("bad", [{"fvu": math.nan}, {"fvu": math.inf}, {"l0": math.nan}])
def test_what_is_not_finite_has_diverged(bad):
    assert reason_to_stop(replace(ME, **bad), [], 0.1) == "diverged"


@pytest.mark.parametrize("bad", [{"fvu": 1.0}, {"fvu": 30.0}, {"l0": 0.0}, {"l0": 0.05}])
def test_what_is_no_better_than_the_mean_or_silent_has_collapsed(bad):
    assert reason_to_stop(replace(ME, **bad), [], 0.1).startswith("collapsed")


def rung(tokens, **fvu):
    """Metrics of relu SAEs of one width, their L0 ten times their FVU."""
    shared = {"architecture": "relu", "d_sae": 256, "tokens": tokens, "site": "s"}
    return {i: {"sae_id": i, "fvu": value, "l0": 10 * value, **shared} for i, value in fvu.items()}


def test_of_a_pack_those_are_stopped_that_its_others_dominate_after_warm_up():
    pruning = Pruning(0.1, 1000)
    assert pruning.reasons(500, rung(500, a=0.2, b=0.9)) == {}
    assert "dominated by a" in pruning.reasons(1000, rung(1000, a=0.2, b=0.9))["b"]
    assert pruning.reasons(1000, rung(1000, b=1.5)) == {}, "of one alone the sweep decides"
    assert Pruning(None, 0).reasons(1000, rung(1000, a=0.2, b=0.9)) == {}


def test_a_replay_stops_what_is_due():
    pruning = Pruning(stops={"a": Stop(1000, "so it was"), "gone": Stop(10, "it is in no pack")})
    assert pruning.reasons(500, rung(500, a=0.2)) == {}
    assert pruning.reasons(1000, rung(1000, a=0.2)) == {"a": "so it was"}


def test_a_pack_is_stopped_when_all_of_it_is_dominated_and_never_by_another_rung(tmp_path):
    rungs = Rungs(tmp_path, Pruning(0.1, 1000))
    assert rungs.reasons("s", rung(1000, good=0.1)) == {}
    assert rungs.reasons("s", rung(2000, bad=0.9)) == {}
    assert rungs.reasons("elsewhere", rung(1000, bad=0.9)) == {}
    assert rungs.reasons("s", rung(1000, bad=0.9, better=0.05)) == {}, "one of its SAEs is dominated by none"
    assert set(rungs.reasons("s", rung(1000, bad=0.9, worse=0.95))) == {"bad", "worse"}
    assert rungs.reasons("s", {}) == {}


def test_rungs_of_an_earlier_driver_count(tmp_path):
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "good.jsonl").write_text(json.dumps(rung(1000, good=0.1)["good"]) + "\n")
    assert "dominated by good" in Rungs(tmp_path, Pruning(0.1, 1000)).reasons("s", rung(1000, bad=0.9))["bad"]
    assert Rungs(tmp_path, Pruning()).reasons("s", rung(1000, bad=0.9)) == {}
