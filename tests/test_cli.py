"""The commands by their names, and what a command says where its extra is not installed."""

import sys
from pathlib import Path

import pytest

from raysae import cli

JOBS = Path(__file__).resolve().parents[1] / "jobs"


@pytest.fixture
def raysae(monkeypatch, capsys):
    """Runs the console script; returns its exit status, what it printed, and its error lines."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/raysae", *argv])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_lists_every_command_with_a_line(argv, raysae):
    status, shown, said = raysae(*argv)
    lines = [line.split(None, 1) for line in shown.splitlines() if line.startswith("  ")]
    assert (status, said) == (0, "")
    assert [name for name, _ in lines] == list(cli.COMMANDS) and all(text.endswith(".") for _, text in lines)


def test_the_help_of_a_command_names_it_and_its_fields(raysae):
    status, shown, _ = raysae("sweep", "--help")
    assert status == 0 and shown.startswith("usage: raysae sweep ") and "--sweep.expansion_factors" in shown


@pytest.mark.parametrize("argv", [("sweeep",), ("--gate", "x"), ("",)])
def test_an_unknown_command_is_one_line(argv, raysae):
    status, shown, said = raysae(*argv)
    assert (
        (status, shown) == (2, "") and said.startswith(f"error: unknown command {argv[0]}; ") and said.count("\n") == 1
    )
    assert ("did you mean sweep?" in said) == (argv == ("sweeep",)) and ", ".join(cli.COMMANDS) in said


def test_each_job_is_a_command(monkeypatch):
    for name in cli.COMMANDS:
        text = (JOBS / f"{'sweep_sae' if name == 'sweep' else name}.py").read_text()
        assert f"run_job({name})" in text
    assert len(list(JOBS.glob("*.py"))) == len(cli.COMMANDS)


# ----------------------------------------------------------------------------------------------------------------------
# Extras


@pytest.mark.parametrize(
    ("argv", "absent", "said"),
    [
        (("sweep",), ["ray"], "ray: not installed, and this command needs it; pip install 'raysae[ray]'"),
        (
            ("sweep", "--plan"),
            ["optuna"],
            "optuna: not installed, and this command needs it; pip install 'raysae[ray]'",
        ),
        (("sweep",), ["ray", "jinja2"], "ray, jinja2: not installed, and this command needs them"),
        (("sweep", "--tracking.wandb_project", "p"), ["wandb"], "pip install 'raysae[wandb]'"),
        (("probe", "results/x"), ["matplotlib"], "pip install 'raysae[report]'"),
        (("replicate", "results/x"), ["ray", "matplotlib"], "pip install 'raysae[ray,report]'"),
        (("sweep", "--seed", "-1"), ["ray"], "seed: '-1' is not allowed"),
        (("gate", "results/x"), ["ray", "matplotlib", "wandb"], "run: results/x has no decision.json"),
        (("bundle", "results/x"), ["ray", "matplotlib", "wandb"], "run: results/x has no decision.json"),
    ],
)
def test_a_command_without_its_extra_is_one_line(argv, absent, said, raysae, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for package in absent:
        monkeypatch.setitem(sys.modules, package, None)
    status, shown, error = raysae(*argv)
    assert (status, shown) == (2, "") and error.startswith("error: ") and said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
