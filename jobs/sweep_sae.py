"""`raysae sweep`, for a checkout and `ray job submit --working-dir . -- python jobs/sweep_sae.py ...`."""

from raysae.cli import sweep
from raysae.job import run_job

if __name__ == "__main__":
    run_job(sweep)
