"""Bad input of the main job, a row each: exit status 2, one line that names the field or file, and nothing written."""

import os
import sys
from errno import EACCES, EDQUOT, ENOENT, ENOSPC, EROFS
from pathlib import Path

import pytest

from raysae.cli import sweep
from raysae.config.jobs import SweepJob
from raysae.config.load import load_config
from raysae.job import run_job
from raysae.workspace import Workspace

WIDE = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP = "".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 'x'}]\n" for i in range(3000))


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the main job in an empty folder, up to its first stage; returns its one line."""
    monkeypatch.setattr(Workspace, "make", lambda *_: pytest.fail("the run went on"))

    def run(*argv):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["sweep_sae.py", *argv])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            run_job(sweep)
        out, said = capsys.readouterr()
        assert caught.value.code == 2, said
        assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 600, said
        assert "Traceback" not in said + out and sorted(tmp_path.rglob("*")) == before
        return said

    return run


FILES = {
    "an alias bomb": (WIDE, "job.yaml is not YAML: its aliases stand for more than 100,000 values"),
    "a node within itself": ("a: &a [*a]", "its aliases stand for more"),
    "3,000 nested lists": (f"a: {'[' * 3000}{']' * 3000}", "it nests deeper than 50 levels"),
    "3,000 levels of aliases": (DEEP, "its aliases stand for more than 100,000 values or 50 levels"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "job.yaml is not UTF-8 text"),
    "Latin-1": (b"run: caf\xe9", "job.yaml is not UTF-8 text"),
    "binary": (b"\x00\x01\x02", "job.yaml is not YAML"),
    "a megabyte": ("#" * 1_000_001, "it is larger than 1,000,000 bytes"),
    "a second section": ("sweep: {k: [2]}\nseed: 1\nsweep: {k: [4]}\n", "sweep stands twice, in lines 1 and 3"),
    "a second key in a section": ("sweep:\n  k: [2]\n  k: [4]\n", "k stands twice, in lines 2 and 3"),
    "a date that is none": ("seed: 2024-13-45", "job.yaml is not YAML: month must be in 1..12"),
    "a number that is none": ("seed: 0x_", "job.yaml is not YAML: invalid literal"),
    "a number of 6,000 digits": (f"seed: {'9' * 6000}", "job.yaml is not YAML"),
    "a Python object": ("run: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "a key that is no name": ("1: 2", "1 is not allowed; keys should be strings"),
    "a section that is a list": ("sweep: [1]", "sweep: [1] is not allowed"),
    "a long wrong value": (f"sweep: [{', '.join(['1'] * 9999)}]", "... is not allowed"),
    "a negative seed": ("seed: -1", "seed: -1 is not allowed; input should be greater than or equal to 0"),
    "tokens that are no integer": ("training: {tokens: 1.5e0}", "training.tokens: '1.5e0' is not allowed"),
    "endless tokens": ("training: {tokens: 1e999999999}", "training.tokens: '1e999999999' is not allowed"),
    "the home of nobody": ("output: ~nobody-of-this-name/x", "output: ~nobody-of-this-name/x names no home folder"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_is_no_config(what, refused, tmp_path):
    content, words = FILES[what]
    file = tmp_path / "job.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refused("--config", str(file))


GRID = ("--sweep.search", "grid", "--sweep.architectures", "[topk]")
ARGUMENTS = [
    (("--seed", "-1"), "seed: '-1' is not allowed"),
    (("--sweep.seeds", "[0,-1]"), "sweep.seeds.1: -1 is not allowed"),
    (("--transfer", "{bad"), 'transfer: Missing end delimiter "}"'),
    (("--sweep.k", "[4"), 'sweep.k: Missing end delimiter "]"'),
    (("--sweep", "{bad"), 'field "sweep"'),
    (("--sweep.ranges", "{a: 3}"), "sweep.ranges: Expecting property name"),
    # The same SAE several times, or one that cannot be. The embedded model has d_in 64.
    (("--sweep.k", "[8,8]"), "sweep.k: 8 is given twice"),
    (("--sweep.expansion_factors", "[4,4.0]"), "sweep.expansion_factors: 4.0 is given twice"),
    (("--sweep.architectures", "[topk,topk]"), "sweep.architectures: topk is given twice"),
    (("--sweep.l1_coefficients", "[0.1,0.10]"), "sweep.l1_coefficients: 0.1 is given twice"),
    (("--sweep.target_l0", "[8,8]"), "sweep.target_l0: 8.0 is given twice"),
    (("--sweep.coefficients", '{"gated":[0.1,0.1]}'), "sweep.coefficients.gated: 0.1 is given twice"),
    (("--probes.labels", "step,step"), "probes.labels: step is given twice"),
    ((*GRID, "--sweep.expansion_factors", "[0.0625]"), "sweep.k: 8, 16, 32 is above the 4 latents"),
    ((*GRID, "--sweep.expansion_factors", "[4,4.001]"), "4 and 4.001 are both d_sae 256"),
    ((*GRID, "--sweep.expansion_factors", "[1e300]"), "sweep.expansion_factors: 1e+300 makes"),
    ((*GRID, "--sweep.coefficients", '{"topk":[8,8.5]}'), "sweep.coefficients.topk: [8.0, 8.5] must be whole numbers"),
    (
        ("--sweep.search", "grid", "--sweep.architectures", "[jumprelu]", "--sweep.expansion_factors", "[0.25]"),
        "sweep.target_l0: 32 is above the 16 latents",
    ),
    (("--sweep.expansion_factors", "[0.03125]"), "sweep.k_range: 4, 32 is above the 2 latents"),
    (("--sweep.k_range", "[4,6]"), "sweep.samples: 4 topk SAEs are asked at each point, but k_range holds 3 values of k"),
    (("--sweep.k_range", "[14,32]", "--sweep.expansion_factors", "[0.25]"), "but k_range holds 3 values of k"),
    (("--sweep.l1_range", "[0.1,0.1]"), "sweep.samples: 4 relu SAEs are asked at each point, but l1_range holds 1 values"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "words"), ARGUMENTS, ids=[f"{' '.join(argv[-2:])}" for argv, _ in ARGUMENTS])
def test_a_command_line_that_cannot_be_meant(argv, words, refused):
    assert words in refused(*argv)


def test_what_looks_odd_and_is_meant(tmp_path, monkeypatch):
    """`~` is the home folder in every path, an integer may be written as 1e6, and anchors serve what they are for."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "output: ~/x\ngate: ~/g\nmodel: {name: ~/m, tokenizer: ~/t}\ndata: {path: ~/d}\n"
    text += "training: {tokens: 1e6, batch_size: 2.048e3}"
    file = tmp_path / "job.yaml"
    file.write_text(
        text + "\ntransfer:\n  one: &one {source: text, path: ~/one}\n  two: {<<: *one, path: ~/two}\n", "utf-8-sig"
    )
    config = load_config(SweepJob, ["--config", "~/job.yaml", "--budget.tokens", "2e9"])
    found = (config.output, config.gate, config.model.name, config.model.tokenizer, config.data.path)
    assert [Path(path) for path in found] == [tmp_path / name for name in "xgmtd"]
    assert (config.training.tokens, config.training.batch_size, config.budget.tokens) == (10**6, 2048, 2 * 10**9)
    assert [data.path for data in config.transfer.values()] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert all(isinstance(n, int) for n in (config.training.tokens, config.budget.tokens))


