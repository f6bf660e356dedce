"""Hand-derived gradients equal autograd's of the paper's loss, written a second time in reference.py."""

import pytest
import torch
from sae.reference import REVIVING, loss_and_latents

from raysae.sae.architectures import ARCHITECTURES, Moment, SAEConfig, initial_parameters
from raysae.sae.architectures.jumprelu import JumpReLU, TanhJumpReLU
from raysae.sae.architectures.topk import BatchTopK, Matryoshka
from raysae.sae.latents import Dense, Sparse, largest_of_all, largest_per_row

D, F, ROWS = 6, 20, 31
SPARSITY = {"k": 3, "l1_coefficient": 0.7, "target_l0": 4.0, "l0_coefficient": 0.05}


def config_of(architecture, d_sae=F, **options):
    coefficient = ARCHITECTURES[architecture].coefficient
    return SAEConfig(architecture, D, d_sae, **{coefficient: SPARSITY[coefficient], **options})


@pytest.fixture
def double_parameters():
    """Parameters away from the symmetric start: W_enc is not W_decᵀ, biases are not zero, norms differ."""

    def make(config):
        generator = torch.Generator().manual_seed(3)
        p = initial_parameters(config, torch.randn(D, generator=generator) * 0.3)
        for name in ARCHITECTURES[config.architecture].trained:
            if name != "b_dec":
                p[name] = p[name] + 0.3 * torch.randn(p[name].shape, generator=generator)
        if "scale" in p:
            p["scale"] = torch.tensor(1.7)
        return {name: tensor.double() for name, tensor in p.items()}

    return make


@pytest.fixture
def wide_bandwidth(monkeypatch):
    """A rectangle that some pre-activations of a small batch fall into."""
    for architecture in (JumpReLU, TanhJumpReLU):
        monkeypatch.setattr(architecture, "bandwidth", classmethod(lambda cls, d_in: 0.5))
    return 0.5


def rows_of(seed=0):
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(seed)).double() + 0.4


def all_trained(architecture, p):
    return {name: p[name].clone().requires_grad_() for name in ARCHITECTURES[architecture].trained}


def assert_gradients(step, leaves):
    assert set(step.gradients) == set(leaves)
    for name, leaf in leaves.items():
        assert step.gradients[name].shape == leaf.shape
        assert leaf.grad.abs().max() > 0, f"{name} is not tested"
        assert (step.gradients[name] - leaf.grad).abs().max() / leaf.grad.abs().max() < 1e-7, name


DEAD = {
    "unknown": None,
    "none": torch.zeros(F, dtype=torch.bool),
    "one": torch.arange(F) == 4,
    "half": torch.arange(F) % 2 == 0,
    "all": torch.ones(F, dtype=torch.bool),
}


@pytest.mark.parametrize(
    "architecture,moment",
    [(name, Moment(sparsity=0.6, progress=0.3)) for name in ARCHITECTURES]
    + [(name, Moment(dead=dead)) for name in REVIVING for dead in DEAD.values()],
    ids=lambda v: v if isinstance(v, str) else "dead" if v.dead is not None else "",
)
def test_gradients_equal_autograd(double_parameters, wide_bandwidth, architecture, moment):
    config = config_of(architecture)
    p, x = double_parameters(config), rows_of()
    p_before, x_before = {name: tensor.clone() for name, tensor in p.items()}, x.clone()
    step = ARCHITECTURES[architecture].step(p, config, x, moment)
    leaves = all_trained(architecture, p)
    loss, f = loss_and_latents(
        config, p | leaves, x, moment.sparsity, moment.progress, moment.dead, bandwidth=wide_bandwidth
    )
    loss.backward()
    assert_gradients(step, leaves)
    torch.testing.assert_close(sum(step.terms.values()), loss.detach(), check_dtype=False)
    assert torch.equal(step.fired, (f != 0).any(0))
    assert torch.equal(x, x_before) and all(torch.equal(p[name], p_before[name]) for name in p)  # inputs left alone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sparse_products_equal_dense_ones(double_parameters, wide_bandwidth, monkeypatch, architecture):
    config = config_of(architecture)
    p, x = double_parameters(config), rows_of()
    moment = Moment(dead=DEAD["half"], progress=0.7)
    steps = []
    for threshold in (0.0, 1.1):
        monkeypatch.setattr("raysae.sae.latents.SPARSE_BELOW", threshold)
        steps.append(ARCHITECTURES[architecture].step(p, config, x, moment))
    dense, sparse = steps
    for name in dense.gradients:
        torch.testing.assert_close(sparse.gradients[name], dense.gradients[name], atol=1e-12, rtol=1e-9)
    assert torch.equal(dense.fired, sparse.fired)
    for name in dense.terms:
        torch.testing.assert_close(sparse.terms[name], dense.terms[name])


def test_p_annealing_keeps_the_penalty_of_the_batch_where_p_falls(double_parameters):
    config = config_of("p_anneal")
    architecture = ARCHITECTURES["p_anneal"]
    p, x = double_parameters(config), rows_of()
    before = architecture.step(p, config, x, Moment(progress=0.59))
    p |= before.buffers
    after = architecture.step(p, config, x, Moment(progress=0.61))
    assert float(before.buffers["p"]) > float(after.buffers["p"]) > 0.2
    torch.testing.assert_close(before.terms["sparsity"], after.terms["sparsity"], check_dtype=False)
    assert float(after.buffers["scale"]) != float(before.buffers["scale"])
    assert architecture.power(0.0) == architecture.power(0.5) == 1 and architecture.power(1.0) == pytest.approx(0.2)


def test_matryoshka_prefixes_are_nested_and_end_with_all():
    assert Matryoshka.ends(64) == [2, 6, 14, 30, 64]
    assert Matryoshka.ends(3)[-1] == 3


