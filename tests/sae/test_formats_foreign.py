"""The foreign libraries themselves, both ways: they compute what we wrote, and we compute what they wrote."""

import json

import pytest
import torch
from format_examples import CONFIGS, METADATA, SCALE, D, F, X, assert_same, folded, unfolded
from outside import foreign
from safetensors.torch import load_file, save_file

from raysae.errors import UserError
from raysae.sae import formats
from raysae.sae.architectures import ARCHITECTURES
from raysae.sae.sae import SAE

RELU = [name for name, a in ARCHITECTURES.items() if a.saelens == "standard"]
HELD = {
    "saelens": list(CONFIGS),
    "sparsify": ["topk"],
    "dictionary_learning": [name for name in CONFIGS if name != "abstopk"],
}
PAIRS = [(format, name) for format, names in HELD.items() for name in names]


@torch.no_grad()
def computed_by(format, path, x=X):
    """(f, x̂) of x by the foreign library that owns the format, from its own loader."""
    if format == "saelens":
        sae = foreign("sae_lens").SAE.load_from_disk(path)
        f = sae.encode(x)
        return f, sae.decode(f)
    if format == "sparsify":
        sae = foreign("sparsify").SparseCoder.load_from_disk(path)
        acts, index, _ = sae.encode(x)
        return torch.zeros(len(x), sae.num_latents).scatter_(1, index, acts), sae.decode(acts, index)
    foreign("dictionary_learning")
    dictionary, _ = foreign("dictionary_learning.utils").load_dictionary(str(path), "cpu")
    f = dictionary.encode(x)
    return f, dictionary.decode(f)


# ----------------------------------------------------------------------------------------------------------------------
# They read what we write


@pytest.mark.parametrize("format,architecture", PAIRS)
def test_a_folded_sae_in_a_foreign_loader_does_on_raw_rows_what_the_unfolded_does_on_scaled_ones(
    format, architecture, tmp_path, capsys
):
    formats.write(folded(architecture), tmp_path / "sae", format)
    f, x_hat = computed_by(format, tmp_path / "sae")
    f_wanted, x_hat_wanted = unfolded(architecture)
    if format == "dictionary_learning" and architecture in RELU:  # its loader wants unit decoder rows
        f = f / folded(architecture).parameters["W_dec"].norm(dim=1)
        assert "Normalizing" not in capsys.readouterr().out
    assert_same(f, x_hat, f_wanted, x_hat_wanted)


@pytest.mark.parametrize("format,architecture", PAIRS)
def test_what_we_write_in_a_foreign_format_we_read_back_whole(format, architecture, tmp_path):
    sae = folded(architecture)
    formats.write(sae, tmp_path / "sae", format)
    again = formats.read(tmp_path / "sae")
    assert again.config == sae.config and METADATA.items() <= again.metadata.items()
    f, f_wanted = again.encode(X), sae.encode(X)
    if format == "dictionary_learning" and architecture in RELU:
        f = f / sae.parameters["W_dec"].norm(dim=1)
    assert_same(f, again(X), f_wanted, sae(X))


@pytest.mark.parametrize("format", ["sparsify", "dictionary_learning"])
def test_a_format_refuses_an_architecture_that_it_cannot_hold_and_leaves_nothing(format, tmp_path):
    for name in set(CONFIGS) - set(HELD[format]):
        with pytest.raises(UserError, match=f"{format} has no {name}"):
            formats.write(folded(name), tmp_path / "sae", format)
    assert not any(tmp_path.iterdir())


def test_a_latent_with_a_zero_decoder_row_survives_dictionary_learning(tmp_path):
    sae = folded("relu")
    sae.parameters["W_dec"][3] = 0
    formats.write(sae, tmp_path / "sae", "dictionary_learning")
    f, x_hat = computed_by("dictionary_learning", tmp_path / "sae")
    torch.testing.assert_close(x_hat, sae(X), atol=1e-4, rtol=1e-5)
    assert (f[:, 3] == 0).all()


