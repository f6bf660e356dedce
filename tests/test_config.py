"""Configs: mistakes are one line with field, value and what is allowed; file and command line merge; help is complete."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel

from raysae.config.jobs import ProbeJob, SweepJob
from raysae.config.load import dump_yaml, load_config, validate
from raysae.config.sections import NULLS, Section
from raysae.errors import UserError
from raysae.files import output_root
from raysae.sae.architectures import ARCHITECTURES, initial_parameters
from raysae.sweep.space import Common, members, proposals


def refused(*argv, config=None):
    with pytest.raises(UserError) as caught:
        load_config(SweepJob, list(argv), config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def yaml_of(tmp_path, text):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    return file


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "field,value,allowed",
    [
        ("sweep.expansion_factors", "[4,-8]", "greater than 0"),
        ("sweep.expansion_factors", "[0]", "greater than 0"),
        ("sweep.expansion_factors", "[]", "at least 1"),
        ("sweep.l1_coefficients", "[0]", "greater than 0"),
        ("sweep.l1_coefficients", "[-0.1]", "greater than 0"),
        ("sweep.l1_range", "[0.5,0.1]", "l1_range must be [low, high]"),
        ("sweep.l1_range", "[0.5]", "field required"),
        ("sweep.k_range", "[8,2]", "k_range must be [low, high]"),
        ("sweep.k", "[0]", "greater than 0"),
        ("sweep.seeds", "[1,1]", "seeds must differ"),
        ("sweep.pack_size", "0", "greater than 0"),
        ("sweep.pack_size", "many", "'auto'"),
        ("training.batch_size", "0", "greater than 0"),
        ("training.batch_size", "-5", "greater than 0"),
        ("training.batch_size", "2.5", "valid integer"),
        ("training.tokens", "0", "greater than 0"),
        ("training.learning_rate", "nan", "finite"),
        ("training.warmup_fraction", "1.5", "less than or equal to 1"),
        ("data.source", "gsm", "'arithmetic', 'gsm8k', 'text' or 'dataset'"),
        ("data.test_fraction", "0", "above 0"),
        ("data.test_fraction", "0.95", "below 1"),
        ("evaluation.confidence", "1", "less than 1"),
        ("capture.dtype", "int8", "'bfloat16', 'float16' or 'float32'"),
        ("cluster.num_gpus", "-1", "greater than or equal to 0"),
        ("seed", "x", "valid integer"),
    ],
)
def test_a_wrong_value_is_one_line_with_field_value_and_what_is_allowed(field, value, allowed):
    message = refused(f"--{field}", value)
    assert message.startswith(field.split(".")[0]) and field.rsplit(".", 1)[-1] in message and allowed in message
    wrong = value.strip("[]").split(",")[-1]
    assert wrong in message or "must" in message


@pytest.mark.parametrize(
    "given,meant",
    [
        ("sweep.expansion_factor", "sweep.expansion_factors"),
        ("training.batchsize", "training.batch_size"),
        ("trainin.batch_size", "training.batch_size"),
        ("data.columns.stps", "data.columns.steps"),
        ("require-go", "require_go"),
    ],
)
def test_an_unknown_field_on_the_command_line_names_the_closest(given, meant):
    for argv in ((f"--{given}", "3"), (f"--{given}=3",)):
        message = refused(*argv)
        assert f"unknown field {given} (given 3)" in message and f"did you mean {meant}?" in message


@pytest.mark.parametrize(
    "text,said",
    [
        ("training: {batchsize: 3}", ("training.batchsize", "did you mean batch_size?")),
        ("trainin: {batch_size: 3}", ("trainin: unknown field", "did you mean training?")),
        ("sweep: {prune: {margn: 0.1}}", ("sweep.prune.margn", "did you mean margin?")),
        ("data: {columns: {stps: x}}", ("data.columns.stps", "did you mean steps?")),
        ("training: {batch_size: 0}", ("training.batch_size: 0 is not allowed", "greater than 0")),
        ("training: 3", ("training: 3 is not allowed",)),
        ("- a", ("must hold a mapping", "list")),
        ("", ("must hold a mapping",)),
        ("a: [", ("is not YAML",)),
    ],
)
def test_a_mistake_in_the_file_names_field_and_file(tmp_path, text, said):
    file = yaml_of(tmp_path, text)
    message = refused("--config", str(file))
    assert str(file) in message
    for part in said:
        assert part in message


def test_a_missing_file_is_named(tmp_path):
    assert "none.yaml is not a file" in refused("--config", str(tmp_path / "none.yaml"))


def test_a_stray_word_and_a_missing_value_are_refused():
    assert "unknown field stray" in refused("stray")
    assert "--seed" in refused("--seed")


# ----------------------------------------------------------------------------------------------------------------------
# Precedence


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    text = "seed: 3\nrun: mine\ntraining: {batch_size: 64, tokens: 1000}\nsweep: {expansion_factors: [2, 4, 8]}\n"
    file = yaml_of(tmp_path, text)
    argv = ["--config", str(file), "--training.batch_size", "32", "--sweep.expansion_factors", "[16]"]
    config = load_config(SweepJob, argv)
    assert (config.training.batch_size, config.training.tokens, config.seed, config.run) == (32, 1000, 3, "mine")
    assert config.sweep.expansion_factors == (16,)
    assert config.training.rungs == SweepJob().training.rungs
    assert load_config(SweepJob, [], file).training.batch_size == 64
    assert load_config(SweepJob, [*argv[:2], "--run", "null"]).run is None


def test_a_value_equal_to_the_default_still_wins_over_the_file(tmp_path):
    file = yaml_of(tmp_path, "training: {batch_size: 64}\nsweep: {prune: {enabled: false}}")
    default = SweepJob().training.batch_size
    config = load_config(SweepJob, ["--config", str(file), "--training.batch_size", str(default)])
    assert config.training.batch_size == default and config.sweep.prune.enabled is False


def test_the_environment_sets_no_field(monkeypatch):
    monkeypatch.setenv("SEED", "99")
    monkeypatch.setenv("RUN", "other")
    assert load_config(SweepJob, []) == SweepJob()


def test_lists_and_unions_from_the_command_line():
    config = load_config(
        SweepJob,
        ["--sweep.pack_size", "3", "--capture.sites", "[embed,blocks.1.resid_post]", "--sweep.seeds", "[0,1,2]"],
    )
    assert config.sweep.pack_size == 3 and config.capture.sites == ("embed", "blocks.1.resid_post")
    assert config.sweep.seeds == (0, 1, 2)


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    argv = ["--sweep.expansion_factors", "[2,4.5]", "--data.text_replace", "[a,b]", "--training.learning_rate", "3e-4"]
    for config in (SweepJob(), load_config(SweepJob, [*argv, "--output", "/tmp/x", "--run", "é"])):
        text = dump_yaml(config)
        assert load_config(SweepJob, [], yaml_of(tmp_path, text)) == config
        assert dump_yaml(load_config(SweepJob, [], yaml_of(tmp_path, text))) == text
        assert "!!" not in text and yaml.safe_load(text)["sweep"]["search"] == "optuna"


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        SweepJob().seed = 3


def test_identity_leaves_out_what_changes_no_result():
    one = SweepJob()
    elsewhere = {"run": "x", "output": "/y", "cluster": {"num_cpus": 3}, "tracking": {"wandb_project": "p"}}
    same = validate(SweepJob, {**elsewhere, "require_go": True})
    assert one.identity() == same.identity()
    assert one.identity() != validate(SweepJob, {"seed": 1}).identity()


# ----------------------------------------------------------------------------------------------------------------------
# Help


def leaves(section: type[BaseModel], prefix=""):
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def test_help_has_a_line_for_every_field_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(SweepJob, ["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    fields = dict(leaves(SweepJob))
    assert len(fields) > 40
    for name, field in fields.items():
        assert field.description, f"{name} has no docstring"
        assert " ".join(field.description.split()) in shown, name
        assert f"--{name} " in shown


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load(file):
    load_config(SweepJob, [], file)


# ----------------------------------------------------------------------------------------------------------------------
# Where results go


def test_a_relative_output_inside_a_jobs_temporary_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYSAE_OUTPUT", raising=False)
    job = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_abc"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    for given in (True, False):
        with pytest.raises(UserError, match=r"output: results is relative.*--output or RAYSAE_OUTPUT"):
            output_root(Path("results"), given)
    assert output_root(tmp_path / "out", given=True) == tmp_path / "out"
    monkeypatch.setenv("RAYSAE_OUTPUT", str(tmp_path / "env"))
    assert output_root(Path("results"), given=False) == tmp_path / "env"
    monkeypatch.setenv("RAYSAE_OUTPUT", "relative")
    with pytest.raises(UserError, match="output: relative is relative"):
        output_root(Path("results"), given=False)


def test_the_output_root_is_absolute_and_a_given_one_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYSAE_OUTPUT", raising=False)
    assert output_root(Path("results"), given=False) == Path(os.getcwd()) / "results"
    monkeypatch.setenv("RAYSAE_OUTPUT", str(tmp_path / "env"))
    assert output_root(Path("mine"), given=True) == Path(os.getcwd()) / "mine"


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("recipe", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_goes_over_every_config_and_its_fields_win(recipe):
    for base in CONFIGS.glob("*.yaml"):
        config = load_config(SweepJob, ["--config", str(base), str(recipe)])
        given = yaml.safe_load(recipe.read_text())
        for section, fields in given.items():
            for name, value in fields.items():
                dumped = getattr(config, section).model_dump(mode="json")[name]
                assert dumped == value or (isinstance(value, dict) and value.items() <= dumped.items())
        assert config.data == load_config(SweepJob, [], base).data
        assert all(a in ARCHITECTURES for a in config.sweep.architectures)


def test_the_position_sae_has_the_parameters_of_the_study_and_its_l1_is_converted():
    config = load_config(SweepJob, [], CONFIGS / "recipes/position_sae.yaml")
    plan = proposals({"s": 2048}, config.sweep.architectures, config.sweep.expansion_factors, {"relu": (5e-4,)}, 1)
    common = Common(config.training.learning_rate, l1_units=config.sweep.l1_units)
    (member,) = members(plan[0], plan[0].coefficient, 2048, [0], common)
    p = initial_parameters(member.config, torch.zeros(2048))
    assert sum(p[name].numel() for name in ARCHITECTURES["relu"].trained) == 8_392_704
    assert member.config.l1_coefficient == pytest.approx(5e-4 * 2048**0.5)


def test_nulls_are_kinds_in_one_order_and_all_is_every_kind():
    def nulls(given):
        return load_config(SweepJob, ["--evaluation.nulls", given]).evaluation.nulls

    assert load_config(SweepJob, []).evaluation.nulls == ("untrained", "random_encoder")
    assert nulls("all") == nulls("pca,all") == NULLS
    assert nulls("[pca,untrained,pca]") == ("untrained", "pca")
    for given, words in (("pcb", "evaluation.nulls.0: 'pcb' is not allowed"), ("[]", "evaluation.nulls")):
        with pytest.raises(UserError, match=words):
            nulls(given)


def test_probes_in_the_sweep_have_the_fields_of_the_job_and_are_off():
    here, there = SweepJob.model_fields["probes"].annotation.model_fields, ProbeJob.model_fields
    assert set(here) == set(there) - {"run", "sae", "untrained", "seed"}
    assert all(here[name].default == there[name].default for name in here if name != "labels")
    assert SweepJob().probes.labels == () and len(load_config(ProbeJob, ["r"]).labels) == 5
    assert load_config(SweepJob, ["--probes.labels", "step,answer"]).probes.labels == ("step", "answer")
    with pytest.raises(UserError, match=r"probes.labels.0: 'colour' is not allowed; input should be 'step'"):
        load_config(SweepJob, ["--probes.labels", "colour"])
