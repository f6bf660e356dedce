"""Every command of the README: executed at the smallest size, or, where it needs the hub, shown to parse."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from test_wheel import SMALLEST

from raysae import cli
from raysae.config.jobs import SweepJob
from raysae.config.load import load_config
from raysae.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = re.findall(r"^ {4,}((?:raysae|python|ray|make|pip) .*)$", (ROOT / "README.md").read_text(), re.M)
WORDS = {command: shlex.split(command, comments=True) for command in COMMANDS}
OF_THE_HUB = ("gpt2_gsm8k", "pythia_160m", "llama32_1b_gsm8k")
RAYSAE = [command for command, (program, *_) in WORDS.items() if program in ("raysae", "ray")]
pytestmark = pytest.mark.slow


def smallest(name: str, argv: list[str], model: Path) -> list[str]:
    """`argv` and, of what it leaves unsaid, the least: two SAEs of the quickstart on a model that needs no training. All
    commands get the same, so that they share stages."""
    least: dict[str, object] = {"folds": 2, "ks": "[1]", "bootstrap": 50}
    if name == "sweep":
        least = SMALLEST | {f"probes.{field}": value for field, value in least.items()}
        least |= {"data.examples": 400, "sweep.expansion_factors": "[4,8]"}
        if "gsm_nano" in argv:
            least |= {"sweep.expansion_factors": "[2]", "sweep.l1_coefficients": "[0.1]", "sweep.k": "[4]"}
        else:
            least |= {"model.name": model}
        del least["cluster.num_cpus"], least["cluster.dashboard"]  # the tests' own cluster is there
    elif name != "probe":
        return argv
    said = {word.removeprefix("--") for word in argv}
    return [*argv, *(w for field, value in least.items() if field not in said for w in (f"--{field}", str(value)))]


@pytest.fixture(scope="module")
def work(tmp_path_factory, arithmetic_model) -> Path:
    """The folder that the commands run in, with the files of one's own that they name."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "phase2.yaml").write_text("sweep: {expansion_factors: [4, 8]}")
    return folder


@pytest.fixture(scope="module")
def run_folder(ray_cluster, work, arithmetic_model) -> Path:
    """`results/<run>`: what the README's first sweep makes."""
    first = next(words for words in WORDS.values() if words[:2] == ["raysae", "sweep"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert cli.sweep(smallest("sweep", first[2:], arithmetic_model)) == 0
    (decision,) = work.glob("results/*/decision.json")
    return decision.parent.relative_to(work)


@pytest.mark.parametrize("command", RAYSAE)
def test_a_command_of_raysae(command, run_folder, work, arithmetic_model, monkeypatch, request, capsys):
    monkeypatch.chdir(work)
    program, *words = (str(run_folder) if word == "results/<run>" else word for word in WORDS[command])
    if program == "ray":  # test_jobs_api.py submits one
        assert words[: words.index("--")] == ["job", "submit", "--working-dir", "."]
        python, job, *words = words[words.index("--") + 1 :]
        assert python == "python" and (ROOT / job).is_file()
        words = ["sweep", *words]
    name, *argv = words
    if argv == ["--help"] or name == "--help":
        with pytest.raises(SystemExit) as ended:
            monkeypatch.setattr("sys.argv", ["raysae", *words])
            cli.main()
        assert ended.value.code == 0 and "usage: raysae" in capsys.readouterr().out
    elif set(argv) & {*OF_THE_HUB}:
        assert load_config(SweepJob, argv).model.name != SweepJob().model.name
    elif "--basis" in argv:
        with pytest.raises(UserError, match=f"basis: .*{run_folder.name}.* no-go"):
            cli.sweep(smallest("sweep", argv, arithmetic_model))
    else:
        if "gsm_nano" in argv:
            shared = request.getfixturevalue("shared")
            config = load_config(SweepJob, argv)
            held_out = (shared / "data/gsm8k/test.jsonl").read_text().splitlines(keepends=True)
            (work / "test.jsonl").write_text("".join(held_out[:100]))
            argv += ["--model.name", str(shared / "models" / Path(config.model.name).name)]
            argv += ["--data.path", str(shared / "data/gsm8k" / Path(str(config.data.path)).name)]
        status = cli.COMMANDS[name][0](smallest(name, argv, arithmetic_model))
        assert (status or 0) == (cli.NO_GO if name == "gate" else 0), capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in RAYSAE])
def test_another_command(command):
    program, *words = WORDS[command]
    if program == "make":
        lines = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert lines.returncode == 0, lines.stderr
        named = re.findall(r"\S+/python (\S+\.py)", lines.stdout)
        assert all((ROOT / file).is_file() for file in named) and (named or words[0] not in ("sweep", "bench"))
    else:
        assert program == "pip" and words[0] == "install"
        extras = re.fullmatch(r"\.\[(.*)\]", words[1])[1].split(",")
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
