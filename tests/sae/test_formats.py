"""SAEs on disk in our own format: folding, the round trip, SAELens measuring the same, and what is refused."""

import json
import math

import pytest
import torch
from format_examples import CONFIGS, METADATA, SCALE, D, F, X, folded, parameters_of
from outside import foreign
from safetensors.torch import load_file, save_file

from raysae.errors import UserError
from raysae.sae import formats
from raysae.sae.architectures import ARCHITECTURES, SAEConfig
from raysae.sae.formats import saelens
from raysae.sae.metrics import RowSums
from raysae.sae.sae import SAE, fold


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def sae(config):
    return folded(config.architecture)


@pytest.mark.parametrize("scale", [SCALE, 1.0, 31.0])
def test_a_folded_sae_does_on_raw_rows_what_the_unfolded_does_on_scaled_ones(config, scale):
    unfolded = SAE(config, parameters_of(config))
    folded = SAE(config, fold(unfolded.parameters, scale))
    f, f_raw = unfolded.encode(scale * X), folded.encode(X)
    size = float(scale * X.norm(dim=1).mean())
    torch.testing.assert_close(f_raw, f, atol=1e-5 * max(size, 1), rtol=1e-5)
    assert torch.equal((f_raw != 0).sum(1), (f != 0).sum(1)) and (f != 0).any()
    torch.testing.assert_close(folded(X), unfolded(scale * X) / scale, atol=1e-5 * size / scale, rtol=1e-5)


def test_folding_leaves_the_trained_parameters_alone(config):
    p = parameters_of(config)
    before = {name: tensor.clone() for name, tensor in p.items()}
    for tensor in fold(p, 1.0).values():
        tensor.add_(1)
    assert all(torch.equal(p[name], before[name]) for name in p)


def test_an_sae_is_read_back_as_it_was_written(sae, tmp_path):
    formats.save(sae, tmp_path / "sae", {"training": {"steps": 3}})
    again = formats.load(tmp_path / "sae")
    assert again.config == sae.config
    for name in (*ARCHITECTURES[sae.config.architecture].trained, *({"threshold"} & sae.parameters.keys())):
        tolerance = 1e-6 if name == "log_threshold" else 0.0  # the file holds the threshold itself
        torch.testing.assert_close(again.parameters[name], sae.parameters[name], atol=tolerance, rtol=tolerance)
    assert torch.equal(again.encode(X) != 0, sae.encode(X) != 0)
    assert METADATA.items() <= again.metadata.items()
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert cfg["raysae"]["training"] == {"steps": 3} and cfg["normalize_activations"] == "none"
    assert [p.name for p in tmp_path.iterdir()] == ["sae"], "a temporary directory was left"


