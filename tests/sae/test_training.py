"""The pack trainer against a plain autograd loop; members that do not notice each other; resuming to the same bits."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import sparse_rows

from raysae.errors import UserError
from raysae.sae.architectures import SAEConfig, initial_parameters
from raysae.sae.train import InputScale, Member, Pack, Recipe

D, BATCH = 8, 32
RECIPE = Recipe(
    steps=50, batch_size=BATCH, warmup_steps=5, decay_steps=10, l1_warmup_steps=15, dead_after_tokens=2 * BATCH
)
ROWS = sparse_rows(50 * BATCH, D, seed=1) * 3
ROWS[20 * BATCH : 22 * BATCH] *= 10  # two batches whose gradients must be clipped
SCALE = InputScale(ROWS.mean(0), ROWS.double().square().sum(1).mean().item())
BATCHES = ROWS.split(BATCH)

RELU = Member("relu", SAEConfig("relu", D, 48, l1_coefficient=1.5, seed=1), 3e-2)
TOPK = Member("topk", SAEConfig("topk", D, 40, k=2, seed=2), 1e-2)
# Rows with a single latent start with a gradient of exactly zero (tied weights), of which Adam would magnify the rounding.
BATCHTOPK = Member("batchtopk", SAEConfig("batchtopk", D, 40, k=6, seed=4), 1e-2)
WIDE = Member("wide", SAEConfig("relu", D, 64, l1_coefficient=0.05, seed=3), 1e-3)


def trained(members, batches=BATCHES, recipe=RECIPE):
    pack = Pack(members, recipe, SCALE)
    pack.train(batches)
    return pack


def bits(pack, sae_id):
    """Everything a member is: parameters, Adam's moments and step, silent tokens."""
    return pack._members[sae_id].tensors()


def assert_same_bits(one, two):
    assert set(one) == set(two)
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


