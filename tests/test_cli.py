"""The commands by their names, shipped files by theirs, and what a command says where its extra is not installed."""

import sys
from pathlib import Path

import pytest
import yaml

from raysae import cli
from raysae.config.jobs import SweepJob
from raysae.config.load import SHIPPED, load_config, locate
from raysae.errors import UserError
from raysae.gates.criteria import load_gate

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


# ----------------------------------------------------------------------------------------------------------------------
# Shipped files by their names


def test_a_shipped_file_goes_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart", "configs/quickstart.yaml"):
        assert locate("config", Path(name)) == SHIPPED / "quickstart.yaml"
    assert locate("config", Path("recipes/topk_gao")) == SHIPPED / "recipes" / "topk_gao.yaml"
    assert locate("gate", Path("gates/phase1")) == SHIPPED / "gates" / "phase1.yaml"
    job = load_config(SweepJob, ["--config", "quickstart", "recipes/topk_gao", "--gate", "gates/phase2"])
    assert job == load_config(SweepJob, ["--gate", "gates/phase2"], SHIPPED / "quickstart.yaml").model_copy(
        update={name: getattr(job, name) for name in yaml.safe_load((SHIPPED / "recipes/topk_gao.yaml").read_text())}
    )
    assert load_gate(job.gate).name == "phase2" and load_gate(SweepJob().gate).name == "default"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # a folder is no config
    assert locate("config", Path("quickstart")) == SHIPPED / "quickstart.yaml"
    (tmp_path / "quickstart.yaml").write_text("seed: 7")
    assert load_config(SweepJob, ["--config", "quickstart.yaml"]).seed == 7
    assert load_config(SweepJob, ["--config", "quickstart"]).seed == 0


@pytest.mark.parametrize(
    ("field", "name", "shipped"),
    [
        ("config", "quickstrat", "gpt2_gsm8k"),
        ("config", "gates/default", "recipes/topk_gao"),
        ("config", "../configs/quickstart", "stories260k"),
        ("config", "/quickstart", "quickstart"),
        ("gate", "quickstart", "gates/default, gates/phase1"),
        ("gate", "", "gates/default"),
    ],
)
def test_a_name_that_is_not_shipped_is_one_line_with_those_that_are(field, name, shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        locate(field, Path(name))
    said = str(caught.value)
    assert said.startswith(f"{field}: {Path(name)} is not a file") and "\n" not in said
    offered = said.split("shipped: ")[1].split(", ")
    assert shipped in said and not [n for n in offered if n.startswith("gates/") != (field == "gate")]
    assert not [n for n in offered if n.startswith("cluster/")], "which are for `ray up`"
