"""L1 coefficients as others state them. A coefficient means nothing without the loss's reductions and the inputs' scale.

Ours, `unit_norm`: sum over d_in of the squared error, sum over latents of |f| ‖W_dec‖, inputs of mean ‖x - μ‖² = 1. An SAE
on s·x has latents s·f and errors s·e, so its loss s²‖e‖² + λ' s Σ|f| has the minimum of ours at λ = λ' / s. Who scales by
‖x‖ instead has inputs smaller by `offset` = √(E‖x‖² / E‖x - μ‖²).
"""

from __future__ import annotations

import math
from collections.abc import Callable

L1_UNITS: dict[str, Callable[[float, int, int, float], float]] = {
    "unit_norm": lambda value, d_in, d_sae, offset: value,
    "unit_norm_uncentred": lambda value, d_in, d_sae, offset: value * offset,
    "sqrt_d": lambda value, d_in, d_sae, offset: value * offset / math.sqrt(d_in),
    "mean_error": lambda value, d_in, d_sae, offset: value * math.sqrt(d_in),
    "mean_error_mean_latents": lambda value, d_in, d_sae, offset: value * math.sqrt(d_in) / d_sae,
}
"""(value, d_in, d_sae, offset) -> ours. unit_norm_uncentred: sums, inputs of E‖x‖² = 1 (dictionary_learning). sqrt_d: sums,
inputs of E‖x‖² = d_in (Anthropic, SAELens' tutorial; they take E‖x‖, a little less than its root). mean_error: mean over
d_in of the squared error, sum over latents, z-scored inputs. mean_error_mean_latents: both means; the penalty weakens
as 1/d_sae."""


def l1_in_unit_norm(value: float, units: str, d_in: int, d_sae: int, offset: float = 1.0) -> float:
    """The coefficient of our loss whose minimum is that of `units`' loss with `value`."""
    return L1_UNITS[units](value, d_in, d_sae, offset)
