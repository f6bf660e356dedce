"""Put all that an auditor of a run needs into one archive, with the sha256 of each part.

python jobs/bundle.py results/<run> --to run.tar.gz
"""

from raysae.bundle import bundle
from raysae.config import BundleJob, load_config
from raysae.job import run_job
from raysae.run import Run


def main(argv: list[str]) -> None:
    config = load_config(BundleJob, argv)
    print(bundle(Run.open(config.run), config.to, config.weights))


if __name__ == "__main__":
    run_job(main)
