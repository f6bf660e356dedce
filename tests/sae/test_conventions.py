"""L1 coefficients of other conventions: their loss and ours, on the same SAE, are one function up to a factor."""

import math

import pytest
import torch

from raysae.sae.conventions import L1_UNITS, l1_in_unit_norm

D, F = 16, 48


def their_loss(units, error, magnitudes, value):
    """Loss of errors [n, d] and decoder-weighted latents [n, F] in the units of that convention."""
    if units in ("unit_norm", "unit_norm_uncentred", "sqrt_d"):
        return error.square().sum(1).mean() + value * magnitudes.sum(1).mean()
    penalty = magnitudes.mean() if units == "mean_error_mean_latents" else magnitudes.sum(1).mean()
    return error.square().mean() + value * penalty


@pytest.mark.parametrize("units", L1_UNITS)
def test_the_converted_coefficient_is_the_same_trade_off(units):
    generator = torch.Generator().manual_seed(0)
    offset = 1.0
    if units in ("unit_norm_uncentred", "sqrt_d"):  # they scale by E‖x‖², the mean's norm included
        x = torch.randn(999, D, generator=generator).double() + 3
        offset = (x.square().sum(1).mean() / x.var(0, correction=0).sum()).sqrt().item()
        assert offset > 3
    scale = (1.0 if units.startswith("unit_norm") else math.sqrt(D)) / offset  # their inputs are this many times ours
    ratios = []
    for _ in range(3):  # three SAEs: a common factor means the same minimum
        error, magnitudes = torch.randn(9, D, generator=generator), torch.rand(9, F, generator=generator)
        theirs = their_loss(units, scale * error, scale * magnitudes, 0.3)
        ours = error.square().sum(1).mean() + l1_in_unit_norm(0.3, units, D, F, offset) * magnitudes.sum(1).mean()
        ratios.append((theirs / ours).item())
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-5)
