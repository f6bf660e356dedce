"""A planted dictionary: rows x = s G + noise with known unit atoms G and sparse s ≥ 0, which every architecture must find.

Recovery is the share of atoms whose best decoder row, matched one to one, has |cos| ≥ 0.9. Random rows reach none.
"""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from raysae.sae.architectures import ARCHITECTURES, SAEConfig
from raysae.sae.train import InputScale, Member, Pack, Recipe

D, ATOMS, ACTIVE, D_SAE, BATCH, STEPS = 32, 48, 3, 96, 256, 1500


def planted(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, ATOMS, generator=generator).argsort(1)[:, :ACTIVE]
    s = torch.zeros(rows, ATOMS).scatter_(1, chosen, 0.5 + torch.rand(rows, ACTIVE, generator=generator))
    return s @ G + 0.02 * torch.randn(rows, D, generator=generator)


G = torch.nn.functional.normalize(torch.randn(ATOMS, D, generator=torch.Generator().manual_seed(11)))
ROWS = planted(100 * BATCH, 1)
HELD_OUT = planted(4096, 2)
SCALE = InputScale(ROWS.mean(0), ROWS.var(0, correction=0).sum().item())
# Its right sparsity: the number of atoms per row, or a coefficient small against what an atom explains.
SPARSITY = {
    "relu": {"l1_coefficient": 0.3},
    "relu_unit_norm": {"l1_coefficient": 0.3},
    "p_anneal": {"l1_coefficient": 0.15},
    "gated": {"l1_coefficient": 0.4},
    "topk": {"k": ACTIVE},
    "abstopk": {"k": ACTIVE},
    "batchtopk": {"k": ACTIVE},
    "matryoshka": {"k": ACTIVE},
    "jumprelu": {"target_l0": ACTIVE},
    "jumprelu_l0": {"l0_coefficient": 0.01},
    "jumprelu_tanh": {"l0_coefficient": 0.005},
}


def recovered(W_dec: torch.Tensor) -> float:
    cosines = (torch.nn.functional.normalize(W_dec) @ G.T).abs()
    row, atom = linear_sum_assignment(-cosines.numpy())
    return (cosines[row, atom] >= 0.9).double().mean().item()


def batches():
    for step in range(STEPS):
        i = step % 100
        yield ROWS[i * BATCH : (i + 1) * BATCH]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_planted_atoms_are_found(architecture):
    # Matryoshka's first latents stand for several atoms each: with no more latents than the others have, the rest find 83
    # to 94 % of the atoms (four seeds), with twice as many 94 to 98 %.
    d_sae = 2 * D_SAE if architecture == "matryoshka" else D_SAE
    member = Member("it", SAEConfig(architecture, D, d_sae, **SPARSITY[architecture]), 5e-3)
    pack = Pack([member], Recipe(STEPS, BATCH, 50, 300, 150, 20 * BATCH), SCALE)
    assert recovered(pack.sae("it").parameters["W_dec"]) < 0.1
    pack.train(batches())
    sae = pack.sae("it")
    f = sae.encode(HELD_OUT)
    l0 = (f != 0).sum(1).double().mean().item()
    fvu = (HELD_OUT - sae(HELD_OUT)).square().sum() / (HELD_OUT - HELD_OUT.mean(0)).square().sum()
    print(f"{architecture}: recovered {recovered(sae.parameters['W_dec']):.2f}, L0 {l0:.2f}, FVU {fvu:.4f}")
    assert recovered(sae.parameters["W_dec"]) >= 0.9, (l0, fvu)
    assert 0.6 * ACTIVE < l0 < 2 * ACTIVE
