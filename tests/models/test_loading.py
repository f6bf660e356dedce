"""Loading: real models, what identifies them, and the one line that a user gets for a model that will not load."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from raysae.errors import UserError
from raysae.models.host import ModelHost, fingerprint_of, load_tokenizer, model_facts, save_with_random_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _model(seed: int = 0, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _one_line(call: Callable[..., object], *args: str) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "n_blocks", "d_model", "d_mlp", "context"),
    [
        ("stories260K/hf", 5, 64, 172, 512),
        ("gsm-nano", 6, 192, 768, 512),
        ("gpt_nano_sort/hf", 3, 48, 192, 11),
    ],
)
def test_real_models_load(shared: Path, path: str, n_blocks: int, d_model: int, d_mlp: int, context: int) -> None:
    name = str(shared / "models" / path)
    host = ModelHost.load(name)
    assert host.facts == model_facts(name)
    assert (host.n_blocks, host.d_model, host.context_length) == (n_blocks, d_model, context)
    assert host.width("blocks.0.mlp_hidden") == d_mlp and host.width("final_norm") == d_model
    assert host.fingerprint == fingerprint_of(name)
    ids = torch.randint(0, host.facts.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    reads = host.read(ids, torch.ones_like(ids), host.sites)
    for i in range(n_blocks):
        pre, attn, mlp, post = (
            reads[f"blocks.{i}.{kind}"] for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in host.model.parameters()) and not host.model.training


def test_a_trained_model_predicts_text_through_the_host(shared: Path) -> None:
    """Far below the ln(512) = 6.2 nats of a model whose weights did not arrive."""
    host = ModelHost.load(str(shared / "models/stories260K/hf"))
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    encoded = host.tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    assert encoded["offset_mapping"].shape[:2] == encoded["input_ids"].shape
    logits = host.logits(encoded["input_ids"], encoded["attention_mask"])
    assert torch.nn.functional.cross_entropy(logits[0, :-1], encoded["input_ids"][0, 1:]) < 2.0


def test_sorting_model_sorts(shared: Path) -> None:
    host = ModelHost.load(str(shared / "models/gpt_nano_sort/hf"))
    ids = torch.tensor([[2, 0, 1, 0, 2, 1, 0, 0, 1, 1, 2]])  # six digits, then the same sorted, all but the last
    assert host.logits(ids, None)[0, 5:].argmax(-1).tolist() == [0, 0, 1, 1, 2, 2]


def test_tokenizers(shared: Path, folder: Path) -> None:
    assert load_tokenizer(str(shared / "models/gsm-nano")).is_fast
    assert ModelHost.load(str(folder), tokenizer=str(shared / "models/gsm-nano")).tokenizer.vocab_size == 4096
    own = load_tokenizer(str(shared / "models/gpt2_tokenizer/hf"))
    assert ModelHost(_model(), tokenizer=own).tokenizer is own
    without = str(shared / "models/gpt_nano_sort/hf")  # transformers would make an empty tokenizer here
    assert _one_line(load_tokenizer, without).startswith(f"model.tokenizer: {without!r}")
    assert _one_line(lambda: ModelHost(_model()).tokenizer).startswith("model.tokenizer: the model 'in-memory'")
    assert _one_line(load_tokenizer, "./nowhere").startswith("model.tokenizer: there is no folder './nowhere'")
    assert _one_line(load_tokenizer, "no-one/nothing").startswith("model.tokenizer: 'no-one/nothing'")


def test_fingerprint_is_of_the_weights(folder: Path, tmp_path: Path) -> None:
    fingerprint = fingerprint_of(str(folder))
    assert fingerprint == ModelHost.load(str(folder)).fingerprint
    assert fingerprint == ModelHost.load(str(folder), dtype="bfloat16").fingerprint
    assert (fingerprint["name"], fingerprint["revision"]) == (str(folder), None)
    assert fingerprint["class"] == "LlamaForCausalLM"
    _model().save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint_of(str(tmp_path / "sharded"))["weights"] == fingerprint["weights"]

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_of(str(folder))["weights"] != fingerprint["weights"]

    assert ModelHost(_model(0)).fingerprint == ModelHost(_model(0)).fingerprint != ModelHost(_model(1)).fingerprint


def _rewrite(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_model_is_its_config_and_the_weights_that_are_loaded(folder: Path, tmp_path: Path) -> None:
    """What changes the logits changes the fingerprint, and nothing else does."""
    ids = torch.arange(20)[None]

    def found(of: Path = folder) -> tuple[dict[str, str | None], torch.Tensor]:
        host = ModelHost.load(str(of))
        assert host.fingerprint == fingerprint_of(str(of))
        return host.fingerprint, host.logits(ids, None)

    before, logits = found()
    save_file({"junk": torch.ones(3)}, folder / "adapter_old.safetensors")
    (folder / "training_state.safetensors").write_bytes(b"not a safetensors file")
    _rewrite(folder, _name_or_path="/home/someone", transformers_version="4.0.0", dtype="bfloat16")
    same, same_logits = found()
    assert same == before and torch.equal(same_logits, logits)

    _rewrite(folder, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    other, other_logits = found()
    assert other["weights"] == before["weights"] and other["config"] != before["config"]
    assert not torch.equal(other_logits, logits)

    shards = tmp_path / "sharded"
    _model().save_pretrained(shards, max_shard_size="5KB")
    of_shards = found(shards)[0]
    save_file({"junk": torch.ones(3)}, shards / "model-extra.safetensors")
    assert found(shards)[0] == of_shards
    last = sorted(shards.glob("model-0*.safetensors"))[-1]
    weights = load_file(last)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, last, metadata={"format": "pt"})
    assert found(shards)[0]["weights"] != of_shards["weights"]
    last.unlink()
    for call in (ModelHost.load, fingerprint_of):
        assert re.search(rf"lacks {last.name}, which model.safetensors.index.json names", _one_line(call, str(shards)))
    _model(1).save_pretrained(shards)  # transformers takes the single file, whatever the index says
    for file in shards.glob("model-*.safetensors"):
        file.unlink()
    assert found(shards)[0]["weights"] == found_of(tmp_path, 1)


def found_of(tmp_path: Path, seed: int) -> str | None:
    _model(seed).save_pretrained(tmp_path / "fresh")
    return fingerprint_of(str(tmp_path / "fresh"))["weights"]


def test_what_transformers_does_not_load_is_no_model(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    for call in (ModelHost.load, fingerprint_of):
        said = _one_line(call, str(folder))
        assert "neither model.safetensors nor model.safetensors.index.json; it holds weights.safetensors" in said
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json is no index" in _one_line(fingerprint_of, str(folder))
    _rewrite(folder, transformers_weights="weights.safetensors")
    assert ModelHost.load(str(folder)).fingerprint == fingerprint_of(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter; merge it" in _one_line(ModelHost.load, str(folder))


def test_a_vision_language_folder_is_one_line(tmp_path: Path) -> None:
    text = dict(model_type="llama", vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = dict(model_type="clip_vision_model", hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="llava", text_config=text, vision_config=vision)))
    for call in (ModelHost.load, fingerprint_of, model_facts):
        said = _one_line(call, str(tmp_path))
        assert said.startswith(f"model.name: {str(tmp_path)!r} is a llava around a llama, which cannot be loaded")


def test_dtype(folder: Path) -> None:
    host = ModelHost.load(str(folder), dtype="bfloat16")
    assert host.read(torch.zeros(1, 2, dtype=torch.long), None, ["embed"])["embed"].dtype == torch.bfloat16


def test_no_pickle_is_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(_model().state_dict(), folder / "pytorch_model.bin")
    message = _one_line(ModelHost.load, str(folder))
    assert re.match(r"model\.name: .*pytorch_model\.bin is a pickle.*safetensors", message)
    assert _one_line(fingerprint_of, str(folder)) == message


def test_what_does_not_load_is_one_line(folder: Path, tmp_path: Path) -> None:
    for call in (ModelHost.load, model_facts, fingerprint_of):
        missing = str(tmp_path / "nowhere")
        assert _one_line(call, missing).startswith(f"model.name: there is no folder {missing!r}")
        # Not cached, and no network in tests: the hub's own failure, as one line.
        assert _one_line(call, "no-one/nothing").startswith("model.name: 'no-one/nothing' could not")
        assert _one_line(call, str(folder), "main").startswith("model.revision: 'main'")

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the model's weights, such as model.layers.1.mlp" in _one_line(ModelHost.load, str(folder))

    (folder / "model.safetensors").write_bytes(b"not a safetensors file")
    assert _one_line(ModelHost.load, str(folder)).startswith(f"model.name: {str(folder)!r} could not be loaded")
    assert _one_line(fingerprint_of, str(folder)).startswith(f"model.name: {str(folder)!r} could not be loaded")

    (folder / "model.safetensors").unlink()
    assert "holds no weights: neither model.safetensors" in _one_line(ModelHost.load, str(folder))

    (folder / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    for call in (ModelHost.load, model_facts, fingerprint_of):
        assert "architecture 'bloom'" in _one_line(call, str(folder))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "code.C"}, "model_type": "new"}))
    (folder / "code.py").write_text("raise SystemExit('remote code was run')")
    assert "trust_remote_code" in _one_line(model_facts, str(folder))


def test_hub_model_is_pinned_to_its_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache made by hand, offline: the commit that `main` stands for is what is loaded and recorded."""
    repo = tmp_path / "hub/models--someone--tiny"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    host = ModelHost.load("someone/tiny")
    expected = {
        "name": "someone/tiny",
        "revision": COMMIT,
        "class": "LlamaForCausalLM",
        "weights": None,
        "config": None,
    }
    assert host.fingerprint == expected
    assert fingerprint_of("someone/tiny") == fingerprint_of("someone/tiny", COMMIT) == expected
    assert host.facts == model_facts("someone/tiny")
    ids = torch.arange(4)[None]
    assert torch.equal(host.logits(ids, None), ModelHost.load(str(folder)).logits(ids, None))
    assert _one_line(ModelHost.load, "someone/tiny", "v2").startswith("model.name: 'someone/tiny' could not")


def test_random_weights_are_the_seed_s_and_leave_all_else_as_it_is(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for name, seed in (("d", 0), ("a", 5), ("b", 5), ("c", 6)):
        save_with_random_weights(str(folder), tmp_path / name, seed)
    assert torch.equal(before, torch.get_rng_state())
    found = {name: fingerprint_of(str(tmp_path / name)) for name in "abcd"}
    weights = {name: fingerprint["weights"] for name, fingerprint in found.items()}
    trained = fingerprint_of(str(folder))
    assert weights["a"] == weights["b"] != weights["c"] and trained["weights"] not in (weights["a"], weights["c"])
    assert weights["d"] == trained["weights"], "the draw is the architecture's own: the fixture's model is of seed 0"
    assert found["a"]["class"] == trained["class"]
    assert ModelHost.load(str(tmp_path / "a")).facts == model_facts(str(folder))
