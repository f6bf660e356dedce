"""How a job's entry point ends: which exception or signal gives which exit status, and what it says."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raysae.errors import CaptureError, Fault, UserError
from raysae.job import run_job

INTERRUPTED = "interrupted; the same command goes on from here\n"


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def raising(error: BaseException):
    def main(argv: list[str]) -> int:
        raise error

    return main


def signalled(number: int, meanwhile: type[BaseException] | None = None):
    def main(argv: list[str]) -> int:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if meanwhile:
                raise meanwhile("a library's own words") from None
            raise
        return 0

    return main


@pytest.mark.parametrize(
    "main,status,said",
    [
        (lambda argv: None, 0, ""),
        (lambda argv: 3, 3, ""),
        (raising(UserError("a: b")), 2, "error: a: b\n"),
        (raising(Fault("a disk is gone")), 1, "fault: a disk is gone\n"),
        (raising(CaptureError("block 3")), 1, "fault: block 3\n"),
        (raising(KeyboardInterrupt()), 130, INTERRUPTED),
        (signalled(signal.SIGINT), 130, INTERRUPTED),
        (signalled(signal.SIGTERM), 143, INTERRUPTED),
        (signalled(signal.SIGTERM, RuntimeError), 143, INTERRUPTED),
        (signalled(signal.SIGINT, UserError), 130, INTERRUPTED),
    ],
)
def test_exit_statuses(main, status, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run_job(main)
    assert ended.value.code == status and capsys.readouterr().err == said


def test_what_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_job(raising(ZeroDivisionError()))


def test_a_second_signal_ends_a_job_that_hangs_while_it_stops(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import os, signal, time\n"
        "from raysae.job import run_job\n"
        "def main(argv):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        except BaseException:\n"
        "            time.sleep(600)\n"
        "run_job(main)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": root}
    )
    assert (done.returncode, done.stderr) == (143, INTERRUPTED)
