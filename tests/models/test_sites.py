"""Site names: parsing, order, and the alias into `hidden_states`; the registry's default sites."""

import pytest

from raysae.errors import UserError
from raysae.models.registry import MODELS, default_site, find
from raysae.models.sites import Site, all_sites, hf_hidden_states_index, order_sites, parse_site


def test_every_site_parses_to_itself_in_order() -> None:
    names = all_sites(3)
    assert len(names) == len(set(names)) == 2 + 3 * 5
    assert tuple(site.name for site in order_sites(reversed(names), 3)) == names
    assert parse_site("blocks.2.mlp_out", 3) == Site("blocks.2.mlp_out", "mlp_out", 2)


def test_order_is_by_number_not_by_text() -> None:
    names = ["final_norm", "blocks.10.resid_pre", "blocks.9.resid_post", "blocks.9.resid_post", "embed"]
    ordered = [site.name for site in order_sites(names, 12)]
    assert ordered == ["embed", "blocks.9.resid_post", "blocks.10.resid_pre", "final_norm"]


@pytest.mark.parametrize(
    "name",
    [
        "blocks.3.resid_post",
        "blocks.-1.resid_pre",
        "blocks.01.resid_pre",
        "blocks.0.mlp",
        "layers.0.resid_post",
        "",
        "3",
    ],
)
def test_unknown_site_is_one_line_naming_field_value_and_choice(name: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_site(name, 3)
    message = str(caught.value)
    assert message.startswith(f"capture.sites: {name!r} ")
    assert "3 blocks" in message and "blocks.{0..2}." in message and "resid_post" in message
    assert "\n" not in message


def test_hidden_states_alias() -> None:
    index = {name: hf_hidden_states_index(parse_site(name, 3), 3) for name in all_sites(3)}
    assert {name: i for name, i in index.items() if i is not None} == {
        "embed": 0,
        "blocks.0.resid_pre": 0,
        "blocks.0.resid_post": 1,
        "blocks.1.resid_pre": 1,
        "blocks.1.resid_post": 2,
        "blocks.2.resid_pre": 2,
        "final_norm": 3,
    }


def test_registry_defaults() -> None:
    assert default_site("openai-community/gpt2", 12) == "blocks.6.resid_post"
    assert default_site("meta-llama/Meta-Llama-3-8B", 32) == "blocks.16.resid_post"
    assert default_site("meta-llama/Llama-3.2-1B", 16) == "blocks.8.resid_post"
    assert default_site("unknown/model", 5) == "blocks.2.resid_post"
    assert default_site("somewhere/gpt2", 3) == "blocks.1.resid_post"  # the name alone does not make it that model
    assert all(0 <= layer < model.n_layers for model in MODELS for layer in model.layers)
    gemma = find("google/gemma-2b")
    assert gemma is not None and gemma.d_mlp == 16384
