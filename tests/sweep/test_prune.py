"""Who is stopped early, and who never is."""

import inspect
import math
from dataclasses import fields, replace

import pytest

from raysae.sweep.prune import Standing, reason_to_stop

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
