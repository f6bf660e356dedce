"""The pack trainer against a plain autograd loop; members that do not notice each other; resuming to the same bits."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import sparse_rows
from sae.reference import REVIVING, loss_and_latents

from raysae.errors import UserError
from raysae.sae.architectures import ARCHITECTURES, SAEConfig, initial_parameters
from raysae.sae.losses import Batch, Losses
from raysae.sae.metrics import RowSums
from raysae.sae.train import CLIP_NORM, InputScale, Member, Pack, Recipe, geometric_median

D, BATCH = 8, 32
RECIPE = Recipe(
    steps=50, batch_size=BATCH, warmup_steps=5, decay_steps=10, sparsity_warmup_steps=15, dead_after_tokens=2 * BATCH
)
ROWS = sparse_rows(50 * BATCH, D, seed=1) * 3
ROWS[20 * BATCH : 22 * BATCH] *= 10  # two batches whose gradients must be clipped at norm 1
SCALE = InputScale(ROWS.mean(0), ROWS.double().var(0, correction=0).sum().item())
BATCHES = ROWS.split(BATCH)

RELU = Member("relu", SAEConfig("relu", D, 48, l1_coefficient=1.5, seed=1), 3e-2)
TOPK = Member("topk", SAEConfig("topk", D, 40, k=2, seed=2), 1e-2)
# Rows with a single latent start with a gradient of exactly zero (tied weights), of which Adam would magnify the rounding.
# With seed 4, of 0 to 19, a rounding decides which latent is the batch's last.
BATCHTOPK = Member("batchtopk", SAEConfig("batchtopk", D, 40, k=6, seed=3), 1e-2)
ALL = [
    RELU,
    TOPK,
    BATCHTOPK,
    Member("unit", SAEConfig("relu_unit_norm", D, 40, l1_coefficient=0.4, seed=5), 1e-2),
    Member("p_anneal", SAEConfig("p_anneal", D, 40, l1_coefficient=0.15, seed=23), 7e-3),
    Member("gated", SAEConfig("gated", D, 40, l1_coefficient=0.3, seed=7), 1e-2),
    Member("jumprelu", SAEConfig("jumprelu", D, 40, target_l0=4, seed=8), 1e-2),
    Member("jumprelu_l0", SAEConfig("jumprelu_l0", D, 40, l0_coefficient=0.02, seed=14), 1e-2),
    Member("jumprelu_tanh", SAEConfig("jumprelu_tanh", D, 40, l0_coefficient=0.1, seed=10), 1e-2),
    Member("abstopk", SAEConfig("abstopk", D, 40, k=3, seed=11), 1e-2),
    Member("matryoshka", SAEConfig("matryoshka", D, 40, k=6, seed=12), 1e-2),
]
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


def reference(member, batches, recipe, scale, clip_norm):
    """What the pack should do, with autograd and torch's Adam; and on how many steps the rare branches were taken."""
    c = member.config
    architecture = ARCHITECTURES[c.architecture]
    start = initial_parameters(c, scale.mean * scale.factor)
    p = {k: t.requires_grad_() if k in architecture.trained else t for k, t in start.items()}
    trained = [p[k] for k in architecture.trained]
    slower = {"batchtopk": 0.6, "matryoshka": 0.3}.get(c.architecture, 1.0)
    rates = [slower if k == "b_enc" else 1.0 for k in architecture.trained]
    adam = torch.optim.Adam([{"params": [tensor]} for tensor in trained], betas=(0.9, 0.999), eps=1e-8)
    silent, threshold = torch.zeros(c.d_sae), None
    seen = {"clipped": 0, "unclipped": 0, "dead": 0}
    for t, batch in enumerate(batches):
        x, dead = batch / math.sqrt(scale.variance), silent >= recipe.dead_after_tokens
        sparsity = min(1, (t + 1) / recipe.sparsity_warmup_steps)
        if c.architecture == "p_anneal":
            anneal(p, c, x, t / recipe.steps)
        bandwidth = architecture.bandwidth(D) if c.architecture.startswith("jumprelu") else None
        loss, f = loss_and_latents(c, p, x, sparsity, t / recipe.steps, dead, bandwidth)
        if "threshold" in p:
            smallest = f[f > 0].min().detach()
            threshold = smallest if threshold is None else 0.99 * threshold + 0.01 * smallest
        seen["dead"] += bool(dead.any())
        adam.zero_grad()
        loss.backward()
        w = p["W_dec"]
        if architecture.constrain_decoder:
            w.grad -= (w.grad * w.detach()).sum(1, keepdim=True) * w.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip_norm)
        seen["clipped" if norm > clip_norm else "unclipped"] += 1
        for tensor in trained:
            tensor.grad /= clip_norm
        up, down = (t + 1) / recipe.warmup_steps, (recipe.steps - t) / recipe.decay_steps
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = member.learning_rate * min(1.0, up, down) * rate
        adam.step()
        if architecture.constrain_decoder:
            w.data /= w.data.norm(dim=1, keepdim=True)
        silent = torch.where((f != 0).any(0), 0, silent + len(x))
    return p | ({} if threshold is None else {"threshold": threshold}), silent, loss.item(), seen


