"""raysae finds the right sparse autoencoder for a language model on a Ray cluster, and shows the evidence.

>>> import raysae
>>> run = raysae.run_sweep(raysae.SweepJob())     # everything that jobs/sweep_sae.py does
>>> run.table, run.decision, run.sae()        # or raysae.Run.open("results/<run>")
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Before torch is imported: threads that wait for work sleep instead of spinning, so that a model that shares its cores
# with trials or with the tasks that read does not slow them (and itself) several-fold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["SAE", "Run", "Store", "SweepJob", "UserError", "load_config", "run_sweep"]

_WHERE = {
    "SAE": "raysae.sae.sae",
    "Run": "raysae.run",
    "Store": "raysae.activations.store",
    "SweepJob": "raysae.config.jobs",
    "UserError": "raysae.errors",
    "load_config": "raysae.config.load",
    "run_sweep": "raysae.studies.sweep",
}

if TYPE_CHECKING:
    from raysae.activations.store import Store
    from raysae.config.jobs import SweepJob
    from raysae.config.load import load_config
    from raysae.errors import UserError
    from raysae.run import Run
    from raysae.sae.sae import SAE
    from raysae.studies.sweep import run_sweep


def __getattr__(name: str) -> Any:  # loaded on first use: `import raysae.sae` needs neither Ray nor transformers
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'raysae' has no attribute {name!r}")
