"""Sweeps in processes forked from this one, which has imported all that a sweep needs: seconds less for each.

Reads a line of JSON per job: the config's file, a log, and a trap, a signal that the job gets at a named moment: `there`,
as soon as a new file matches a pattern, or `renamed`, when it is about to get its name. Writes a line with the job's pid
and status when it has ended.
"""

import fnmatch
import json
import os
import sys
import threading
import time
from glob import glob

from raysae.config.jobs import SweepJob
from raysae.config.load import load_config
from raysae.evaluate import features, nulls, risk
from raysae.job import run_job
from raysae.on_ray import bench
from raysae.studies.sweep import run_sweep

IMPORTED = (bench, features, nulls, risk)


def set_trap(number: int, when: str, pattern: str) -> None:
    fired = threading.Event()

    def fire() -> None:
        if not fired.is_set():
            fired.set()
            os.kill(os.getpid(), number)

    before = set(glob(pattern))

    def watch() -> None:
        while not set(glob(pattern)) - before:
            time.sleep(0.002)
        fire()

    def audit(event: str, arguments: tuple) -> None:
        if event == "os.rename" and fnmatch.fnmatch(os.fsdecode(arguments[1]), pattern):
            fire()

    if when == "there":
        threading.Thread(target=watch, daemon=True).start()
    else:
        sys.addaudithook(audit)


def run(job: dict) -> None:
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["sweep", "--config", job["config"]]
    if job["trap"]:
        set_trap(*job["trap"])

    def main(argv: list[str]) -> None:
        run_sweep(load_config(SweepJob, argv))

    run_job(main)


def serve() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)


if __name__ == "__main__":
    serve()
