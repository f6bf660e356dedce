"""Each site by SAELens' own loader of Hugging Face models and by TransformerLens, against ModelHost."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from outside import foreign
from test_host import BLOCKS, CONFIGS, _batch, _host
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raysae.models.foreign import TRANSFORMER_LENS, module_of, saelens_hooks, transformer_lens_hook
from raysae.models.resolvers import find_layout
from raysae.models.sites import all_sites, parse_site

PLAIN_MLP = ("gpt2", "gpt_neo", "gptj", "phi")


@pytest.mark.parametrize("family", CONFIGS)
def test_saelens_proxy_reads_each_site_that_has_a_module(family: str) -> None:
    proxy = foreign("sae_lens.load_model").HookedProxyLM
    host, (ids, _) = _host(family), _batch()
    ids = ids[:1]  # no padding: the proxy passes no mask
    names = {}
    for site in host.sites:
        config = host.model.config.get_text_config()
        names[site] = module_of(host.model, find_layout(config, family), parse_site(site, BLOCKS))
    missing = {site for site, name in names.items() if name is None}
    plain = family.startswith(PLAIN_MLP) and family != "phi3"
    expected = set() if plain else {site for site in host.sites if site.endswith("mlp_hidden")}
    if family.startswith("opt"):  # two embeddings are added, and the MLP is no module
        expected = {"embed", "blocks.0.resid_pre"} | {site for site in host.sites if ".mlp_" in site}
    assert missing == expected
    found = {site: name for site, name in names.items() if name is not None}
    with torch.no_grad():
        _, cache = proxy(host.model, None).run_with_cache(ids, names_filter=list(found.values()))
    reads = host.read(ids, None, found)
    for site, name in found.items():
        torch.testing.assert_close(cache[name], reads[site], msg=f"{site} is not what {name} returns")
    for module in host.model.modules():
        module._forward_hooks.clear()


@pytest.mark.parametrize(
    "family,known",
    [
        ("gpt2", "gpt2"),
        ("gpt_neox", "EleutherAI/pythia-70m"),
        ("qwen2", "Qwen/Qwen2-0.5B"),
        ("qwen3", "Qwen/Qwen3-0.6B"),
        ("mistral", "mistralai/Mistral-7B-v0.1"),
        ("llama", "01-ai/Yi-6B"),
    ],
)
def test_transformer_lens_reads_each_site_that_it_has(
    family: str, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own conversion of a small model of the family, under a published name whose config it would fetch."""
    lens, loading = foreign("transformer_lens"), foreign("transformer_lens.loading_from_pretrained")
    host, (ids, _) = _host(family), _batch()
    config = host.model.config
    config.architectures, config.n_ctx = [type(host.model).__name__], 64  # as published configs have it
    monkeypatch.setattr(loading, "AutoConfig", SimpleNamespace(from_pretrained=lambda *_, **__: config))
    words = Tokenizer(WordLevel({str(i): i for i in range(61)}, unk_token="3"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2", pad_token="0").save_pretrained(
        tmp_path
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    hooked = lens.HookedTransformer.from_pretrained_no_processing(known, hf_model=host.model, tokenizer=tokenizer)
    hooks = {site: transformer_lens_hook(parse_site(site, BLOCKS)) for site in all_sites(BLOCKS)}
    assert [site for site, hook in hooks.items() if hook is None] == ["final_norm"]
    with torch.no_grad():
        _, cache = hooked.run_with_cache(ids[:1])
    reads = host.read(ids[:1], None, hooks)
    for site, hook in hooks.items():
        if hook is not None:
            torch.testing.assert_close(cache[hook], reads[site], atol=2e-3, rtol=1e-3, msg=f"{site} is not {hook}")


def test_transformer_lens_knows_the_names() -> None:
    official = foreign("transformer_lens.supported_models").OFFICIAL_MODEL_NAMES
    assert set(official) >= TRANSFORMER_LENS


def test_a_local_model_is_read_by_its_modules_and_a_published_one_by_transformer_lens(tmp_path, monkeypatch) -> None:
    CONFIGS["gpt2"]().save_pretrained(tmp_path)
    sites = ("blocks.1.resid_post", "blocks.2.mlp_hidden", "final_norm")
    local = saelens_hooks(str(tmp_path), sites)
    assert [tuple(local[site]) for site in sites] == [
        ("AutoModelForCausalLM", "transformer.h.1"),
        ("AutoModelForCausalLM", "transformer.h.2.mlp.act"),
        ("AutoModelForCausalLM", "transformer.ln_f"),
    ]
    monkeypatch.chdir(tmp_path.parent)
    os.rename(tmp_path, "gpt2")
    published = saelens_hooks("gpt2", sites)
    assert [tuple(published[site]) for site in sites] == [
        ("HookedTransformer", "blocks.1.hook_resid_post"),
        ("HookedTransformer", "blocks.2.mlp.hook_post"),
        ("AutoModelForCausalLM", "transformer.ln_f"),
    ]