def test_dictionary_learning_finds_the_fields_that_saebench_and_saelens_read(tmp_path):
    formats.write(folded("batchtopk"), tmp_path / "sae", "dictionary_learning")
    config = json.loads((tmp_path / "sae/config.json").read_text())
    trainer = config["trainer"]
    assert (trainer["dict_class"], trainer["trainer_class"]) == ("BatchTopKSAE", "BatchTopKTrainer")
    assert (trainer["activation_dim"], trainer["dict_size"], trainer["k"]) == (D, F, 4)
    assert (trainer["lm_name"], trainer["layer"], config["buffer"]["ctx_len"]) == ("toy", 3, 16)
    assert trainer["submodule_name"] == "resid_post_layer_3"


def test_saelens_computes_the_same_from_a_dictionary_learning_folder(tmp_path, monkeypatch):
    """Its Hub loader, fed from disk: JumpReLU without b_dec on its input, BatchTopK by threshold, TopK by k."""
    sae_lens, loaders = foreign("sae_lens"), foreign("sae_lens.loading.pretrained_sae_loaders")
    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo_id, filename, **_: str(tmp_path / filename))
    for name in ("topk", "batchtopk", "matryoshka", "jumprelu", "gated"):
        formats.write(folded(name), tmp_path / name, "dictionary_learning")
        cfg, state, _ = loaders.dictionary_learning_sae_huggingface_loader_1("", name)
        cfg = loaders.handle_config_defaulting(cfg)
        theirs = sae_lens.SAE.from_dict(cfg)
        theirs.load_state_dict(state)
        with torch.no_grad():
            f = theirs.encode(X)
            assert_same(f, theirs.decode(f), *unfolded(name))


# ----------------------------------------------------------------------------------------------------------------------
# We read what they write


