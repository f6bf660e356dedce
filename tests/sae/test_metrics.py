"""Row metrics: what each value means, on examples where it is known, and that the sums lose nothing."""

import math

import pytest
import torch
from format_examples import X, assert_same, folded

from raysae.sae import latents
from raysae.sae.architectures import ARCHITECTURES
from raysae.sae.latents import Dense, Sparse, entries
from raysae.sae.metrics import SCALARS, RowSums


def measured(x, x_hat, f=None, shift=None, batch=None):
    f = torch.ones(len(x), 2) if f is None else f
    sums = RowSums(x.double().mean(0) if shift is None else shift)
    for rows in torch.arange(len(x)).split(batch or len(x)):
        sums.add(x[rows], x_hat[rows], f[rows])
    return sums.metrics()


@pytest.fixture
def x():
    return torch.randn(1000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5


def test_sums_of_sparse_and_of_dense_latents_are_the_same():
    """Row sums, and firings by latent; two latents of negative value, one row without any, places whose value is 0."""
    f = torch.randn(400, 64, generator=torch.Generator().manual_seed(1)).relu().mul(torch.arange(64) < 3)
    f[5, :2], f[7] = torch.tensor([-0.5, -2.0]), 0.0
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    sparse, dense = entries(f, (f != 0) | (torch.arange(64) == 3)), Dense(f)
    assert isinstance(sparse, Sparse) and (sparse.values == 0).sum() == 400
    one, other = RowSums(torch.zeros(6)), RowSums(torch.zeros(6))
    terms, expected = one.add(x, x, sparse), other.add(x, x, dense)
    for name in SCALARS:
        assert terms[name] == pytest.approx(expected[name], rel=1e-6), name
    assert torch.equal(one.firings, other.firings) and one.metrics() == pytest.approx(other.metrics())
    assert terms["l1"][5] == pytest.approx(2.5 + f[5, 2].item()) and terms["active"][7] == 0


@pytest.mark.parametrize("sparse_below", [0.0, 1.1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reconstruct_is_encode_and_decode_dense_or_sparse(monkeypatch, architecture, sparse_below):
    monkeypatch.setattr(latents, "SPARSE_BELOW", sparse_below)
    sae = folded(architecture)
    x_hat, f = sae.reconstruct(X)
    assert isinstance(f, Sparse if sparse_below else Dense)
    encoded = sae.encode(X)
    assert_same(f.dense(), x_hat, encoded, sae.decode(encoded))
    torch.testing.assert_close(sae(X.double()), x_hat.double())


@pytest.mark.parametrize("shift", [0.0, 5.0, 100.0])
def test_the_mean_predictor_scores_zero_and_identity_one(x, shift):
    shift = torch.full((6,), shift)
    by_mean = measured(x, x.mean(0).expand_as(x), shift=shift)
    assert by_mean["explained_variance"] == pytest.approx(0, abs=1e-12 if shift[0] < 50 else 1e-9)
    assert measured(x, x, shift=shift)["explained_variance"] == pytest.approx(1, abs=1e-12)


def test_worse_than_the_mean_is_negative_and_not_clipped(x):
    assert measured(x, torch.zeros_like(x))["explained_variance"] < -1


def test_a_constant_offset_is_punished(x):
    """Var(x - x̂), as some libraries take it, would not see it."""
    offset = torch.full((6,), 2.0, dtype=torch.float64)
    expected = 6 * 4.0 * len(x) / (x - x.mean(0)).square().sum().item()
    assert measured(x, x + offset)["fvu"] == pytest.approx(expected, rel=1e-12) and expected > 0.2


def test_four_definitions_of_explained_variance_on_a_reconstruction_of_the_mean_only(x):
    """What the per-dimension mean scores: 0 by ours and (a); by the others, the share of the variance about one scalar
    mean that lies between the dimensions' means."""
    x = x + torch.arange(6)
    found = measured(x, x.mean(0).expand_as(x))
    between = len(x) * (x.mean(0) - x.mean()).square().sum() / (x - x.mean()).square().sum()
    assert between > 0.2
    assert found["explained_variance"] == pytest.approx(0, abs=1e-12)
    assert found["ev_resid_var"] == pytest.approx(0, abs=1e-12)
    for name in ("ev_global", "ev_scalar_mean", "ev_clipped"):
        assert found[name] == pytest.approx(between.item(), rel=1e-12), name


@pytest.mark.parametrize("scale,offset", [(0.9, 0.0), (0.9, 0.5), (-3.0, 0.5)])
def test_four_definitions_of_explained_variance_as_the_published_code_has_them(x, scale, offset):
    x = x + torch.arange(6)
    x_hat = scale * x + offset * torch.arange(6) + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    r = x - x_hat
    one_mean = 1 - (r.square().mean() / x.var(correction=0)).item()
    found = measured(x, x_hat, batch=7, shift=torch.ones(6))
    expected = {
        "explained_variance": 1 - (r.square().sum() / (x - x.mean(0)).square().sum()).item(),
        "ev_resid_var": 1 - (r.var(0).sum() / x.var(0).sum()).item(),
        "ev_global": 1 - (r.var() / x.var()).item(),
        "ev_scalar_mean": one_mean,
        "ev_clipped": max(0.0, one_mean),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-10)
    assert (found["ev_scalar_mean"] < 0) == (scale < 0)


def test_which_definitions_see_a_constant_offset(x):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    without, same, each = (measured(x, x + noise + 2 * by) for by in (torch.zeros(6), torch.ones(6), torch.arange(6)))
    blind = {"ev_resid_var": (True, True), "ev_global": (True, False)}
    for name in ("explained_variance", "ev_resid_var", "ev_global", "ev_scalar_mean"):
        unseen = tuple(found[name] == pytest.approx(without[name], abs=1e-10) for found in (same, each))
        assert unseen == blind.get(name, (False, False)), name


def test_fvu_is_one_ratio_of_sums_not_a_mean_of_ratios(x):
    scaled = x * torch.linspace(0.01, 10, len(x))[:, None]
    x_hat = scaled + 0.5
    expected = (scaled - x_hat).square().sum() / (scaled - scaled.mean(0)).square().sum()
    assert measured(scaled, x_hat, batch=7)["fvu"] == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_mean_loses_nothing(x, dtype):
    noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = (x + 1e4).to(dtype)
    moved_hat = (moved.double() + noise).to(dtype)
    exact, exact_hat = moved.double(), moved_hat.double()
    expected = (exact - exact_hat).square().sum() / (exact - exact.mean(0)).square().sum()
    near = exact[:100].mean(0) + 0.01  # a shift such as the store's: near the mean, not at it
    assert measured(moved, moved_hat, shift=near, batch=64)["fvu"] == pytest.approx(expected.item(), rel=1e-10)


def test_float32_rows_are_summed_in_float64(x):
    rows = x.float().repeat(20, 1)
    x_hat = rows + 0.01
    expected = (rows.double() - x_hat.double()).square().sum() / (rows.double() - rows.double().mean(0)).square().sum()
    assert measured(rows, x_hat)["fvu"] == pytest.approx(expected.item(), rel=1e-12)


def test_batch_size_does_not_matter(x):
    x_hat, f = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2)), (x > 4).double()
    whole = measured(x, x_hat, f)
    for batch in (1, 7, 333):
        assert measured(x, x_hat, f, batch=batch) == pytest.approx(whole, abs=1e-10)


def test_batch_size_does_not_matter_to_float32_latents():
    generator = torch.Generator().manual_seed(5)
    x, f = torch.randn(500, 6, generator=generator), torch.randn(500, 1000, generator=generator)
    whole = measured(x, 0.7 * x, f)
    for batch in (1, 7, 333):
        assert measured(x, 0.7 * x, f, batch=batch) == pytest.approx(whole, abs=1e-10)


def test_merged_sums_equal_one_pass(x):
    x_hat, f, shift = x + 0.3, (x > 4).double(), torch.ones(6)
    parts = []
    for rows in torch.arange(len(x)).split([1, 600, 399]):
        parts.append(RowSums(shift))
        parts[-1].add(x[rows], x_hat[rows], f[rows])
    merged = RowSums(shift).merge(parts[0]).merge(parts[1]).merge(parts[2])
    assert merged.metrics() == pytest.approx(measured(x, x_hat, f, shift=shift), abs=1e-10)
    assert merged.rows == 1000 and torch.equal(merged.firings, (f != 0).sum(0))
    assert parts[0].rows == 1, "merging changed its input"
    with pytest.raises(ValueError, match="shift"):
        merged.merge(RowSums(torch.zeros(6)))


def test_l0_dead_and_dense_on_a_hand_example():
    """10 rows, 5 latents: one on all rows, one on 2 (dense, 20 %), one on exactly 10 %, one negative, one never."""
    f = torch.zeros(10, 5)
    f[:, 0], f[:2, 1], f[4, 2], f[5:7, 3] = 1.0, 0.5, 2.0, -1.0
    found = measured(torch.randn(10, 3), torch.randn(10, 3), f, batch=3)
    assert found["l0"] == pytest.approx((10 + 2 + 1 + 2) / 10)
    assert found["never_fired_fraction"] == pytest.approx(1 / 5)
    assert found["dense_fraction"] == pytest.approx(3 / 5)  # above, not at, a tenth of the rows
    assert found["l1"] == pytest.approx((10 * 1.0 + 2 * 0.5 + 2.0 + 2 * 1.0) / 10)


def test_norm_ratio_and_cosine(x):
    halved = measured(x, 0.5 * x)
    assert halved["l2_ratio"] == pytest.approx(0.5) and halved["cosine"] == pytest.approx(1)
    assert measured(x, -x)["cosine"] == pytest.approx(-1)


def test_relative_reconstruction_bias_is_the_scale_that_serves_x_hat_best(x):
    """Its definition in the Gated SAE paper: the γ of the least ‖x̂/γ - x‖². One for all rows, not a mean over rows."""
    for scale in (0.5, -2.0):
        assert measured(x, scale * x)["relative_reconstruction_bias"] == pytest.approx(scale)
    shrunk = 0.8 * x * torch.linspace(0.5, 1.2, len(x))[:, None] + 0.1
    found = measured(x, shrunk, batch=7)["relative_reconstruction_bias"]
    best = torch.linalg.lstsq(shrunk.reshape(-1, 1), x.reshape(-1, 1)).solution.item()
    assert found == pytest.approx(1 / best, rel=1e-10) and found != pytest.approx(
        measured(x, shrunk)["l2_ratio"], abs=0.01
    )


def test_rows_without_variance_or_no_rows_say_nothing():
    same = torch.ones(5, 3)
    found, empty = measured(same, same), RowSums(torch.zeros(3)).metrics()
    for name in ("fvu", "explained_variance", "ev_resid_var", "ev_global", "ev_scalar_mean", "ev_clipped"):
        assert math.isnan(found[name]) and math.isnan(empty[name]), name
    assert math.isnan(empty["relative_reconstruction_bias"])


def test_terms_by_row_add_up_to_the_sums(x):
    sums = RowSums(x.mean(0))
    terms = sums.add(x, x + 1, (x > 4).double())
    assert set(terms) == set(SCALARS)
    for name in SCALARS:
        assert terms[name].shape == (1000,)
        assert terms[name].sum().item() == pytest.approx(getattr(sums, name))