def test_an_output_that_cannot_be_written_to(refused, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "output: " in refused("--output", str(tmp_path / "file" / "below")) and tmp_path.is_dir()
    denied = {tmp_path / "theirs", tmp_path / "ours" / "stages"}
    for folder in denied:
        folder.mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in denied and access(path, mode))
    assert f"output: {tmp_path / 'theirs'} cannot be written to" in refused(
        "--output", str(tmp_path / "theirs" / "new")
    )
    assert f"output: {tmp_path / 'ours' / 'stages'} cannot be written to" in refused("--output", str(tmp_path / "ours"))


class FromWorker(RuntimeError):
    """As Ray raises what a worker raised: its text, and the error as `cause`."""

    cause = OSError(ENOSPC, "No space left on device", "/out/shard.safetensors")


DISK = [
    (OSError(ENOSPC, "No space left on device", "/out/x.json"), 1, "fault: disk full at /out/x.json; with room made"),
    (OSError(EDQUOT, "Disk quota exceeded", "/out/x.json"), 1, "fault: disk full at /out/x.json"),
    (
        RuntimeError("trial: OSError: [Errno 28] No space left on device: '/out/y'"),
        1,
        "fault: disk full at /out/y; with",
    ),
    (ValueError("I/O error: No space left on device (os error 28)"), 1, "fault: disk full at the output root or"),
    (FromWorker("ray::task() failed"), 1, "fault: disk full at /out/shard.safetensors"),
    (
        PermissionError(EACCES, "Permission denied", "/out/.lock"),
        2,
        "error: /out/.lock: Permission denied; make it yours",
    ),
    (OSError(EROFS, "Read-only file system", "/out/new"), 2, "error: /out/new: Read-only file system; make it yours"),
]


@pytest.mark.parametrize(("error", "status", "words"), DISK, ids=lambda value: type(value).__name__)
def test_a_full_disk_and_a_folder_of_another_are_one_line(error, status, words, monkeypatch, capsys):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(SystemExit) as caught:
        run_job(main)
    said = capsys.readouterr().err
    assert caught.value.code == status and said.startswith(words) and said.count("\n") == 1


def test_another_error_of_the_system_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["job"])
    for error in (FileNotFoundError(ENOENT, "No such file or directory", "/x"), KeyError("fvu")):
        with pytest.raises(type(error)):
            run_job(lambda argv, error=error: (_ for _ in ()).throw(error))
