"""Sweep SAEs over a model's activations and decide which one, if any, passes the gate.

python jobs/sweep_sae.py --config configs/quickstart.yaml --sweep.expansion_factors '[4,8]'
python jobs/sweep_sae.py --config configs/quickstart.yaml --plan      # what it would cost, and no more
"""

import raysae
from raysae.config import SweepJob, load_config
from raysae.job import NO_GO, run_job, summary
from raysae.planning import plan


def main(argv: list[str]) -> int:
    config = load_config(SweepJob, argv)
    if config.plan:
        print(plan(config))
        return 0
    run = raysae.sweep(config)
    print(summary(run))
    return NO_GO if config.require_go and not run.go else 0


if __name__ == "__main__":
    run_job(main)