def test_saving_again_replaces_the_whole_directory(sae, tmp_path):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae/old.txt").write_text("stale")
    formats.save(sae, tmp_path / "sae")
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    formats.save(folded("relu"), tmp_path / "sae")
    monkeypatch.setattr(saelens, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        formats.save(folded("topk"), tmp_path / "sae")
    assert formats.load(tmp_path / "sae").config.architecture == "relu"
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_low_precision_rows_come_back_in_their_dtype(sae):
    x_hat = sae(X.bfloat16())
    assert x_hat.dtype == torch.bfloat16
    assert torch.equal(x_hat, sae(X.bfloat16().float()).bfloat16())


# ----------------------------------------------------------------------------------------------------------------------
# SAELens reads what we write (latents and reconstructions: test_formats_foreign.py)


@pytest.fixture
def theirs(sae, tmp_path):
    formats.save(sae, tmp_path / "sae")
    return foreign("sae_lens").SAE.load_from_disk(tmp_path / "sae")


def test_saelens_keeps_the_metadata(sae, theirs):
    assert theirs.cfg.metadata.hook_name == METADATA["hook_name"]
    assert theirs.cfg.metadata.model_name == "toy" and theirs.cfg.metadata.context_size == 16
    assert (theirs.cfg.d_in, theirs.cfg.d_sae) == (D, F)
    assert getattr(theirs.cfg, "k", None) == (
        sae.config.k if theirs.cfg.architecture() in ("topk", "abstopk") else None
    )


def test_saelens_measures_the_same_explained_variance_and_l0(sae, theirs):
    from sae_lens.evals import ExplainedVarianceCalculator

    calculator, l0, sums = ExplainedVarianceCalculator(), 0, RowSums(X.mean(0))
    with torch.no_grad():
        for x in X.split(90):
            f = theirs.encode(x)
            calculator.add_batch(theirs.decode(f), x)
            l0 += int((f != 0).sum())
            sums.add(x, sae(x), sae.encode(x))
    found = sums.metrics()
    assert found["explained_variance"] == pytest.approx(calculator.compute(), abs=5e-4)
    assert found["l0"] == pytest.approx(l0 / len(X), abs=5e-4)


def test_saelens_keeps_the_metadata_of_an_sae_that_came_from_before_its_version_6(tmp_path):
    """An old `sae_lens_version` carried along would make it drop all metadata without a word."""
    old = SAE(CONFIGS["relu"], folded("relu").parameters, {**METADATA, "sae_lens_version": "5.1.0"})
    formats.save(old, tmp_path / "sae")
    assert foreign("sae_lens").SAE.load_from_disk(tmp_path / "sae").cfg.metadata.hook_name == METADATA["hook_name"]


# ----------------------------------------------------------------------------------------------------------------------
# What a foreign file leaves unsaid


def written(tmp_path, kind="topk", **changes):
    """A directory whose cfg.json has `changes`; None removes a key."""
    formats.save(folded(kind), tmp_path / "sae")
    file = tmp_path / "sae/cfg.json"
    cfg = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    return tmp_path / "sae"


@pytest.mark.parametrize(
    "kind,read_as,unknown",
    [
        ("relu", "relu", "l1_coefficient"),
        ("p_anneal", "relu", "l1_coefficient"),
        ("topk", "topk", None),
        ("abstopk", "abstopk", None),
        ("batchtopk", "jumprelu", "target_l0"),
        ("jumprelu_tanh", "jumprelu", "target_l0"),
        ("gated", "gated", "l1_coefficient"),
    ],
)
def test_a_file_without_our_block_is_read_by_its_function(kind, read_as, unknown, tmp_path):
    sae = formats.load(written(tmp_path, kind, raysae=None))
    assert sae.config.architecture == read_as and sae.config.seed == 0
    assert unknown is None or math.isnan(getattr(sae.config, unknown))
    torch.testing.assert_close(sae.encode(X), folded(kind).encode(X), atol=1e-5, rtol=1e-5)


def test_an_unknown_coefficient_is_null_on_disk_and_unknown_again(tmp_path):
    sae = formats.load(written(tmp_path, "relu", raysae=None))
    sae.metadata["l0"] = float("nan")
    formats.save(sae, tmp_path / "again")
    text = (tmp_path / "again/cfg.json").read_text()
    assert "NaN" not in text and json.loads(text)["raysae"]["config"]["l1_coefficient"] is None
    assert formats.load(tmp_path / "again").config == sae.config


def test_our_block_is_not_believed_where_saelens_name_differs(tmp_path):
    block = {"config": CONFIGS["abstopk"].__dict__}
    assert formats.load(written(tmp_path, "topk", raysae=block)).config.architecture == "topk"


@pytest.mark.parametrize("block", [7, {}, {"config": 7}, {"config": {"architecture": "unheard of"}}])
def test_an_odd_block_is_ignored(block, tmp_path):
    assert formats.load(written(tmp_path, "topk", raysae=block)).config.architecture == "topk"


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, in one line


@pytest.mark.parametrize(
    "kind,changes,said",
    [
        ("topk", {"k": None}, "topk SAE whose config has no k"),
        ("topk", {"k": "4"}, "topk SAE whose config has no k"),
        ("topk", {"k": F + 1}, "k: 33 must lie in 1..d_sae=32"),
        ("abstopk", {"k": None}, "abstopk SAE whose config has no k"),
        ("topk", {"architecture": "jumprelu"}, "its config needs"),
        ("topk", {"architecture": "transcoder"}, "architecture 'transcoder'; known: standard, topk"),
        ("topk", {"architecture": None}, "architecture None"),
        ("batchtopk", {"architecture": "standard"}, "its config needs"),
        ("topk", {"normalize_activations": "expected_average_only_in"}, "unfolded normalisation"),
        ("gated", {"normalize_activations": "layer_norm"}, "unfolded normalisation"),
        ("jumprelu", {"apply_b_dec_to_input": False}, "no b_dec on its input"),
        ("topk", {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
        ("relu", {"activation_fn_str": "topk"}, "activation_fn 'topk' beside architecture 'standard'"),
        ("relu", {"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
        ("topk", {"d_sae": F + 1}, "W_enc"),
        ("topk", {"d_in": None}, "d_in: cfg.json of"),
    ],
)
def test_a_config_that_says_another_function_is_refused(tmp_path, kind, changes, said):
    with pytest.raises(UserError) as caught:
        formats.load(written(tmp_path, kind, **changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_batchtopk_file_whose_thresholds_differ_is_refused(tmp_path):
    directory = written(tmp_path, "batchtopk")
    tensors = load_file(directory / "sae_weights.safetensors")
    tensors["threshold"][3] += 1
    save_file(tensors, directory / "sae_weights.safetensors")
    with pytest.raises(UserError, match="a threshold per latent, so it is not the batchtopk"):
        formats.load(directory)


@pytest.mark.parametrize("text", ["{", "[]", '"cfg"'])
def test_a_config_that_is_no_mapping_is_refused(text, tmp_path):
    directory = written(tmp_path)
    (directory / "cfg.json").write_text(text)
    with pytest.raises(UserError, match=r"cfg\.json"):
        formats.load(directory)


def test_missing_or_odd_tensors_are_refused(tmp_path):
    directory = written(tmp_path, "relu")
    tensors = load_file(directory / "sae_weights.safetensors")
    for other in ({k: v for k, v in tensors.items() if k != "b_enc"}, {**tensors, "threshold": torch.zeros(F)}):
        save_file(other, directory / "sae_weights.safetensors")
        with pytest.raises(UserError, match=r"b_enc|threshold"):
            formats.load(directory)


def test_a_scaling_factor_of_ones_is_dropped_and_any_other_refused(tmp_path):
    directory = written(tmp_path, "relu")
    tensors = load_file(directory / "sae_weights.safetensors")
    save_file({**tensors, "scaling_factor": torch.ones(F)}, directory / "sae_weights.safetensors")
    assert torch.equal(formats.load(directory)(X), folded("relu")(X))
    save_file({**tensors, "scaling_factor": torch.full((F,), 2.0)}, directory / "sae_weights.safetensors")
    with pytest.raises(UserError, match="scaling_factor"):
        formats.load(directory)


def test_an_sae_in_low_precision_is_read_as_float32(tmp_path):
    directory = written(tmp_path, "relu")
    tensors = load_file(directory / "sae_weights.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, directory / "sae_weights.safetensors")
    assert formats.load(directory)(X).dtype == torch.float32


@pytest.mark.parametrize("name", ["sae.pt", "sae_weights.pth", "weights.bin", "sae.pkl", "epoch.ckpt"])
def test_a_pickle_is_named_and_not_loaded(tmp_path, name):
    torch.save({"W_enc": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(UserError) as caught:
        formats.load(tmp_path)
    assert name in str(caught.value) and "pickle" in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_under_a_safetensors_name_is_not_loaded(tmp_path):
    directory = written(tmp_path)
    torch.save({"W_enc": torch.zeros(1)}, directory / "sae_weights.safetensors")
    with pytest.raises(UserError, match="not a safetensors file; pickles are never loaded"):
        formats.load(directory)


def test_a_directory_without_a_config_or_anything_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"sae_weights\.safetensors"):
        formats.load(tmp_path)
    directory = written(tmp_path)
    (directory / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"cfg\.json"):
        formats.load(directory)


def test_a_config_with_two_coefficients_keeps_both(tmp_path):
    config = SAEConfig("jumprelu_tanh", D, F, l0_coefficient=0.01, target_l0=3.0)
    formats.save(SAE(config, parameters_of(config)), tmp_path / "sae")
    assert formats.load(tmp_path / "sae").config == config