def anneal(p, config, x, progress):
    """p-annealing's buffers: where p falls, the scale keeps the batch's penalty what it was."""
    power = 1 - 0.8 * int(max(0.0, (progress - 0.5) / 0.5) * 10) / 10
    with torch.no_grad():
        f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
        if power != float(p["p"]):
            raised = [(f * f.clamp_min(1e-3).pow(q - 1)).sum() for q in (float(p["p"]), power)]
            p["scale"] = p["scale"] * raised[0] / raised[1]
        p["p"] = torch.tensor(power)


@pytest.mark.parametrize("clip_norm", [CLIP_NORM, 1.0], ids=["clip", "clip1"])
@pytest.mark.parametrize("member", ALL, ids=lambda m: m.sae_id)
def test_fifty_steps_equal_autograd_and_adam(monkeypatch, member, clip_norm):
    monkeypatch.setattr("raysae.sae.train.CLIP_NORM", clip_norm)
    pack = trained([member])
    p, silent, loss, seen = reference(member, BATCHES, RECIPE, SCALE, clip_norm)
    assert seen["clipped"] and (silent > 0).any(), seen  # else those parts are not tested
    assert clip_norm < 1 or seen["unclipped"], seen
    assert member.config.architecture not in REVIVING or 0 < seen["dead"] < RECIPE.steps, seen
    saved = bits(pack, member.sae_id)
    assert torch.equal(saved["silent_tokens"], silent.long())
    for name in p:
        torch.testing.assert_close(saved[f"parameters.{name}"], p[name].detach(), atol=1e-5, rtol=0)
    assert pack.state_of(member.sae_id)["loss"] == pytest.approx(loss, rel=1e-4)
    assert pack.state_of(member.sae_id)["dead_fraction"] == pytest.approx((silent >= 2 * BATCH).double().mean().item())
    assert (pack.step, pack.tokens) == (50, 50 * BATCH)


@pytest.mark.parametrize(
    "member", [m for m in ALL if m.sae_id in ("relu", "jumprelu", "gated", "topk")], ids=lambda m: m.sae_id
)
def test_a_constant_added_to_every_row_changes_no_training(member):
    """b_dec takes it away, so the scale must not depend on it: FVU and L0 after every ten steps."""
    constant = 10 * SCALE.variance**0.5 * torch.nn.functional.normalize(torch.arange(1.0, D + 1), dim=0)
    found = []
    for offset in (torch.zeros(D), constant):
        rows = ROWS + offset
        mean = rows.double().mean(0)
        pack = Pack([member], RECIPE, InputScale(mean.float(), (rows - mean).square().sum(1).mean().item()))
        for part in rows.split(10 * BATCH):
            pack.train(part.split(BATCH))
            sums = RowSums(mean)
            sums.add(rows, *pack.sae(member.sae_id).reconstruct(rows))
            found.append((sums.metrics()["fvu"], sums.metrics()["l0"]))
    before, after = torch.tensor(found).chunk(2)
    torch.testing.assert_close(after, before, rtol=2e-3, atol=0)
    assert before[-1, 0] < 0.9 * before[0, 0], "nothing was learnt"


def test_the_decoder_of_topk_stays_on_the_unit_sphere():
    torch.testing.assert_close(bits(trained([TOPK]), "topk")["parameters.W_dec"].norm(dim=1), torch.ones(40))


def test_a_pack_equals_its_members_alone():
    pack = trained([*ALL, WIDE])
    for member in (*ALL, WIDE):
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
    whole = trained(ALL)
    first = trained([RELU, WIDE, *ALL[1:]], BATCHES[:at])
    first.drop(["wide"])
    first.save(tmp_path / "state")
    second = Pack([RELU, WIDE, *ALL[1:]], RECIPE, SCALE)
    second.load(tmp_path / "state")
    assert second.step == at and second.alive == ALL
    assert second.state_of("relu") == first.state_of("relu")
    second.train(BATCHES[at:])
    for member in ALL:
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


def test_bfloat16_products_train_float32_weights_to_much_the_same_end():
    low = trained(ALL, recipe=replace(RECIPE, precision="bfloat16"))
    whole = trained(ALL)
    for member in ALL:
        sae, other = low.sae(member.sae_id), whole.sae(member.sae_id)
        assert {t.dtype for t in sae.parameters.values()} == {torch.float32}
        fvu = [((ROWS - s(ROWS)).square().sum() / (ROWS - ROWS.mean(0)).square().sum()).item() for s in (sae, other)]
        assert fvu[0] == pytest.approx(fvu[1], rel=0.25), member.sae_id


