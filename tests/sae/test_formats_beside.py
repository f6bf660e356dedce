"""What stands beside a state dict, and state dicts of other layouts: refused or folded, never dropped."""

import json

import pytest
import torch
from format_examples import D, F, X, assert_same, folded
from test_formats_files import openai, origin, saved, topk
from torch import nn

from raysae.errors import UserError
from raysae.sae import formats
from raysae.sae.formats.__main__ import main
from raysae.sae.formats.state_dict import ASSUMED

MEAN, STD = X.mean(0), X.std(0)


def authors(x, k, subtract=False):
    """(file content, f, x̂) of a TopK SAE on z-scored rows by its authors' own code."""
    state, _, decoder = origin()
    encoder = nn.functional.linear
    z = (x - MEAN) / STD
    with torch.no_grad():
        shifted = z - state["decoder.bias"] if subtract else z
        f = topk(encoder(shifted, state["encoder.weight"], state["encoder.bias"]), k)
        return {"state_dict": state, "config": {"d_in": D, "d_sae": F, "k": k}}, f, decoder(f) * STD + MEAN


def refusal(path, **stated):
    with pytest.raises(UserError) as caught:
        formats.read(path, **stated)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("subtract", [False, True])
def test_the_normalisation_that_the_user_names_is_folded(subtract, tmp_path):
    content, f, x_hat = authors(X, 5, subtract)
    path = saved(tmp_path, {**content, "act_mean": MEAN, "act_std": STD})
    sae = formats.read(path, apply_b_dec_to_input=subtract, mean="act_mean", std="act_std")
    assert_same(sae.encode(X), sae(X), f, x_hat)
    path = saved(tmp_path, {**content, "act_mean": MEAN, "inverse": 1 / STD})
    again = formats.read(path, apply_b_dec_to_input=subtract, mean="act_mean", scale="inverse")
    torch.testing.assert_close(again(X), sae(X), atol=1e-3, rtol=1e-4)


def test_a_normalisation_in_the_state_dict_or_by_one_number_is_folded_too(tmp_path):
    content, _, _ = authors(X, 5)
    inside = {**content["state_dict"], "mean": MEAN}
    for file in (inside, {"model_state": inside}):
        sae = formats.read(saved(tmp_path, {**file, "norm_factor": 4.0}), None, "relu", mean="mean", std="norm_factor")
        plain = formats.read(saved(tmp_path, content["state_dict"]), activation="relu")
        torch.testing.assert_close(sae(X), plain((X - MEAN) / 4) * 4 + MEAN, atol=1e-3, rtol=1e-4)
    state = {**openai(), "mean": MEAN}
    sae, plain = formats.read(saved(tmp_path, state), mean="mean"), formats.read(saved(tmp_path, openai()))
    torch.testing.assert_close(sae(X), plain(X - MEAN) + MEAN, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "beside,names",
    [
        ({"mean": MEAN}, "mean"),
        ({"act_mean": MEAN, "act_std": STD}, "act_mean, act_std"),
        ({"anything": torch.zeros(3)}, "anything"),
        ({"norm_factor": 27.1}, "norm_factor"),
        ({"normalization": {"mean": MEAN}}, "normalization"),
        ({"config": {"k": 5, "normalize_activations": "expected_average_only_in"}}, "normalize_activations"),
        ({"config": {"k": 5, "centerInput": True}}, "centerInput"),
    ],
)
def test_what_has_no_place_beside_the_weights_is_refused(beside, names, tmp_path):
    content, _, _ = authors(X, 5)
    line = refusal(saved(tmp_path, {**content, **beside}), activation="topk:5")
    assert f"has {names} beside its weights" in line and "--mean KEY" in line


@pytest.mark.parametrize(
    "beside",
    [
        {"epoch": 3, "optimizer_state_dict": {"mean": torch.zeros(3)}, "loss_mean": 0.3, "best_val_mean": 1.5},
        {
            "config": {
                "k": 5,
                "normalize_decoder": True,
                "max_grad_norm": 1.0,
                "normalize_activations": "none",
                "lr": 1e-3,
            }
        },
        {"config": {"k": 5, "layer_norm": False, "scale": 1.0, "whiten": None}},
    ],
)
def test_what_does_nothing_to_x_may_stand_there(beside, tmp_path):
    content, _, _ = authors(X, 5)
    assert formats.read(saved(tmp_path, {**content, **beside})).config.k == 5