@pytest.mark.parametrize("n,k", [(20, 3), (64, 5), (64, 64), (96, 1), (97, 7), (3072, 32)])
def test_selection_equals_a_sort(n, k):
    score = torch.randn(13, n, generator=torch.Generator().manual_seed(n))
    chosen = largest_per_row(score, k)
    assert chosen.shape == (13, k)
    assert torch.equal(score.gather(1, chosen).sort(1).values, score.sort(1).values[:, -k:])
    flat = largest_of_all(score, 13 * k)
    assert torch.equal(flat, flat.sort().values)
    assert torch.equal(score.flatten()[flat].sort().values, score.flatten().sort().values[-13 * k :])


def test_latents_are_one_matrix_dense_or_sparse():
    f = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    f[f.abs() < 1] = 0
    row, column = f.nonzero(as_tuple=True)
    dense, sparse = Dense(f), Sparse(f[row, column], row, column, (7, 12))
    W, b, y = torch.randn(12, 5), torch.randn(5), torch.randn(7, 5)
    assert torch.equal(sparse.dense(), f)
    for made, expected in (
        (sparse.decode(W, b), dense.decode(W, b)),
        (sparse.rows(y), dense.rows(y)),
        (sparse.columns(y), dense.columns(y)),
        (sparse.sum(), dense.sum()),
        (sparse.gradient(y, W).where_on(sparse).dense(), dense.gradient(y, W).where_on(dense).dense()),
        (
            sparse.gradient(y, W, W[:, 0]).where_positive(sparse).dense(),
            dense.gradient(y, W, W[:, 0]).where_positive(dense).dense(),
        ),
        (sparse.with_values(sparse.at(2 * f)).dense(), 2 * f),
        (sparse.with_values(sparse.of_column(W[:, 0])).dense(), W[:, 0] * (f != 0)),
    ):
        torch.testing.assert_close(made, expected)
    assert torch.equal(sparse.fired(), dense.fired())


def test_relu_loss_is_blind_to_rescaling_latents_against_the_decoder(double_parameters):
    """f·a against W_dec/a: the same reconstruction must cost the same, else L1 shrinks f and grows W_dec."""
    config = config_of("relu")
    p, x = double_parameters(config), rows_of()
    other = {**p, "W_enc": p["W_enc"] * 3, "b_enc": p["b_enc"] * 3, "W_dec": p["W_dec"] / 3}
    one, two = (ARCHITECTURES["relu"].step(q, config, x, Moment()).terms for q in (p, other))
    for name in ("sparsity", "reconstruction"):
        torch.testing.assert_close(one[name], two[name])


def test_topk_keeps_at_most_k_and_never_a_negative():
    config = SAEConfig("topk", D, F, k=4)
    p = initial_parameters(config, torch.zeros(D))
    p["b_enc"] -= 0.5
    f = ARCHITECTURES["topk"].encode(p, config, rows_of().float())
    on = (f != 0).sum(1)
    assert on.max() <= 4 and on.min() < 4 and (f >= 0).all()


def test_abstopk_keeps_the_sign():
    config = SAEConfig("abstopk", D, F, k=4)
    p = initial_parameters(config, torch.zeros(D))
    f = ARCHITECTURES["abstopk"].encode(p, config, rows_of().float())
    assert ((f != 0).sum(1) == 4).all() and (f < 0).any() and (f > 0).any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_parameters_depend_on_the_seed_alone(architecture):
    def make(seed):
        return initial_parameters(config_of(architecture, seed=seed), torch.ones(D))

    torch.manual_seed(1)
    one = make(0)
    torch.manual_seed(2)
    again, other = make(0), make(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["W_dec"], other["W_dec"]) and torch.equal(one["b_dec"], torch.ones(D))
    norm = 1.0 if ARCHITECTURES[architecture].constrain_decoder else 0.1
    torch.testing.assert_close(one["W_dec"].norm(dim=1), torch.full((F,), norm))
    torch.testing.assert_close(one["W_enc"].norm(dim=0), torch.full((F,), ARCHITECTURES[architecture].encoder_norm))


@pytest.mark.parametrize(
    "options,named",
    [
        ({"architecture": "linear", "k": 1}, "architecture"),
        ({"architecture": "relu"}, "l1_coefficient"),
        ({"architecture": "topk"}, "k"),
        ({"architecture": "topk", "k": 0}, "k"),
        ({"architecture": "topk", "k": F + 1}, "k"),
        ({"architecture": "jumprelu", "target_l0": F + 1.0}, "target_l0"),
    ],
)
def test_a_config_that_determines_no_sae_is_refused(options, named):
    with pytest.raises(ValueError, match=rf"^{named}: "):
        SAEConfig(d_in=D, d_sae=F, **options)


def test_batchtopk_keeps_k_per_row_on_average_and_none_without_a_positive_preactivation():
    config = SAEConfig("batchtopk", D, F, k=3)
    pre = torch.randn(ROWS, F, generator=torch.Generator().manual_seed(1))
    f = BatchTopK.select(pre, config.k).dense()
    on = (f > 0).sum(1)
    assert int(on.sum()) == 3 * ROWS and on.unique().numel() > 1
    assert f[f > 0].min() >= pre[f == 0].max()
    nothing = BatchTopK.select(-pre.abs(), config.k)
    assert not nothing.dense().any()
    p = initial_parameters(config, torch.zeros(D)) | {"threshold": torch.tensor(0.5)}
    assert torch.equal(BatchTopK.updated_buffers(p, nothing)["threshold"], torch.tensor(0.5))
    on = BatchTopK.encode(p, config, rows_of().float())
    assert on[on > 0].min() > 0.5