@pytest.mark.parametrize(
    "architecture,losses,expected",
    [
        ("relu", Losses(), {"reconstruction", "sparsity"}),
        ("topk", Losses(1.0, 0.5, 0.1), {"reconstruction", "aux", "decorrelation", "max_cosine"}),
        ("gated", Losses(temporal=0.1, probe=0.3, probe_classes=3), {"reconstruction", "sparsity", "probe", "temporal"}),
    ],
)  # fmt: skip
def test_every_term_has_its_share_of_the_gradient(architecture, losses, expected):
    base = next(m for m in ALL if m.config.architecture == architecture)
    pack = Pack([replace(base, sae_id="it", losses=losses)], RECIPE, SCALE)
    labels, follows = torch.arange(BATCH) % 3, torch.arange(BATCH) % 8 > 0
    pack.train(Batch(x, labels, follows) for x in BATCHES[:12])
    before = {name: t.clone() for name, t in bits(pack, "it").items()}
    shares = pack.gradient_shares("it", Batch(BATCHES[0], labels, follows))
    assert set(shares) == expected and sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert_same_bits(before, bits(pack, "it"))


def test_a_term_with_twice_the_coefficient_has_twice_the_norm():
    def ratio(coefficient):
        pack = Pack([replace(RELU, losses=Losses(decorrelation=coefficient))], RECIPE, SCALE)
        pack.train(BATCHES[:1])
        shares = pack.gradient_shares("relu", BATCHES[0])
        return shares["decorrelation"] / shares["reconstruction"]

    torch.manual_seed(0)
    small, large = ratio(1e-6), ratio(2e-6)  # too small to change the first step's outcome
    assert large / small == pytest.approx(2, rel=0.05)


def test_resampling_points_dead_latents_at_what_is_badly_reconstructed():
    sure = replace(RELU, sae_id="dying", config=replace(RELU.config, l1_coefficient=1.0))  # kills most latents
    pack = trained([sure], BATCHES[:30])
    dead = pack._members["dying"].dead(RECIPE)
    assert 0.2 < dead.double().mean() < 1
    before = bits(pack, "dying")["parameters.W_enc"].clone()
    again = replace(RECIPE, resample_steps=(30,))
    resampled = trained([sure], BATCHES[:30], again)
    state = bits(resampled, "dying")
    assert not resampled._members["dying"].dead(again).any()
    assert torch.equal(state["parameters.W_enc"][:, ~dead], before[:, ~dead])
    alive_norm = state["parameters.W_enc"][:, ~dead].norm(dim=0).mean()
    torch.testing.assert_close(
        state["parameters.W_enc"][:, dead].norm(dim=0), (0.2 * alive_norm).expand(int(dead.sum()))
    )
    rows = state["parameters.W_dec"].norm(dim=1)
    assert (rows[~dead].mean() - 1).abs() > 1e-3  # or rows left at norm 1 would do
    torch.testing.assert_close(rows[dead], rows[~dead].mean().expand(int(dead.sum())))
    assert not state["adam.W_enc.exp_avg"][:, dead].any() and not state["adam.b_enc.exp_avg"][dead].any()
    x = BATCHES[29] * SCALE.factor - state["parameters.b_dec"]
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(state["parameters.W_dec"][dead]).T
    torch.testing.assert_close(cosine.max(0).values, torch.ones(int(dead.sum())))
    assert_same_bits(state, bits(trained([sure], BATCHES[:30], again), "dying"))


@pytest.mark.parametrize("member", [m for m in ALL if m.config.architecture in REVIVING], ids=lambda m: m.sae_id)
def test_members_whose_loss_revives_dead_latents_are_not_resampled(member):
    always = replace(RECIPE, resample_steps=tuple(range(1, RECIPE.steps + 1)))
    assert_same_bits(bits(trained([member], recipe=always), member.sae_id), bits(trained([member]), member.sae_id))


def test_a_data_driven_start_points_latents_at_rows_and_a_median_resists_outliers():
    rows = torch.cat([ROWS[:50], torch.full((1, D), 1e4)])
    centre = geometric_median(rows)
    assert (centre - ROWS[:50].double().mean(0)).norm() < 0.1 * (rows.double().mean(0) - centre).norm()
    objective = lambda c: (rows.double() - c).norm(dim=1).sum()  # noqa: E731
    assert all(objective(centre) <= objective(centre + 1e-2 * e) for e in (*torch.eye(D), *-torch.eye(D)))
    scale = InputScale(SCALE.mean, SCALE.variance, centre, ROWS[:10])
    p = Pack([TOPK], RECIPE, scale)._members["topk"].parameters
    torch.testing.assert_close(p["b_dec"], (centre * scale.factor).float())
    from_centre = torch.nn.functional.normalize(ROWS[:10] - centre.float())
    torch.testing.assert_close((p["W_dec"] @ from_centre.T).max(1).values, torch.ones(40))