def reference(member, batches, recipe, scale):
    """What the pack should do, with autograd and torch's Adam; and on how many steps the rare branches were taken."""
    c = member.config
    start = initial_parameters(c, scale.mean * scale.factor)
    p = {k: start[k].requires_grad_() for k in ("W_enc", "b_enc", "W_dec", "b_dec")}
    sparse, threshold = c.architecture != "relu", None
    adam = torch.optim.Adam(p.values(), lr=member.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    silent, seen = torch.zeros(c.d_sae), {"clipped": 0, "unclipped": 0, "dead": 0}
    for t, batch in enumerate(batches):
        x = batch / math.sqrt(scale.mean_square_norm)
        pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        if c.architecture == "batchtopk":
            kept = pre >= pre.flatten().sort(descending=True).values[c.k * len(x) - 1]
        else:
            kept = torch.zeros_like(pre).scatter(1, pre.topk(c.k or c.d_sae, dim=1).indices, 1.0)
        f = pre.relu() * kept
        if c.architecture == "batchtopk":
            smallest = f[f > 0].min().detach()
            threshold = smallest if threshold is None else 0.99 * threshold + 0.01 * smallest
        e = x - f @ p["W_dec"] - p["b_dec"]
        l1 = (c.l1_coefficient or 0.0) * min(1, (t + 1) / recipe.l1_warmup_steps)
        loss = e.square().sum(1).mean() + l1 * (f * p["W_dec"].norm(dim=1)).sum(1).mean()
        plain, dead = loss.item(), silent >= recipe.dead_after_tokens
        if sparse and dead.any():
            pre_dead, e_fixed = pre[:, dead], e.detach()
            index = pre_dead.topk(min(x.shape[1] // 2, int(dead.sum())), dim=1).indices
            e_hat = (pre_dead.relu() * torch.zeros_like(pre_dead).scatter(1, index, 1.0)) @ p["W_dec"][dead]
            ratio = (x - x.mean(0)).square().sum() / (e_fixed - e_fixed.mean(0)).square().sum()
            loss = loss + (e_fixed - e_hat).square().sum(1).mean() * ratio / 32
            seen["dead"] += 1
        adam.zero_grad()
        loss.backward()
        w = p["W_dec"]
        if sparse:
            w.grad -= (w.grad * w.detach()).sum(1, keepdim=True) * w.detach()
        norm = torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0)
        seen["clipped" if norm > 1 else "unclipped"] += 1
        up, down = (t + 1) / recipe.warmup_steps, (recipe.steps - t) / recipe.decay_steps
        adam.param_groups[0]["lr"] = member.learning_rate * min(1.0, up, down)
        adam.step()
        if sparse:
            w.data /= w.data.norm(dim=1, keepdim=True)
        silent = torch.where((f > 0).any(0), 0, silent + len(x))
    return p | ({} if threshold is None else {"threshold": threshold}), silent, plain, seen


@pytest.mark.parametrize("member", [RELU, TOPK, BATCHTOPK], ids=lambda m: m.sae_id)
def test_fifty_steps_equal_autograd_and_adam(member):
    pack = trained([member])
    p, silent, loss, seen = reference(member, BATCHES, RECIPE, SCALE)
    assert seen["clipped"] and seen["unclipped"] and (silent > 0).any(), seen  # else those parts are not tested
    assert member is RELU or 0 < seen["dead"] < RECIPE.steps, seen
    saved = bits(pack, member.sae_id)
    assert torch.equal(saved["silent_tokens"], silent.long())
    for name in p:
        torch.testing.assert_close(saved[f"parameters.{name}"], p[name].detach(), atol=1e-5, rtol=0)
    assert pack.state_of(member.sae_id)["loss"] == pytest.approx(loss, rel=1e-4)
    assert pack.state_of(member.sae_id)["dead_fraction"] == pytest.approx((silent >= 2 * BATCH).double().mean().item())
    assert (pack.step, pack.tokens) == (50, 50 * BATCH)


def test_the_decoder_of_topk_stays_on_the_unit_sphere():
    torch.testing.assert_close(bits(trained([TOPK]), "topk")["parameters.W_dec"].norm(dim=1), torch.ones(40))


def test_a_pack_equals_its_members_alone():
    pack = trained([RELU, TOPK, BATCHTOPK, WIDE])
    for member in (RELU, TOPK, BATCHTOPK, WIDE):
        assert_same_bits(bits(pack, member.sae_id), bits(trained([member]), member.sae_id))
        for name, tensor in pack.sae(member.sae_id).parameters.items():
            assert torch.equal(tensor, trained([member]).sae(member.sae_id).parameters[name])


def test_dropping_a_member_does_not_disturb_the_rest():
    pack = Pack([RELU, TOPK, WIDE], RECIPE, SCALE)
    pack.train(BATCHES[:20])
    pack.drop(["topk"])
    pack.train(BATCHES[20:])
    assert [m.sae_id for m in pack.alive] == ["relu", "wide"]
    for member in (RELU, WIDE):
        assert_same_bits(bits(pack, member.sae_id), bits(trained([member]), member.sae_id))


@pytest.mark.parametrize("at", [1, 20, 49])
def test_a_resumed_pack_has_the_bits_of_an_uninterrupted_one(tmp_path, at):
    whole = trained([RELU, TOPK])
    first = trained([RELU, WIDE, TOPK], BATCHES[:at])
    first.drop(["wide"])
    first.save(tmp_path / "state")
    second = Pack([RELU, WIDE, TOPK], RECIPE, SCALE)
    second.load(tmp_path / "state")
    assert second.step == at and [m.sae_id for m in second.alive] == ["relu", "topk"]
    assert second.state_of("relu") == first.state_of("relu")
    second.train(BATCHES[at:])
    for member in (RELU, TOPK):
        saved = bits(second, member.sae_id)
        assert int(saved["adam.W_enc.step"]) == 50
        assert_same_bits(saved, bits(whole, member.sae_id))


def test_training_state_is_no_pickle(tmp_path):
    pack = trained([RELU], BATCHES[:2])
    pack.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.safetensors", "pack.json"]
    torch.save({"silent_tokens": torch.zeros(1)}, tmp_path / "0.safetensors")
    with pytest.raises(UserError, match=r"0\.safetensors.*pickles are never loaded"):
        Pack([RELU], RECIPE, SCALE).load(tmp_path)


def test_seeds_matter_and_nothing_else_random_does():
    torch.manual_seed(1)
    one = bits(trained([TOPK]), "topk")
    torch.manual_seed(2)
    assert_same_bits(one, bits(trained([TOPK]), "topk"))
    other = bits(trained([replace(TOPK, config=replace(TOPK.config, seed=9))]), "topk")
    assert not torch.allclose(one["parameters.W_dec"], other["parameters.W_dec"], atol=0.1)


def test_a_member_that_diverges_does_not_disturb_others_and_stays_diverged(tmp_path):
    wild = Member("wild", WIDE.config, 1e25)
    pack = trained([RELU, wild, TOPK], BATCHES[:20])
    assert pack.state_of("wild")["diverged"] and not math.isfinite(pack.state_of("wild")["loss"])
    pack.save(tmp_path)
    resumed = Pack([RELU, wild, TOPK], RECIPE, SCALE)
    resumed.load(tmp_path)
    for p in (pack, resumed):
        assert p.state_of("wild")["diverged"]
        p.train(BATCHES[20:])
        assert p.state_of("wild")["diverged"]
        for member in (RELU, TOPK):
            assert not p.state_of(member.sae_id)["diverged"]
            assert_same_bits(bits(p, member.sae_id), bits(trained([member]), member.sae_id))


def test_a_batch_with_nan_stops_a_member_before_it_spoils_its_weights(tmp_path):
    """Such a member must not come back to life by resuming: it would have skipped a batch in silence."""
    bad = BATCHES[10].clone()
    bad[3, 2] = float("nan")
    pack = trained([RELU], [*BATCHES[:10], bad])
    assert pack.state_of("relu")["diverged"]
    assert all(tensor.isfinite().all() for tensor in pack.sae("relu").parameters.values())
    pack.save(tmp_path)
    resumed = Pack([RELU], RECIPE, SCALE)
    resumed.load(tmp_path)
    resumed.train(BATCHES[11:])
    assert resumed.state_of("relu")["diverged"]


def test_death_is_counted_in_tokens_not_steps():
    """Half the batch size, twice the steps: a latent is dead after the same number of tokens."""
    never = replace(TOPK, learning_rate=1e-30, config=replace(TOPK.config, k=1))
    for batch in (BATCH, BATCH // 2):
        recipe = replace(RECIPE, steps=1000, batch_size=batch, dead_after_tokens=4 * BATCH)
        pack = trained([never], ROWS[: 4 * BATCH - batch].split(batch), recipe)
        assert pack.state_of("topk")["dead_fraction"] == 0
        pack.train([ROWS[4 * BATCH - batch : 4 * BATCH]])
        fired = pack.sae("topk").encode(ROWS[: 4 * BATCH]).gt(0).any(0)
        assert 0 < pack.state_of("topk")["dead_fraction"] == pytest.approx((~fired).double().mean().item())


def test_training_learns_and_does_not_change_its_batches():
    before = ROWS.clone()
    gentle = [replace(m, learning_rate=1e-2) for m in (WIDE, TOPK)]
    pack = trained(gentle)
    assert torch.equal(ROWS, before)
    x = ROWS[: 20 * BATCH]
    for sae in map(pack.sae, ("wide", "topk")):
        assert (x - sae(x)).square().sum() < 0.5 * (x - x.mean(0)).square().sum()


def test_low_precision_batches_train_float32_weights():
    pack = trained([RELU], [b.bfloat16() for b in BATCHES[:3]])
    assert {t.dtype for t in pack.sae("relu").parameters.values()} == {torch.float32}


def test_pack_json_lists_the_recipe_and_members(tmp_path):
    trained([RELU, TOPK], BATCHES[:1]).save(tmp_path)
    facts = json.loads((tmp_path / "pack.json").read_text())
    assert facts["step"] == 1 and facts["recipe"]["batch_size"] == BATCH
    assert [m["sae_id"] for m in facts["members"]] == ["relu", "topk"]


@pytest.mark.parametrize("steps,warmup,decay", [(100, 10, 20), (100, 0, 0), (1, 0, 0), (7, 3, 4)])
def test_learning_rate_rises_stays_and_falls_to_almost_zero(steps, warmup, decay):
    recipe = Recipe(steps, 4, warmup, decay, 10, 100)
    rates = [recipe.rate(t) for t in range(steps)]
    assert all(0 < r <= 1 for r in rates) and max(rates) == 1
    assert all(b > a for a, b in pairwise(rates[:warmup]))
    assert set(rates[warmup : steps - decay]) <= {1.0}
    if decay:
        falling = rates[steps - decay :]
        assert all(b < a for a, b in pairwise(falling)) and falling[-1] == pytest.approx(1 / decay)
    sparsity = [recipe.sparsity_rate(t) for t in range(20)]
    assert sparsity == sorted(sparsity) and sparsity[0] == 0.1 and set(sparsity[9:]) == {1.0}
