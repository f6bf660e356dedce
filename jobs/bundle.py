"""`raysae bundle`, for a checkout and `ray job submit --working-dir . -- python jobs/bundle.py ...`."""

from raysae.cli import bundle
from raysae.job import run_job

if __name__ == "__main__":
    run_job(bundle)
