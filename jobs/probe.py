"""`raysae probe`, for a checkout and `ray job submit --working-dir . -- python jobs/probe.py ...`."""

from raysae.cli import probe
from raysae.job import run_job

if __name__ == "__main__":
    run_job(probe)
