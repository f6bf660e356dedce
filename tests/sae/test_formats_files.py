"""One-file checkpoints (openai's and the origin studies'), never unpickled, and the command line."""

import os
import pathlib
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from format_examples import METADATA, D, F, X, assert_same, folded, unfolded
from safetensors.torch import save_file
from torch import nn

from raysae.errors import UserError
from raysae.sae import formats
from raysae.sae.formats.__main__ import main
from raysae.sae.formats.state_dict import ASSUMED


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def origin():
    """(state dict of two nn.Linear as the studies saved it, their forward up to the nonlinearity)."""
    encoder, decoder = nn.Linear(D, F), nn.Linear(F, D)
    for i, tensor in enumerate((encoder.weight, encoder.bias, decoder.weight, decoder.bias)):
        tensor.data = 0.3 * random(*tensor.shape, seed=i)
    state = OrderedDict(
        [(f"encoder.{k}", v.data) for k, v in encoder.named_parameters()]
        + [(f"decoder.{k}", v.data) for k, v in decoder.named_parameters()]
    )
    with torch.no_grad():
        return state, encoder(X), decoder


def topk(pre, k):
    found = pre.topk(k)
    return torch.zeros_like(pre).scatter(1, found.indices, found.values.relu())


def saved(tmp_path, content, name="pos_3_best.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict", "model_state"])
@pytest.mark.parametrize("activation", ["relu", "topk:5"])
def test_an_origin_state_dict_computes_the_same_once_its_nonlinearity_is_stated(wrapper, activation, tmp_path):
    state, pre, decoder = origin()
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer_state_dict": {"step": 1}}
    sae = formats.read(saved(tmp_path, content), activation=activation)
    f = pre.relu() if activation == "relu" else topk(pre, 5)
    with torch.no_grad():
        assert_same(sae.encode(X), sae(X), f, decoder(f))
    assert (sae.config.architecture, sae.config.k) == (("relu", None) if activation == "relu" else ("topk", 5))


def test_an_origin_state_dict_whose_shapes_do_not_fit_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"decoder.bias of shape \[9\] at 8 inputs, 32 latents"):
        formats.read(saved(tmp_path, origin()[0] | {"decoder.bias": torch.zeros(9)}), activation="relu")


def test_an_origin_state_dict_in_safetensors_is_read_too(tmp_path):
    state, pre, _ = origin()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "sae.st.safetensors")
    sae = formats.read(tmp_path / "sae.st.safetensors", activation="relu")
    torch.testing.assert_close(sae.encode(X), pre.relu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config,k",
    [
        ({"use_relu": True}, None),
        ({"use_relu": True, "use_topk": False, "topk_k": 0}, None),
        ({"use_relu": False, "use_topk": True, "topk_k": 5}, 5),
        ({"use_relu": False, "use_topk": True, "topk_k": 0}, 9),  # 30 % of 32
    ],
)
def test_an_origin_config_determines_the_nonlinearity(config, k, tmp_path):
    """With a path in the config, as the phased programme's checkpoints have: data, though it is a class's."""
    state, pre, decoder = origin()
    config |= {"input_dim": D, "checkpoint_dir": pathlib.PosixPath("checkpoints/sae")}
    content = {"model_state_dict": state, "config": config, "summary": {"model_name": "gpt2-medium", "layer_idx": 7}}
    sae = formats.read(saved(tmp_path, content))
    f = pre.relu() if k is None else topk(pre, k)
    with torch.no_grad():
        assert_same(sae.encode(X), sae(X), f, decoder(f))
    assert sae.config.k == k and sae.metadata["model_name"] == "gpt2-medium"