@pytest.mark.parametrize(
    "stated,said",
    [
        ({"mean": "average"}, "mean: "),
        ({"mean": "config"}, "no 'config' of numbers"),
        ({"mean": "short"}, "short of "),
        ({"std": "zero"}, "not above zero"),
        ({"std": "steps"}, "holds it as int64"),
    ],
)
def test_a_normalisation_that_is_none_is_refused(stated, said, tmp_path):
    content, _, _ = authors(X, 5)
    more = {"short": torch.ones(3), "zero": torch.zeros(D), "steps": torch.ones(D, dtype=torch.int64)}
    key = next(iter(stated.values()))
    path = saved(tmp_path, {**content, **({key: more[key]} if key in more else {})})
    assert said in refusal(path, **stated)


# ----------------------------------------------------------------------------------------------------------------------
# k, σ and b_dec as the file states them


@pytest.mark.parametrize(
    "config,beside,k",
    [
        ({"k": 5}, {}, 5),
        ({"top_k": 5}, {}, 5),
        ({}, {"k": 5}, 5),
        ({}, {"k": torch.tensor(5)}, 5),
        ({"activation": "TopK", "k": 5}, {}, 5),
        ({"activation_fn": "ReLU()"}, {}, None),
        ({"use_relu": True, "use_topk": False, "topk_k": 30, "k": 30}, {}, None),
    ],
)
def test_the_nonlinearity_is_read_as_stated(config, beside, k, tmp_path):
    sae = formats.read(saved(tmp_path, {"state_dict": origin()[0], "config": config, **beside}))
    assert sae.config.k == k and sae.config.architecture == ("relu" if k is None else "topk")


@pytest.mark.parametrize(
    "config,activation,said",
    [
        ({"k": 2}, "topk:5", "says topk:2, not topk:5"),
        ({"top_k": 2}, "relu", "says topk:2, not relu"),
        ({"k": 2, "top_k": 3}, None, "says topk:2 and topk:3; state which"),
        ({"k": 2, "activation": "relu"}, None, "says topk:2 and relu; state which"),
        ({"use_relu": True, "k": 2}, None, "says relu and topk:2; state which"),
        ({"k": "2"}, None, "k: "),
        ({"k": True}, None, "k: "),
        ({"k": [2]}, "topk:2", "k: "),
        ({"activation": "topk"}, "relu", "without k"),
        ({"activation": "jumprelu"}, "relu", "known: relu, and topk with k"),
        ({"activation": "identity"}, "relu", "a linear map is no SAE"),
    ],
)
def test_a_contradiction_is_refused(config, activation, said, tmp_path):
    assert said in refusal(saved(tmp_path, {"state_dict": origin()[0], "config": config}), activation=activation)


def test_which_of_two_is_the_users_to_say(tmp_path):
    path = saved(tmp_path, {"state_dict": origin()[0], "config": {"k": 2, "activation": "relu"}})
    assert formats.read(path, activation="topk:2").config.k == 2


