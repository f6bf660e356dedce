"""`raysae replicate`, for a checkout and `ray job submit --working-dir . -- python jobs/replicate.py ...`."""

from raysae.cli import replicate
from raysae.job import run_job

if __name__ == "__main__":
    run_job(replicate)
