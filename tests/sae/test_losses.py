"""Loss terms beside reconstruction and sparsity: values by definition, gradients by autograd, masks, and what they do."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from raysae.sae.architectures import SAEConfig
from raysae.sae.losses import Batch, Losses, decorrelation, max_cosine, probe, temporal
from raysae.sae.train import InputScale, Member, Pack, Recipe

F, D, ROWS = 30, 7, 24


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(W):
    unit = W / W.norm(dim=1, keepdim=True)
    return unit @ unit.T


def test_decorrelation_is_the_mean_squared_cosine_of_pairs():
    W = normal(F, D).requires_grad_()
    c = cosines(W)
    expected = (c.square().sum() - c.diagonal().square().sum()) / (F * (F - 1))
    expected.backward()
    value, gradient = decorrelation(W.detach())
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, W.grad)


def test_decorrelation_of_random_rows_is_one_over_d_at_every_width():
    """Why a coefficient of 0.1 did nothing in the origin study: the term is 1/D whatever the width, and cannot fall far."""
    for width in (4 * 64, 20 * 64):
        value, _ = decorrelation(normal(width, 64))
        assert value.item() == pytest.approx(1 / 64, rel=0.05)


@pytest.mark.parametrize("step", [0, 3])
def test_max_cosine_is_a_hinge_on_each_sampled_atoms_nearest(monkeypatch, step):
    monkeypatch.setattr("raysae.sae.losses.SAMPLED_ATOMS", 8)
    W = normal(F, D).requires_grad_()
    sample = [(i + step * 8) % F for i in range(8)]
    nearest = (cosines(W) - 3 * torch.eye(F)).max(1).values[sample]
    expected = (nearest - 0.4).relu().square().mean()
    expected.backward()
    value, gradient = max_cosine(W.detach(), 0.4, step)
    assert expected > 0
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, W.grad)


def test_probe_is_cross_entropy_over_labelled_rows():
    labels = torch.arange(ROWS) % 5 - 1  # -1: no label
    f, weight, bias = (t.requires_grad_() for t in (normal(ROWS, F), normal(F, 4, seed=1), normal(4, seed=2)))
    expected = cross_entropy(f @ weight + bias, labels, ignore_index=-1)
    expected.backward()
    value, *gradients = probe(f.detach(), weight.detach(), bias.detach(), labels)
    torch.testing.assert_close(value, expected.detach())
    for gradient, leaf in zip(gradients, (f, weight, bias), strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def test_temporal_is_the_mean_change_between_neighbours_within_an_example():
    follows = torch.arange(ROWS) % 6 > 0
    follows[9] = False  # a token was left out there
    f = normal(ROWS, F).requires_grad_()
    expected = torch.stack([(f[t] - f[t - 1]).square().sum() for t in range(ROWS) if follows[t]]).mean()
    expected.backward()
    value, gradient = temporal(f.detach(), follows)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, f.grad)


def test_terms_without_pairs_or_labels_are_zero():
    f = normal(ROWS, F)
    assert temporal(f, torch.zeros(ROWS, dtype=torch.bool))[0] == 0
    value, g_f, *_ = probe(f, normal(F, 3), normal(3), torch.full((ROWS,), -1))
    assert value == 0 and not g_f.any()


def trained(losses, batches):
    member = Member("it", SAEConfig("topk", D, F, k=6), 1e-2, losses)
    pack = Pack([member], Recipe(len(batches), ROWS, 2, 0, 0, 10**6), InputScale(torch.zeros(D), float(D)))
    pack.train(batches)
    return pack


def test_each_term_does_what_it_is_for():
    """Against the same SAE without it: decoder rows less alike, latents smoother in time, labels readable by the head."""
    x = normal(200 * ROWS, D, seed=3).float()
    labels = (x[:, 0] > 0).long()
    follows = torch.arange(ROWS) > 0
    batches = [Batch(b, t, follows) for b, t in zip(x.split(ROWS), labels.split(ROWS), strict=True)]

    def outcome(losses):
        pack = trained(losses, batches)
        sae, head = pack.sae("it"), pack._members["it"].parameters
        f = sae.encode(x)
        W = sae.parameters["W_dec"]
        found = {
            "decorrelation": decorrelation(W)[0].item(),
            "max_cosine": max_cosine(W, 0.0, 0)[0].item(),
            "temporal": (f[1:] - f[:-1]).square().sum(1).mean().item(),
        }
        if "probe.weight" in head:
            found["accuracy"] = (
                ((f @ head["probe.weight"] + head["probe.bias"]).argmax(1) == labels).double().mean().item()
            )
        return found

    plain = outcome(Losses())
    assert outcome(Losses(decorrelation=5.0))["decorrelation"] < 0.98 * plain["decorrelation"]
    assert outcome(Losses(max_cosine=2.0, max_cosine_above=0.2))["max_cosine"] < 0.9 * plain["max_cosine"]
    assert outcome(Losses(temporal=1.0))["temporal"] < 0.9 * plain["temporal"]
    assert outcome(Losses(probe=0.3, probe_classes=2))["accuracy"] > 0.85