def scrambled(module):
    """A foreign module with random weights, thresholds above zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            spread = 0.3 * torch.randn_like(tensor) if tensor.ndim == 1 else torch.randn_like(tensor) * D**-0.5
            tensor.copy_(tensor * 0 + (spread.abs() if name == "threshold" else spread))
    return module


SAELENS = {
    "relu": ("StandardSAE", {}),
    "topk": ("TopKSAE", {"k": 4}),
    "abstopk": ("AbsTopKSAE", {"k": 4}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
}


@pytest.mark.parametrize("architecture", SAELENS)
def test_we_compute_what_saelens_wrote(architecture, tmp_path):
    sae_lens = foreign("sae_lens")
    name, settings = SAELENS[architecture]
    made = scrambled(getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=F, **settings)))
    made.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    made.save_model(tmp_path)
    ours = formats.read(tmp_path)
    with torch.no_grad():
        f = made.encode(X)
        assert_same(ours.encode(X), ours(X), f, made.decode(f))
    assert ours.config.architecture == architecture and ours.metadata["hook_name"] == "blocks.1.hook_resid_pre"


@pytest.mark.parametrize("name", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"])
def test_we_compute_what_saelens_makes_of_a_batchtopk_sae(name, tmp_path):
    sae_lens = foreign("sae_lens")
    settings = {"matryoshka_widths": [8, F]} if "Matryoshka" in name else {}
    config = getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=F, k=4, **settings)
    made = scrambled(getattr(sae_lens, name)(config))
    made.topk_threshold.fill_(1.5)
    made.save_inference_model(tmp_path)
    f, x_hat = computed_by("saelens", tmp_path)
    ours = formats.read(tmp_path)
    assert ours.config.architecture == "jumprelu"
    assert_same(ours.encode(X), ours(X), f, x_hat)


def test_a_jumprelu_threshold_below_zero_does_what_zero_does(tmp_path):
    sae_lens = foreign("sae_lens")
    made = scrambled(sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=F)))
    made.threshold.data -= 0.3
    made.save_model(tmp_path)
    ours = formats.read(tmp_path)
    with torch.no_grad():
        f = made.encode(X)
        assert (made.threshold < 0).any() and (made.threshold > 0).any()
        assert_same(ours.encode(X), ours(X), f, made.decode(f))


@pytest.mark.parametrize(
    "settings", [{"num_latents": F}, {"expansion_factor": 4}, {"num_latents": F, "multi_topk": True}]
)
def test_we_compute_what_sparsify_wrote(settings, tmp_path):
    sparsify = foreign("sparsify")
    made = scrambled(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=4, **settings)))
    made.save_to_disk(tmp_path / "layers.6")
    ours = formats.read(tmp_path / "layers.6")
    assert_same(ours.encode(X), ours(X), *computed_by("sparsify", tmp_path / "layers.6"))
    assert ours.config.architecture == "topk" and ours.config.k == 4


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"activation": "groupmax"}, "activation 'groupmax'"),
        ({"transcode": True}, "transcode"),
        ({"skip_connection": True}, "skip_connection"),
    ],
)
def test_what_sparsify_writes_that_is_no_topk_sae_is_refused(settings, said, tmp_path):
    sparsify = foreign("sparsify")
    sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=4, num_latents=F, **settings)).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=said):
        formats.read(tmp_path)


def changed_sparsify(tmp_path, without=(), **changes):
    formats.write(folded("topk"), tmp_path / "sae", "sparsify")
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text()) | changes
    (tmp_path / "sae/cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if k not in without}))
    return tmp_path / "sae"


@pytest.mark.parametrize("signed,read_as", [(False, "topk"), (True, "abstopk")])
def test_a_sparsify_file_from_before_activation_is_topk_signed_or_not(signed, read_as, tmp_path):
    """EleutherAI/sae's sae.py: signed takes topk of |pre| and keeps the sign."""
    sae = formats.read(changed_sparsify(tmp_path, ("activation", "raysae"), signed=signed))
    p = folded("topk").parameters
    pre = (X - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    pre = pre if signed else pre.relu()
    index = pre.abs().topk(4).indices
    f = torch.zeros_like(pre).scatter(1, index, pre.gather(1, index))
    assert sae.config.architecture == read_as
    assert_same(sae.encode(X), sae(X), f, f @ p["W_dec"] + p["b_dec"])


def test_a_tensor_without_a_place_is_refused(tmp_path):
    directory = changed_sparsify(tmp_path)
    tensors = load_file(directory / "sae.safetensors")
    save_file({**tensors, "W_skip": torch.eye(D)}, directory / "sae.safetensors")
    with pytest.raises(UserError, match="a tensor W_skip, for which there is no place"):
        formats.read(directory)


def test_a_sparsify_config_without_k_is_refused(tmp_path):
    with pytest.raises(UserError, match="no k"):
        formats.read(changed_sparsify(tmp_path, ("k",)))


COMMON = {"activation_dim": D, "dict_size": F, "layer": 2, "lm_name": "toy", "submodule_name": "resid_post_layer_2"}
TRAINED = {  # our architecture: their module, trainer and settings
    "relu": ("standard", "StandardTrainer", {}),
    "relu_april": ("standard", "StandardTrainerAprilUpdate", {}),
    "topk": ("top_k", "TopKTrainer", {"k": 4}),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer", {"k": 4, "threshold_start_step": 1}),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer",
                   {"k": 4, "threshold_start_step": 1, "group_fractions": [0.25, 0.75]}),
    "jumprelu": ("jumprelu", "JumpReluTrainer", {"target_l0": 6.0}),
    "gated": ("gdm", "GatedSAETrainer", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, norm factor, dictionary before `scale_biases`) by architecture, as their trainSAE leaves them."""
    foreign("dictionary_learning")
    training = foreign("dictionary_learning.training")
    root, trainers, factors, measure = tmp_path_factory.mktemp("theirs"), [], [], training.get_norm_factor

    def recorded(kind):
        def make(**settings):
            trainers.append(kind(**settings))
            scrambled(trainers[-1].ae)
            return trainers[-1]

        return make

    configs = []
    for module, trainer, settings in TRAINED.values():
        kind = getattr(foreign(f"dictionary_learning.trainers.{module}"), trainer)
        timing = {"steps": 4, "warmup_steps": 1, "lr": 1e-3, "device": "cpu"}
        timing |= {"sparsity_warmup_steps": 1} if "top_k" not in module else {}
        configs.append({"trainer": recorded(kind), **COMMON, **timing, **settings})
    batches = iter([X[torch.randperm(len(X), generator=torch.Generator().manual_seed(i))][:64] for i in range(200)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "get_norm_factor", lambda *a, **k: factors.append(measure(*a, **k)) or factors[0])
        training.trainSAE(batches, configs, 4, save_dir=str(root), normalize_activations=True, device="cpu")
    assert "norm_factor" not in (root / "trainer_0/config.json").read_text() + str(trainers[0].config)
    return {name: (root / f"trainer_{i}", factors[0], trainers[i].ae) for i, name in enumerate(TRAINED)}


@pytest.mark.parametrize("name", TRAINED)
def test_we_compute_what_dictionary_learning_trained(name, trained):
    folder, _, _ = trained[name]
    ours = formats.read(folder)
    assert_same(ours.encode(X), ours(X), *computed_by("dictionary_learning", folder))
    assert ours.config.architecture == name.removesuffix("_april")
    assert ours.config.k == TRAINED[name][2].get("k") and ours.config.target_l0 == TRAINED[name][2].get("target_l0")
    assert ours.metadata.items() >= {"model_name": "toy", "hook_name": "blocks.2.hook_resid_post"}.items()


@pytest.mark.parametrize("name", TRAINED)
def test_dictionary_learning_saves_weights_that_read_raw_rows(name, trained):
    """`scale_biases` undone is the SAE of normalised rows: so ours ignores norm_factor."""
    folder, factor, dictionary = trained[name]
    ours = formats.read(folder)
    dictionary.scale_biases(1 / factor)
    with torch.no_grad():
        x_hat = dictionary(X / factor) * factor
    dictionary.scale_biases(factor)
    assert factor > 10
    torch.testing.assert_close(ours(X), x_hat, atol=1e-3, rtol=1e-4)


def test_matryoshka_groups_go_there_and_back(trained, tmp_path):
    ours = formats.read(trained["matryoshka"][0])
    assert ours.metadata["group_sizes"] == [8, 24]
    formats.write(ours, tmp_path / "sae", "dictionary_learning")
    assert torch.load(tmp_path / "sae/ae.pt")["group_sizes"].tolist() == [8, 24]


def test_we_compute_what_an_autoencoder_with_a_decoder_bias_computes(tmp_path):
    dictionary = foreign("dictionary_learning.dictionary")
    made = scrambled(dictionary.AutoEncoderNew(D, F))
    torch.save(made.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderNew"}}))
    ours = formats.read(tmp_path)
    assert_same(ours.encode(X), ours(X), *computed_by("dictionary_learning", tmp_path))


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"dict_class": None}, "dict_class None; known: AutoEncoder"),
        ({"dict_class": "IdentityDict"}, "dict_class 'IdentityDict'"),
        ({"dict_class": "GatedAutoEncoder"}, "no tensor decoder_bias"),
        ({"k": 5}, "k 5 in its config.json and 4"),
    ],
)
def test_a_dictionary_learning_config_that_says_another_function_is_refused(changes, said, tmp_path):
    formats.write(folded("topk"), tmp_path / "sae", "dictionary_learning")
    config = json.loads((tmp_path / "sae/config.json").read_text())
    config["trainer"] |= changes
    (tmp_path / "sae/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        formats.read(tmp_path / "sae")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_raysae_block_is_not_believed_against_the_file(tmp_path):
    """A BatchTopK folder whose block was copied from a TopK SAE: the class decides."""
    formats.write(folded("batchtopk"), tmp_path / "sae", "dictionary_learning")
    config = json.loads((tmp_path / "sae/config.json").read_text())
    config["raysae"]["config"] |= {"architecture": "topk", "seed": 99}
    (tmp_path / "sae/config.json").write_text(json.dumps(config))
    ours = formats.read(tmp_path / "sae")
    assert ours.config.architecture == "batchtopk" and ours.config.seed == 0
    assert_same(ours.encode(X), ours(X), *unfolded("batchtopk"))


def test_one_foreign_file_goes_through_every_format_unchanged(tmp_path):
    """SAELens -> dictionary_learning -> sparsify -> SAELens, computed by their own loaders at each stop."""
    sae = folded("topk")
    formats.save(sae, tmp_path / "0")
    for i, format in enumerate(("dictionary_learning", "sparsify", "saelens")):
        formats.write(formats.read(tmp_path / str(i)), tmp_path / str(i + 1), format)
        assert_same(*computed_by(format, tmp_path / str(i + 1)), *unfolded("topk"))
    assert isinstance(formats.load(tmp_path / "3"), SAE) and SCALE < 1
