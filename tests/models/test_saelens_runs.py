"""SAELens' own store and evaluation run from an SAE's file, through the model that the file names, to our numbers."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import sparse_rows
from small import GATE, study
from test_foreign import foreign
from test_host import CONFIGS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from raysae.config.jobs import SweepJob
from raysae.models.host import ModelHost, splice, zero
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig, initial_parameters
from raysae.sae.metrics import RowSums
from raysae.sae.sae import SAE
from raysae.stages.saes import saelens_metadata
from raysae.workspace import Made

SITES = ("blocks.1.resid_post", "blocks.2.mlp_out", "blocks.0.mlp_hidden", "final_norm")
IDS = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(5))  # none of them special


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with its tokenizer, as save_pretrained leaves them."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({str(i): i for i in range(61)}, unk_token="3"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2", pad_token="0").save_pretrained(path)
    return path


def metadata(folder: Path, site: str, **model: Any) -> dict[str, Any]:
    """What a run on this folder would write of it."""
    data = {"source": "text", "path": str(folder / "config.json")}
    mine = study(SweepJob(model={"name": str(folder)}, data=data, output=folder / "results", gate=GATE))
    facts = {"name": str(folder), "revision": None, "class": "GPT2LMHeadModel", "weights": "00ff", **model}
    mine.model._fingerprints[str(folder)] = facts
    inputs = {
        "store": Made(Path("store-0123"), {"sites": {site: {}}}, reused=True),
        "tokens": Made(Path("tokens-0123"), {"context_length": 12, "separator_id": 1}, reused=True),
    }
    of_model, hooks = saelens_metadata(inputs, mine.model, mine.job.data)
    return of_model | hooks[site]


@pytest.mark.parametrize("site", SITES)
def test_from_the_file_alone_to_the_same_numbers(site: str, folder: Path, tmp_path: Path) -> None:
    sae_lens, load = foreign("sae_lens"), foreign("sae_lens.load_model").load_model
    evals, store_of = foreign("sae_lens.evals"), foreign("sae_lens.training.activations_store").ActivationsStore
    scaler = foreign("sae_lens.training.activation_scaler").ActivationScaler()
    host = ModelHost.load(str(folder))
    x = host.read(IDS, None, [site])[site].flatten(0, 1)
    config = SAEConfig("topk", x.shape[1], 64, k=6, seed=1)
    ours = SAE(config, initial_parameters(config, x.mean(0)), metadata(folder, site))
    formats.save(ours, tmp_path / "sae")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_lens.SAE.load_from_disk(tmp_path / "sae")
        named = sae.cfg.metadata
        assert named.model_name is None  # a folder's name would be another model on the hub; the reader says which
        model = load(
            named.model_class_name, str(folder), "cpu", named.model_from_pretrained_kwargs, hook_names=[named.hook_name]
        )
        dataset = Dataset.from_dict({"input_ids": IDS.tolist()})
        store = store_of.from_sae(model, sae, dataset, streaming=False, store_batch_size_prompts=4)
        acts = store.get_activations(IDS)
        found, _ = evals.run_evals(sae, store, model, scaler, evals.get_eval_everything_config(4, 2, 2))
    torch.testing.assert_close(acts.flatten(0, 1), x)

    sums = RowSums(x.mean(0))
    sums.add(x, *ours.reconstruct(x))
    row = sums.metrics()
    assert found["reconstruction_quality"]["explained_variance"] == pytest.approx(row["explained_variance"], abs=1e-5)
    assert found["sparsity"]["l0"] == pytest.approx(row["l0"])
    for name, edits in (("without_sae", {}), ("with_sae", {site: splice(ours)}), ("with_ablation", {site: zero()})):
        log_p = host.logits(IDS, None, edits)[:, :-1].log_softmax(-1)
        ce = -log_p.gather(2, IDS[:, 1:, None]).mean().item()
        assert found["model_performance_preservation"][f"ce_loss_{name}"] == pytest.approx(ce, rel=1e-5), name


def test_nothing_of_this_machine_is_published(folder: Path, tmp_path: Path) -> None:
    site = SITES[0]
    config = SAEConfig("topk", 8, 16, k=2)
    sae = SAE(config, initial_parameters(config, sparse_rows(50, 8, seed=1).mean(0)), metadata(folder, site))
    formats.save(sae, tmp_path / "sae")
    text = (tmp_path / "sae/cfg.json").read_text()
    written = json.loads(text)["metadata"]
    assert str(folder) not in text and folder.name not in text and str(Path.home()) not in text
    assert written["model_name"] is None and written["dataset_path"] is None
    assert written["raysae_model"] == {"revision": None, "class": "GPT2LMHeadModel", "weights": "00ff"}


def test_a_published_model_is_named_with_its_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raysae.models.foreign import Hook
    from raysae.stages import saes

    commit, site = "0123abcd", SITES[0]
    for hook, kwargs in (
        (Hook("AutoModelForCausalLM", "transformer.h.1"), {"dtype": "float32", "revision": commit}),
        (Hook("HookedTransformer", "blocks.1.hook_resid_post"), {"dtype": "float32", "center_writing_weights": False}),
    ):
        monkeypatch.setattr(saes, "saelens_hooks", lambda *_, hook=hook: {site: hook})
        found = metadata(folder, site, name="somebody/model", revision=commit, weights=None)
        assert (found["model_name"], found["model_from_pretrained_kwargs"]) == ("somebody/model", kwargs)
