"""Run a finished run again from what it recorded, and compare: exit 0 if it replicates, 3 if it does not.

python jobs/replicate.py results/<run>
"""

from raysae.config import ReplicateJob, load_config
from raysae.job import NO_GO, run_job
from raysae.replicate import in_words, replicate
from raysae.run import Run


def main(argv: list[str]) -> int:
    config = load_config(ReplicateJob, argv)
    found = replicate(Run.open(config.run, verify=True), config.output, config.exact)
    print(in_words(found))
    return 0 if found["replicates"] else NO_GO


if __name__ == "__main__":
    run_job(main)
