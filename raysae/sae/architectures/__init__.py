"""SAE architectures. Adding one is adding a module here: a subclass of `Architecture` with a `name` registers itself."""

import importlib
import pkgutil

from raysae.sae.architectures.base import (
    ARCHITECTURES,
    COEFFICIENTS,
    Architecture,
    Moment,
    Parameters,
    SAEConfig,
    Step,
    initial_parameters,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ARCHITECTURES",
    "COEFFICIENTS",
    "Architecture",
    "Moment",
    "Parameters",
    "SAEConfig",
    "Step",
    "initial_parameters",
]
