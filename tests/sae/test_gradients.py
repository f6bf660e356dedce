"""Hand-derived gradients equal autograd's of the loss in the docstring, written here a second time."""

import pytest
import torch

from raysae.sae.architectures import ARCHITECTURES, TRAINED, BatchTopK, SAEConfig, initial_parameters

D, F, ROWS = 6, 20, 31


@pytest.fixture
def double_parameters():
    """Parameters away from the symmetric start: W_enc is not W_decᵀ, biases are not zero, norms differ."""

    def make(config):
        generator = torch.Generator().manual_seed(3)
        p = initial_parameters(config, torch.randn(D, generator=generator) * 0.3)
        p["W_enc"] += 0.3 * torch.randn(D, F, generator=generator)
        p["W_dec"] += 0.3 * torch.randn(F, D, generator=generator)
        p["b_enc"] += 0.2 * torch.randn(F, generator=generator)
        return {name: tensor.double() for name, tensor in p.items()}

    return make


def rows_of(seed=0):
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(seed)).double() + 0.4


def reference_loss(config, p, x, coefficient, dead):
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    if config.architecture == "relu":
        f = pre.relu()
        x_hat = f @ p["W_dec"] + p["b_dec"]
        return ((x - x_hat) ** 2).sum(1).mean() + coefficient * (f * p["W_dec"].norm(dim=1)).sum(1).mean()
    if config.architecture == "batchtopk":
        kept = (pre >= pre.flatten().sort(descending=True).values[config.k * ROWS - 1]).to(pre)
    else:
        kept = torch.zeros_like(pre).scatter(1, pre.topk(config.k, dim=1).indices, 1.0)
    f = pre.relu() * kept
    e = x - (f @ p["W_dec"] + p["b_dec"])
    loss = (e**2).sum(1).mean()
    if dead is not None and dead.any():
        e = e.detach()
        masked = pre.masked_fill(~dead, -torch.inf)
        k_aux = min(D // 2, int(dead.sum()))
        aux_kept = torch.zeros_like(pre).scatter(1, masked.topk(k_aux, dim=1).indices, 1.0)
        e_hat = (pre.relu() * aux_kept) @ p["W_dec"]
        scale = ((x - x.mean(0)) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()
        loss = loss + ((e - e_hat) ** 2).sum(1).mean() * scale / 32
    return loss


DEAD = {
    "unknown": None,
    "none": torch.zeros(F, dtype=torch.bool),
    "one": torch.arange(F) == 4,
    "half": torch.arange(F) % 2 == 0,
    "all": torch.ones(F, dtype=torch.bool),
}


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize(
    "architecture,k,coefficient",
    [("relu", None, 0.0), ("relu", None, 0.7), ("topk", 1, 0.0), ("topk", 5, 0.0), ("batchtopk", 3, 0.0)],
)
def test_gradients_equal_autograd(double_parameters, architecture, k, coefficient, dead):
    config = SAEConfig(architecture, D, F, k=k, l1_coefficient=coefficient if k is None else None)
    p, x = double_parameters(config), rows_of()
    step = ARCHITECTURES[architecture].step(p, config, x, coefficient, DEAD[dead])
    leaves = {name: p[name].clone().requires_grad_() for name in TRAINED}
    loss = reference_loss(config, leaves, x, coefficient, DEAD[dead])
    loss.backward()
    assert set(step.gradients) == set(leaves)
    for name, leaf in leaves.items():
        assert step.gradients[name].shape == leaf.shape
        scale = leaf.grad.abs().max().clamp_min(1e-6)
        assert (step.gradients[name] - leaf.grad).abs().max() / scale < 1e-5, name


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_a_step_reports_its_sums_and_leaves_its_inputs_alone(double_parameters, architecture):
    config = SAEConfig(architecture, D, F, k=3, l1_coefficient=0.5)
    p, x = double_parameters(config), rows_of()
    before, x_before = {name: tensor.clone() for name, tensor in p.items()}, x.clone()
    step = ARCHITECTURES[architecture].step(p, config, x, 0.5, DEAD["half"])
    f = ARCHITECTURES[architecture].encode(p, config, x)
    error = f @ p["W_dec"] + p["b_dec"] - x
    torch.testing.assert_close(step.squared_error, error.square().sum())
    assert torch.equal(step.fired, (f > 0).any(0))
    expected = (f * p["W_dec"].norm(dim=1)).sum(1).mean() if architecture == "relu" else torch.zeros(())
    torch.testing.assert_close(step.sparsity.double(), expected.double())
    assert torch.equal(x, x_before) and all(torch.equal(p[name], before[name]) for name in p)


def test_relu_loss_is_blind_to_rescaling_latents_against_the_decoder(double_parameters):
    """f·a against W_dec/a: the same reconstruction must cost the same, else L1 shrinks f and grows W_dec."""
    config = SAEConfig("relu", D, F, l1_coefficient=0.5)
    p, x = double_parameters(config), rows_of()
    other = {**p, "W_enc": p["W_enc"] * 3, "b_enc": p["b_enc"] * 3, "W_dec": p["W_dec"] / 3}
    one, two = (ARCHITECTURES["relu"].step(q, config, x, 0.5, None) for q in (p, other))
    torch.testing.assert_close(one.sparsity, two.sparsity)
    torch.testing.assert_close(one.squared_error, two.squared_error)


def test_topk_keeps_at_most_k_and_never_a_negative():
    config = SAEConfig("topk", D, F, k=4)
    p = initial_parameters(config, torch.zeros(D))
    p["b_enc"] -= 0.5
    f = ARCHITECTURES["topk"].encode(p, config, rows_of().float())
    on = (f != 0).sum(1)
    assert on.max() <= 4 and on.min() < 4 and (f >= 0).all()


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_initial_parameters_depend_on_the_seed_alone(architecture):
    def make(seed):
        return initial_parameters(SAEConfig(architecture, D, F, k=2, l1_coefficient=0.1, seed=seed), torch.ones(D))

    torch.manual_seed(1)
    one = make(0)
    torch.manual_seed(2)
    again, other = make(0), make(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["W_dec"], other["W_dec"]) and torch.equal(one["b_dec"], torch.ones(D))
    norm = 1.0 if architecture == "topk" else 0.1
    torch.testing.assert_close(one["W_dec"].norm(dim=1), torch.full((F,), norm))
    torch.testing.assert_close(one["W_enc"].norm(dim=0), torch.ones(F))


@pytest.mark.parametrize(
    "options,named",
    [
        ({"architecture": "gated", "k": 1}, "architecture"),
        ({"architecture": "relu"}, "l1_coefficient"),
        ({"architecture": "topk"}, "k"),
        ({"architecture": "topk", "k": 0}, "k"),
        ({"architecture": "topk", "k": F + 1}, "k"),
    ],
)
def test_a_config_that_determines_no_sae_is_refused(options, named):
    with pytest.raises(ValueError, match=rf"^{named}: "):
        SAEConfig(d_in=D, d_sae=F, **options)


def test_batchtopk_keeps_k_per_row_on_average_and_none_without_a_positive_preactivation(double_parameters):
    config = SAEConfig("batchtopk", D, F, k=3)
    pre = torch.randn(ROWS, F, generator=torch.Generator().manual_seed(1))
    f = BatchTopK.select(pre, config.k)
    on = (f > 0).sum(1)
    assert int(on.sum()) == 3 * ROWS and on.unique().numel() > 1
    assert f[f > 0].min() >= pre[f == 0].max()
    assert not BatchTopK.select(-pre.abs(), config.k).any()
    p = initial_parameters(config, torch.zeros(D)) | {"threshold": torch.tensor(0.5)}
    assert torch.equal(BatchTopK.updated_buffers(p, torch.zeros(ROWS, F))["threshold"], torch.tensor(0.5))
    on = BatchTopK.encode(p, config, rows_of().float())
    assert on[on > 0].min() > 0.5
