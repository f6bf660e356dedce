"""SAEs on disk: folding, our own round trip, SAELens reading ours, and what is refused."""

import json

import pytest
import torch
from helpers import sparse_rows
from safetensors.torch import load_file, save_file

from raysae.errors import UserError
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig, initial_parameters
from raysae.sae.metrics import RowSums
from raysae.sae.sae import SAE, fold

D, F = 8, 32
X = sparse_rows(500, D, seed=4) * 5 + 2
METADATA = {"model_name": "toy", "hook_name": "blocks.3.hook_resid_post", "context_size": 16, "prepend_bos": True}
CONFIGS = {
    "relu": SAEConfig("relu", D, F, l1_coefficient=0.25, seed=5),
    "topk": SAEConfig("topk", D, F, k=4, seed=6),
    "batchtopk": SAEConfig("batchtopk", D, F, k=4, seed=7),
}


def parameters_of(config):
    """Parameters away from the start, on inputs of mean squared norm 1."""
    generator = torch.Generator().manual_seed(8)
    p = initial_parameters(config, torch.randn(D, generator=generator) * 0.2)
    p["W_dec"] = p["W_dec"] * (0.5 + torch.rand(F, 1, generator=generator))
    p["b_enc"] = 0.1 * torch.randn(F, generator=generator)
    if "threshold" in p:
        p["threshold"] = torch.tensor(0.2)
    return p


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def sae(config):
    return SAE(config, fold(parameters_of(config), 0.07), METADATA)


@pytest.mark.parametrize("scale", [0.07, 1.0, 31.0])
def test_a_folded_sae_does_on_raw_rows_what_the_unfolded_does_on_scaled_ones(config, scale):
    unfolded = SAE(config, parameters_of(config))
    folded = SAE(config, fold(unfolded.parameters, scale))
    f, f_raw = unfolded.encode(scale * X), folded.encode(X)
    torch.testing.assert_close(f_raw, f, atol=1e-4, rtol=1e-4)
    assert ((f_raw > 0) != (f > 0)).double().mean() < 1e-4 and (f > 0).any()
    torch.testing.assert_close(folded(X), unfolded(scale * X) / scale, atol=1e-4 / scale, rtol=1e-4)


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
    assert all(torch.equal(again.parameters[name], tensor) for name, tensor in sae.parameters.items())
    assert METADATA.items() <= again.metadata.items()
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert cfg["raysae"]["training"] == {"steps": 3} and cfg["normalize_activations"] == "none"
    assert [p.name for p in tmp_path.iterdir()] == ["sae"], "a temporary directory was left"


def test_saving_again_replaces_the_whole_directory(sae, tmp_path):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae/old.txt").write_text("stale")
    formats.save(sae, tmp_path / "sae")
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_low_precision_rows_come_back_in_their_dtype(sae):
    x_hat = sae(X.bfloat16())
    assert x_hat.dtype == torch.bfloat16
    assert torch.equal(x_hat, sae(X.bfloat16().float()).bfloat16())


# ----------------------------------------------------------------------------------------------------------------------
# SAELens reads what we write


@pytest.fixture
def theirs(sae, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    formats.save(sae, tmp_path / "sae")
    return sae_lens.SAE.load_from_disk(tmp_path / "sae")


def test_saelens_computes_the_same_latents_and_reconstruction(sae, theirs):
    with torch.no_grad():
        f = theirs.encode(X)
        assert (f - sae.encode(X)).abs().max() < 1e-5
        assert (theirs.decode(f) - sae(X)).abs().max() < 1e-4  # of rows of norm 40: 1e-5 relative, and better
        torch.testing.assert_close(theirs(X), sae(X), atol=1e-5, rtol=1e-5)
    assert torch.equal((f > 0).sum(1), (sae.encode(X) > 0).sum(1))


def test_saelens_keeps_the_metadata(sae, theirs):
    assert theirs.cfg.metadata.hook_name == METADATA["hook_name"]
    assert theirs.cfg.metadata.model_name == "toy" and theirs.cfg.metadata.context_size == 16
    assert (theirs.cfg.d_in, theirs.cfg.d_sae) == (D, F)
    assert getattr(theirs.cfg, "k", None) == (sae.config.k if theirs.cfg.architecture() == "topk" else None)


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


@pytest.mark.parametrize("architecture", CONFIGS)
def test_we_read_what_saelens_writes(architecture, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    if architecture == "relu":
        made = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=D, d_sae=F))
    else:
        made = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=4))
    made.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    made.save_model(tmp_path)
    ours = formats.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(X), made(X), atol=1e-4, rtol=1e-4)
    assert ours.metadata["hook_name"] == "blocks.1.hook_resid_pre"


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, in one line


def written(tmp_path, kind="topk", **changes):
    """A directory whose cfg.json has `changes`; None removes a key."""
    formats.save(SAE(CONFIGS[kind], parameters_of(CONFIGS[kind]), METADATA), tmp_path / "sae")
    file = tmp_path / "sae/cfg.json"
    cfg = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))
    return tmp_path / "sae"


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"k": None}, "topk SAE whose cfg.json has no k"),
        ({"architecture": "jumprelu"}, "architecture 'jumprelu'; known: standard, topk"),
        ({"architecture": None}, "architecture None"),
        ({"normalize_activations": "expected_average_only_in"}, "unfolded normalisation"),
        ({"apply_b_dec_to_input": False}, "no b_dec on its input"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
        ({"d_sae": F + 1}, "W_enc"),
    ],
)
def test_a_config_that_says_another_function_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError) as caught:
        formats.load(written(tmp_path, **changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_missing_or_odd_tensors_are_refused(tmp_path):
    directory = written(tmp_path, "relu")
    tensors = load_file(directory / "sae_weights.safetensors")
    for other in ({k: v for k, v in tensors.items() if k != "b_enc"}, {**tensors, "threshold": torch.zeros(F)}):
        save_file(other, directory / "sae_weights.safetensors")
        with pytest.raises(UserError, match=r"b_enc|threshold"):
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