def test_whether_the_encoder_subtracts_b_dec_is_stated_or_said(tmp_path, capsys):
    content, f, _ = authors(X, 5, subtract=True)
    state, config = content["state_dict"], content["config"]
    by_file = formats.read(saved(tmp_path, {"state_dict": state, "config": {**config, "apply_b_dec_to_input": True}}))
    by_user = formats.read(saved(tmp_path, content), apply_b_dec_to_input=True)
    torch.testing.assert_close(by_file.encode((X - MEAN) / STD), f, atol=1e-5, rtol=1e-5)
    assert torch.equal(by_user(X), by_file(X)) and not formats.remarks(by_file) and not formats.remarks(by_user)

    path, arguments = saved(tmp_path, content), ["convert", str(tmp_path / "pos_3_best.pt"), "--to", "saelens"]
    main([*arguments, str(tmp_path / "a")])
    main([*arguments, str(tmp_path / "b"), "--apply_b_dec_to_input", "false"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"; assumed: {ASSUMED}") and "assumed" not in second
    assert json.loads((tmp_path / "a/cfg.json").read_text())["metadata"]["raysae_assumed"] == ASSUMED
    assert torch.equal(formats.read(path)(X), formats.load(tmp_path / "b")(X))

    path = saved(tmp_path, {"state_dict": state, "config": {**config, "apply_b_dec_to_input": True}})
    assert "apply_b_dec_to_input: " in refusal(path, apply_b_dec_to_input=False)
    assert "subtracts pre_bias" in refusal(saved(tmp_path, openai()), apply_b_dec_to_input=False)


# ----------------------------------------------------------------------------------------------------------------------
# Other layouts


def of(architecture, tmp_path, **more):
    """dictionary_learning's state dict in one file of another name."""
    formats.write(folded(architecture), tmp_path / architecture, "dictionary_learning")
    return saved(tmp_path, {**torch.load(tmp_path / architecture / "ae.pt"), **more})


@pytest.mark.parametrize(
    "architecture,said",
    [
        ("relu", "dictionary_learning's AutoEncoder, whose encoder reads x - bias; save its state dict as ae.pt"),
        ("topk", '"dict_class": "AutoEncoderTopK"'),
        ("batchtopk", "AutoEncoderTopK or BatchTopKSAE, whose encoder reads x - b_dec"),
        ("gated", "GatedAutoEncoder, whose encoder reads x - decoder_bias"),
        ("matryoshka", "SAELens' tensor names, which leave the rule open"),
        ("jumprelu", '"dict_class": "MatryoshkaBatchTopKSAE"'),
    ],
)
def test_a_dictionary_learning_state_dict_in_one_file_is_recognised(architecture, said, tmp_path):
    assert said in refusal(of(architecture, tmp_path), activation="relu")


def test_its_mean_is_not_left_behind(tmp_path):
    line = refusal(of("topk", tmp_path, act_mean=MEAN), activation="topk:4")
    assert "once act_mean, which it has no place for, is folded: a mean of x is added to b_dec" in line
    state = torch.load(tmp_path / "topk/ae.pt")
    line = refusal(saved(tmp_path, {"state_dict": state, "act_mean": MEAN}), activation="topk:4")
    assert "once act_mean" in line
    plain = formats.read(tmp_path / "topk")
    torch.save({**state, "b_dec": state["b_dec"] + MEAN}, tmp_path / "topk/ae.pt")  # as the line says
    torch.testing.assert_close(formats.read(tmp_path / "topk")(X), plain(X - MEAN) + MEAN, atol=1e-3, rtol=1e-4)


def test_other_names_in_one_file_say_where_they_belong(tmp_path):
    p = folded("relu").parameters
    line = refusal(saved(tmp_path, dict(p)), activation="relu")
    assert "sae_weights.safetensors" in line and "apply_b_dec_to_input" in line
    theirs = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    assert "save them as sae.safetensors beside a cfg.json with k" in refusal(
        saved(tmp_path, theirs), activation="topk:4"
    )


def test_a_batchtopk_threshold_below_zero_is_remarked(tmp_path, capsys):
    formats.write(folded("batchtopk"), tmp_path / "a", "dictionary_learning")
    arguments = ["convert", str(tmp_path / "a"), "--to", "saelens"]
    main([*arguments, str(tmp_path / "b")])
    assert capsys.readouterr().out.endswith("k 4\n")
    state = torch.load(tmp_path / "a/ae.pt")
    torch.save({**state, "threshold": torch.tensor(-1.0)}, tmp_path / "a/ae.pt")
    main([*arguments, str(tmp_path / "c")])
    assert "; threshold -1 is below zero: every positive latent passes, whatever k is\n" in capsys.readouterr().out
    sae = formats.read(tmp_path / "c")
    pre = (X - sae.parameters["b_dec"]) @ sae.parameters["W_enc"] + sae.parameters["b_enc"]
    torch.testing.assert_close(sae.encode(X), pre.relu(), atol=1e-5, rtol=1e-5)
