"""`raysae gate`, for a checkout and `ray job submit --working-dir . -- python jobs/gate.py ...`."""

from raysae.cli import gate
from raysae.job import run_job

if __name__ == "__main__":
    run_job(gate)