@pytest.mark.parametrize(
    "config,activation,said",
    [
        (None, None, "does not say its nonlinearity"),
        ({"input_dim": D, "n_features": F, "l1_coefficient": 1e-3}, None, "does not say its nonlinearity"),
        ({"use_relu": False}, None, "a linear map is no SAE"),
        ({"use_relu": False, "use_topk": False}, "relu", "a linear map is no SAE"),
        ({"use_topk": True}, None, "use_topk without topk_k"),
        ({"use_relu": True}, "topk:5", "says relu, not topk:5"),
        ({"use_topk": True, "topk_k": 4}, "topk:5", "says topk:4, not topk:5"),
        (None, "topk", "'topk' must be relu or topk:K"),
        (None, "topk:0", "must be relu or topk:K"),
        (None, "gelu", "must be relu or topk:K"),
        (None, "topk:99", "k: 99 must lie in"),
    ],
)
def test_an_origin_file_that_leaves_the_nonlinearity_open_or_has_none_is_refused(config, activation, said, tmp_path):
    content = {"model_state_dict": origin()[0], "config": config} if config else origin()[0]
    with pytest.raises(UserError) as caught:
        formats.read(saved(tmp_path, content), activation=activation)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# openai/sparse_autoencoder


def openai(activation="ReLU", settings=None, **more):
    """A state dict as its Autoencoder.state_dict() gives it, buffers and all."""
    return {
        "pre_bias": random(D, seed=1),
        "latent_bias": 0.3 * random(F, seed=2),
        "encoder.weight": 0.3 * random(F, D, seed=3),
        "decoder.weight": 0.3 * random(D, F, seed=4),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "activation": activation,
        **({} if settings is None else {"activation_state_dict": settings}),
        **more,
    }


