"""The sweep's parts, and the call that runs the main job.

`raysae.sweep` is both the folder of this step of the flow and what a notebook calls: `raysae.sweep(config) -> Run`. A
function of that name beside a package of that name would be one or the other, by the order of imports; so the package
itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raysae.config import SweepJob
    from raysae.run import Run


class _Callable(ModuleType):
    def __call__(self, config: SweepJob) -> Run:
        """Run the main job of `config`; see `raysae.flow.sweep`."""
        from raysae.flow import sweep

        return sweep(config)


sys.modules[__name__].__class__ = _Callable
