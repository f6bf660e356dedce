"""SAEs of every architecture with parameters away from their start, for the tests of formats."""

import torch
from helpers import sparse_rows

from raysae.sae.architectures import ARCHITECTURES, SAEConfig, initial_parameters
from raysae.sae.sae import SAE, fold

D, F, SCALE = 8, 32, 0.07
X = sparse_rows(500, D, seed=4) * 5 + 2  # raw rows, of norm ~ 40
METADATA = {"model_name": "toy", "hook_name": "blocks.3.hook_resid_post", "context_size": 16, "prepend_bos": True}
KNOBS = {"k": 4, "l1_coefficient": 0.25, "target_l0": 6.0, "l0_coefficient": 0.01}
CONFIGS = {
    name: SAEConfig(name, D, F, seed=5, **{a.coefficient: KNOBS[a.coefficient]}) for name, a in ARCHITECTURES.items()
}


def parameters_of(config):
    """Parameters of an SAE on inputs of mean squared norm near 1."""
    generator = torch.Generator().manual_seed(8)
    p = initial_parameters(config, torch.randn(D, generator=generator) * 0.2)
    p["W_enc"] = p["W_enc"] + 0.1 * torch.randn(D, F, generator=generator)
    p["W_dec"] = p["W_dec"] * (0.5 + torch.rand(F, 1, generator=generator))
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        if name in p:
            p[name] = 0.1 * torch.randn(F, generator=generator)
    if "threshold" in p:
        p["threshold"] = torch.tensor(0.2)
    if "log_threshold" in p:
        p["log_threshold"] = (0.05 + 0.3 * torch.rand(F, generator=generator)).log()
    return p


def folded(architecture):
    """An SAE trained on SCALE·x that reads x."""
    config = CONFIGS[architecture]
    return SAE(config, fold(parameters_of(config), SCALE), METADATA)


def unfolded(architecture):
    """(f, x̂) of X by the same SAE, unfolded, on scaled rows."""
    config = CONFIGS[architecture]
    sae = SAE(config, parameters_of(config))
    f = sae.encode(SCALE * X)
    return f, sae.decode(f) / SCALE


def assert_same(f, x_hat, f_wanted, x_hat_wanted):
    """Latents and reconstructions to 1e-5 (relative to rows of norm 40), with equal L0 in every row."""
    torch.testing.assert_close(f, f_wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_hat, x_hat_wanted, atol=1e-5 * float(X.norm(dim=1).mean()), rtol=1e-5)
    assert torch.equal((f != 0).sum(1), (f_wanted != 0).sum(1)) and (f_wanted != 0).any()