@pytest.mark.parametrize(
    "state,user,k",
    [
        (openai(activation_state_dict=OrderedDict()), None, None),
        (openai("TopK", {"k": 5, "postact_fn": "ReLU"}, normalize=False), None, 5),
        (openai(None), "relu", None),
        (openai(None, normalize=False), "topk:5", 5),
    ],
)
def test_an_openai_state_dict_computes_the_same(state, user, k, tmp_path):
    state = {name: value for name, value in state.items() if value is not None}
    sae = formats.read(saved(tmp_path, state, "8.pt"), activation=user)
    pre = (X - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    f = pre.relu() if k is None else topk(pre, k)
    assert_same(sae.encode(X), sae(X), f, f @ state["decoder.weight"].T + state["pre_bias"])
    assert sae.config.k == k


@pytest.mark.parametrize(
    "state,user,said",
    [
        (openai("TopK", {"k": 5, "postact_fn": "ReLU"}), None, "layer-norms each row"),
        (openai("ReLU", normalize=True), None, "layer-norms each row"),
        (openai("TopK", {"k": 5, "postact_fn": "Identity"}, normalize=False), None, "activation 'TopK' with"),
        (openai("TopK", normalize=False), None, "activation 'TopK' with"),
        (openai("Identity"), None, "a linear map is no SAE"),
        (openai("JumpReLU"), None, "activation 'JumpReLU'"),
        (openai(threshold=torch.zeros(F)), None, "a tensor threshold, for which there is no place"),
        (openai("ReLU"), "topk:5", "says relu, not topk:5"),
        ({k: v for k, v in openai().items() if k != "activation"}, None, "does not say its nonlinearity"),
        ({k: v for k, v in openai().items() if k != "decoder.weight"}, None, "no tensor decoder.weight"),
        (openai() | {"encoder.weight": torch.zeros(F)}, None, "not matrices"),
        (openai() | {"decoder.weight": torch.zeros(D, F + 1)}, None, "decoder.weight of shape [8, 33] at 8 inputs, 32"),
        (openai() | {"pre_bias": torch.zeros(D + 1)}, None, "pre_bias of shape [9]"),
    ],
)
def test_an_openai_file_that_says_another_function_is_refused(state, user, said, tmp_path):
    with pytest.raises(UserError) as caught:
        formats.read(saved(tmp_path, state, "8.pt"), activation=user)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing in a file is run


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


class Config:
    """As the studies' first checkpoints pickled theirs."""


@pytest.mark.parametrize("place", ["pos_0_best.pt", "ae.pt"])
def test_code_in_a_pt_file_is_refused_and_not_run(place, tmp_path):
    folder = tmp_path / "sae"
    formats.write(folded("topk"), folder, "dictionary_learning")
    torch.save({**origin()[0], "config": Trap(tmp_path / "sprung")}, folder / place)
    with pytest.raises(UserError) as caught:
        formats.read(folder / place, activation=None if place == "ae.pt" else "relu")
    assert not (tmp_path / "sprung").exists()
    assert "mkdir" in str(caught.value) and "never run" in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickled_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds pickled code \(test_formats_files.Config\), which is never run"):
        formats.read(saved(tmp_path, {"model_state": origin()[0], "config": Config()}))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 torn"])
def test_a_damaged_file_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "sae.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        formats.read(tmp_path / "sae.pt", activation="relu")
    assert "sae.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [torch.zeros(3), {"a": 1}, {"model_state_dict": {"encoder.weight": 3}}])
def test_a_file_without_an_sae_is_refused(content, tmp_path):
    with pytest.raises(UserError, match=r"no tensor|not a dictionary"):
        formats.read(saved(tmp_path, content), activation="relu")


# ----------------------------------------------------------------------------------------------------------------------
# Detection and the command line


@pytest.mark.parametrize("format", formats.WRITABLE)
def test_a_folder_is_known_by_its_files_and_a_file_by_its_folder(format, tmp_path):
    formats.write(folded("topk"), tmp_path / "sae", format)
    weights = next(p for p in (tmp_path / "sae").iterdir() if p.suffix != ".json")
    for path in (tmp_path / "sae", weights, str(weights)):
        sae = formats.read(path)
        assert_same(sae.encode(X), sae(X), *unfolded("topk"))
        assert sae.metadata["hook_name"] == METADATA["hook_name"]
    with pytest.raises(UserError, match="says its own"):
        formats.read(weights, activation="topk:4")


def test_the_command_converts_and_says_so_in_one_line(tmp_path, capsys):
    formats.save(folded("relu"), tmp_path / "a")
    main(["convert", str(tmp_path / "a"), str(tmp_path / "new/b"), "--to", "dictionary_learning"])
    main(["convert", str(tmp_path / "new/b"), str(tmp_path / "c"), "--to", "saelens", "--from", "dictionary_learning"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        f"wrote {tmp_path}/new/b as dictionary_learning: relu, d_in 8, d_sae 32; latents are f times their decoder norm"
    )
    assert second == f"wrote {tmp_path}/c as saelens: relu, d_in 8, d_sae 32"
    torch.testing.assert_close(formats.load(tmp_path / "c")(X), folded("relu")(X), atol=1e-4, rtol=1e-5)
    main(
        [
            "convert",
            str(saved(tmp_path, origin()[0])),
            str(tmp_path / "d"),
            "--to",
            "sparsify",
            "--activation",
            "topk:3",
        ]
    )
    assert (
        capsys.readouterr().out == f"wrote {tmp_path}/d as sparsify: topk, d_in 8, d_sae 32, k 3; assumed: {ASSUMED}\n"
    )


@pytest.mark.parametrize(
    "arguments,said",
    [
        ("convert nowhere b --to saelens", "nowhere is not a file"),
        ("convert a b", "--to"),
        ("convert a b --to openai", "openai"),
        ("convert a b --to saelens --from onnx", "onnx"),
        ("convert a b --to sparsify", "sparsify has no relu, only topk"),
        ("convert a a --to saelens", "a exists already; name a new folder"),
        ("convert a . --to saelens", "exists already"),
        ("convert a b --to saelens --from sparsify", "holds no sae.safetensors"),
        ("convert a b --to saelens --from openai", "a is not a file"),
        ("convert a b --to saelens --activation relu", "says its own"),
        ("", "command"),
    ],
)
def test_the_commands_mistakes_are_one_line_and_leave_nothing(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    formats.save(folded("relu"), tmp_path / "a")
    with pytest.raises(UserError) as caught:
        main(arguments.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_mistake_ends_the_process_with_status_2(tmp_path):
    command = [sys.executable, "-m", "raysae.sae.formats", "convert", "nowhere", str(tmp_path / "b"), "--to", "saelens"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr, done.stdout) == (2, "error: sae: nowhere is not a file\n", "")


def test_no_foreign_library_is_needed():
    code = "import sys; import raysae.sae.formats.__main__\n"
    code += "assert not {'sae_lens', 'dictionary_learning', 'sparsify', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
