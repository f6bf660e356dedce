"""Every site of every architecture against an independent computation; edits; early stop; padding.

The references use the models' own `hidden_states`, attention and MLP modules called by hand, and weights multiplied by
hand, never the host's hooks or its table of layouts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from raysae.errors import UserError
from raysae.models.host import ModelHost, mean, splice, zero
from raysae.models.sites import all_sites, hf_hidden_states_index, parse_site

BLOCKS, WIDTH, HIDDEN, VOCAB = 3, 32, 48, 61

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=BLOCKS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_NEOX = {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
_GPT2 = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=BLOCKS, n_head=4, n_positions=64)
_OPT = {k: v for k, v in _NEOX.items() if k != "intermediate_size"} | dict(ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH)

CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: CONFIG_MAPPING["gpt2"](**_GPT2),
    "gpt2-n_inner": lambda: CONFIG_MAPPING["gpt2"](**_GPT2, n_inner=HIDDEN),
    "gpt_neo": lambda: CONFIG_MAPPING["gpt_neo"](
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=BLOCKS,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=4,
    ),
    "gptj": lambda: CONFIG_MAPPING["gptj"](**_GPT2, rotary_dim=4),
    "gpt_neox": lambda: CONFIG_MAPPING["gpt_neox"](**_NEOX),
    "gpt_neox-sequential": lambda: CONFIG_MAPPING["gpt_neox"](**_NEOX, use_parallel_residual=False),
    "llama": lambda: CONFIG_MAPPING["llama"](**_COMMON),
    "mistral": lambda: CONFIG_MAPPING["mistral"](**_COMMON, sliding_window=4),
    "gemma": lambda: CONFIG_MAPPING["gemma"](**_COMMON),
    "gemma2": lambda: CONFIG_MAPPING["gemma2"](**_COMMON, sliding_window=4),
    "gemma3_text": lambda: CONFIG_MAPPING["gemma3_text"](**_COMMON, sliding_window=4),
    "gemma3": lambda: CONFIG_MAPPING["gemma3"](
        text_config=dict(_COMMON, model_type="gemma3_text", sliding_window=4),
        vision_config=_VISION,
        image_token_index=60,
    ),
    "mixtral": lambda: CONFIG_MAPPING["mixtral"](**_COMMON, num_local_experts=4),
    "olmo2": lambda: CONFIG_MAPPING["olmo2"](**_COMMON),
    "opt": lambda: CONFIG_MAPPING["opt"](**_OPT),
    "opt-projected": lambda: CONFIG_MAPPING["opt"](**_OPT | dict(word_embed_proj_dim=20)),
    "phi": lambda: CONFIG_MAPPING["phi"](**_NEOX),
    "phi3": lambda: CONFIG_MAPPING["phi3"](**_COMMON),
    "qwen2": lambda: CONFIG_MAPPING["qwen2"](**_COMMON),
    "qwen3": lambda: CONFIG_MAPPING["qwen3"](**_COMMON),
    "qwen3_moe": lambda: CONFIG_MAPPING["qwen3_moe"](
        **_COMMON,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    "smollm3": lambda: CONFIG_MAPPING["smollm3"](**_COMMON, no_rope_layers=[1, 0, 1]),
}
_VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7
)

_HOSTS: dict[str, ModelHost] = {}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads cost these tiny products ten times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CONFIGS)
def host(request: pytest.FixtureRequest) -> ModelHost:
    return _host(request.param)


def _host(family: str) -> ModelHost:
    """A random model, with norm weights and biases that are not the identity, so that a missed norm shows."""
    if family not in _HOSTS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.mul_(5)
        _HOSTS[family] = ModelHost(model, name=family)
    return _HOSTS[family]


def _batch() -> tuple[Tensor, Tensor]:
    """Two sequences, of 9 and 6 tokens, padded on the right."""
    ids = torch.randint(3, VOCAB - 1, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return ids, mask


def _stack(model: nn.Module) -> nn.Module:
    inner = getattr(model, "transformer", None) or getattr(model, "gpt_neox", None) or model.model
    return getattr(inner, "language_model", getattr(inner, "decoder", inner))


def _family(model: nn.Module) -> str:
    return model.config.get_text_config().model_type


def _mlp(block: nn.Module) -> nn.Module:
    return block.mlp if hasattr(block, "mlp") else block.fc2


def _blocks(model: nn.Module) -> nn.ModuleList:
    stack = _stack(model)
    return stack.h if hasattr(stack, "h") else stack.layers


def _final_norm(model: nn.Module) -> nn.Module:
    stack = _stack(model)
    name = next(n for n in ("ln_f", "final_layer_norm", "final_layernorm", "norm") if hasattr(stack, n))
    return getattr(stack, name)


def _head(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of what comes out of the final norm."""
    project = getattr(_stack(model), "project_out", None)  # OPT's
    out = model.get_output_embeddings()(x if project is None else project(x))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return out if cap is None else cap * torch.tanh(out / cap)


def _hook_count(host: ModelHost) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.model.modules())


def _branches(
    host: ModelHost, block: nn.Module, pre: Tensor, attn_out: Tensor, post: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """attn_out, mlp_hidden, mlp_out of a block, by the architecture's own formula.

    Sequential blocks take the attn_out that was read; it must then fulfil pre + attn_out + mlp(pre + attn_out) = post.
    """
    family = _family(host.model)
    mlp: Any = block if family == "opt" else block.mlp
    if family == "gpt_neox" and host.model.config.use_parallel_residual:
        mlp_in = block.post_attention_layernorm(pre)
    elif family == "phi":
        mlp_in = block.input_layernorm(pre)
    elif family == "gptj":
        mlp_in = block.ln_1(pre)
    else:
        mlp_in = None
    if family in _UP_AND_DOWN:
        up, down = (getattr(mlp, name) for name in _UP_AND_DOWN[family])
        act: nn.Module = nn.ReLU() if family == "opt" else nn.GELU("none" if family == "gpt_neox" else "tanh")

        def hidden_of(x: Tensor) -> Tensor:
            weight = up.weight if family == "gpt2" else up.weight.T
            return act(x @ weight + up.bias)

        def down_of(h: Tensor) -> Tensor:
            return h @ (down.weight if family == "gpt2" else down.weight.T) + down.bias

    else:
        act = nn.GELU("tanh") if family.startswith("gemma") else nn.SiLU()

        def hidden_of(x: Tensor) -> Tensor:
            if family == "phi3":
                gate, up = (mlp.gate_up_proj.weight @ x.mT).mT.chunk(2, -1)
            elif hasattr(mlp, "experts"):
                return x  # each token has its own experts' hidden units: `down_of` does all
            else:
                gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
            return act(gate) * up

        def down_of(h: Tensor) -> Tensor:
            return _mixture(mlp, h) if hasattr(mlp, "experts") else h @ mlp.down_proj.weight.T

    if mlp_in is not None:  # parallel: the MLP sees the block's input, attention is the rest
        hidden = hidden_of(mlp_in)
        mlp_out = down_of(hidden)
        return post - pre - mlp_out, hidden, mlp_out
    norm = {
        "gpt2": "ln_2", "gpt_neo": "ln_2", "gemma2": "pre_feedforward_layernorm",
        "gemma3_text": "pre_feedforward_layernorm", "opt": "final_layer_norm",
    }  # fmt: skip
    mlp_in = pre + attn_out
    if family != "olmo2":
        mlp_in = getattr(block, norm.get(family, "post_attention_layernorm"))(mlp_in)
    hidden = hidden_of(mlp_in)
    mlp_out = down_of(hidden)
    if family in _POST_NORM:
        mlp_out = block.post_feedforward_layernorm(mlp_out)
    return post - pre - mlp_out, hidden, mlp_out


_UP_AND_DOWN = {
    "gpt2": ("c_fc", "c_proj"),
    "gpt_neo": ("c_fc", "c_proj"),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h"),
    "gptj": ("fc_in", "fc_out"),
    "opt": ("fc1", "fc2"),
    "phi": ("fc1", "fc2"),
}
_POST_NORM = ("gemma2", "gemma3_text", "olmo2")


def _mixture(mlp: Any, x: Tensor) -> Tensor:
    """A mixture of two experts, token by token: softmax of the gate, the two largest renormalised (Mixtral's paper)."""
    out, renormalise = torch.zeros_like(x), getattr(mlp.gate, "norm_topk_prob", True)
    for at in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist():
        token = x[tuple(at)]
        chance = (mlp.gate.weight @ token).softmax(0)
        best = chance.topk(2)
        weights = best.values / best.values.sum() if renormalise else best.values
        for weight, expert in zip(weights, best.indices, strict=True):
            gate, up = (mlp.experts.gate_up_proj[expert] @ token).chunk(2)
            out[tuple(at)] += weight * (mlp.experts.down_proj[expert] @ (nn.functional.silu(gate) * up))
    return out


@torch.no_grad()
def test_every_site_equals_an_independent_computation(host: ModelHost) -> None:
    ids, mask = _batch()
    reference = host.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    states = reference.hidden_states
    reads = host.read(ids, mask, host.sites)
    experts = _family(host.model) in ("mixtral", "qwen3_moe")
    assert set(reads) == {n for n in all_sites(BLOCKS) if not (experts and n.endswith("mlp_hidden"))}

    for name, x in reads.items():
        assert x.shape == (*ids.shape, host.width(name))
        index = hf_hidden_states_index(parse_site(name, BLOCKS), BLOCKS)
        if index is not None and x.shape == states[index].shape:  # OPT may project after its final norm
            assert torch.equal(x, states[index]), name

    last = reads[f"blocks.{BLOCKS - 1}.resid_post"]
    torch.testing.assert_close(_final_norm(host.model)(last), reads["final_norm"])
    torch.testing.assert_close(_head(host.model, reads["final_norm"]), reference.logits)

    for i, block in enumerate(_blocks(host.model)):
        pre, post = reads[f"blocks.{i}.resid_pre"], reads[f"blocks.{i}.resid_post"]
        references = _branches(host, block, pre, reads[f"blocks.{i}.attn_out"], post)
        for kind, expected in zip(("attn_out", "mlp_hidden", "mlp_out"), references, strict=True):
            if kind == "mlp_hidden" and experts:
                continue
            x = reads[f"blocks.{i}.{kind}"]
            assert x.abs().mean() > 0.01, "near zero, a wrong site would pass"
            torch.testing.assert_close(
                x, expected, rtol=1e-4, atol=1e-4, msg=lambda m, site=f"blocks.{i}.{kind}": f"{site}: {m}"
            )


def test_reading_leaves_the_logits_and_the_model_as_they_were(host: ModelHost) -> None:
    ids, mask = _batch()
    hooks = _hook_count(host)
    before = host.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits, reads = host.run(ids, mask, host.sites)
    assert torch.equal(logits, before)
    assert torch.equal(host.logits(ids, mask), before)
    for name, x in host.read(ids, mask, host.sites).items():
        assert torch.equal(x, reads[name])
    assert _hook_count(host) == hooks


def test_identity_edits_equal_the_unedited_logits_to_the_bit(host: ModelHost) -> None:
    ids, mask = _batch()
    clean = host.logits(ids, mask)
    assert torch.equal(host.logits(ids, mask, {name: lambda x: x.clone() for name in host.sites}), clean)
    assert torch.equal(host.logits(ids, mask, {name: splice(lambda rows: rows) for name in host.sites}), clean)
    nowhere = torch.zeros(ids.shape, dtype=torch.bool)
    assert torch.equal(host.logits(ids, mask, {name: zero(nowhere) for name in host.sites}), clean)


@torch.no_grad()
def test_an_edit_at_each_site_has_its_effect(host: ModelHost) -> None:
    """Edits in the last block, where the effect on the stream and the logits can be written down."""
    ids, mask = _batch()
    last = f"blocks.{BLOCKS - 1}"
    clean = host.read(ids, mask, host.sites)
    norm, block = _final_norm(host.model), _blocks(host.model)[-1]
    y = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(2))

    def check(site: str, edit: Callable[[Tensor], Tensor], stream: Tensor) -> None:
        """`stream` is the last block's output that the edit must lead to."""
        logits, reads = host.run(ids, mask, [site, f"{last}.resid_post"], {site: edit})
        assert torch.equal(reads[site], edit(clean[site])), "the value read is the edited one"
        torch.testing.assert_close(reads[f"{last}.resid_post"], stream, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, _head(host.model, norm(stream)), rtol=1e-3, atol=1e-3)

    check(f"{last}.resid_post", lambda x: y, y)
    check(f"{last}.mlp_out", lambda x: y, clean[f"{last}.resid_post"] - clean[f"{last}.mlp_out"] + y)
    bare = clean[f"{last}.resid_post"] - clean[f"{last}.mlp_out"]
    family = _family(host.model)
    if f"{last}.mlp_hidden" in host.sites:
        down = _UP_AND_DOWN.get(family, ("", "down_proj"))[1]
        out = getattr(block if family == "opt" else block.mlp, down)(2 * clean[f"{last}.mlp_hidden"])
        if family in _POST_NORM:
            out = block.post_feedforward_layernorm(out)
        check(f"{last}.mlp_hidden", lambda x: 2 * x, bare + out)
    # An attention output of zero leaves pre + MLP; the MLP sees the change in sequential blocks only.
    reads = host.run(ids, mask, [f"{last}.mlp_out"], {f"{last}.attn_out": zero()})[1]
    check(f"{last}.attn_out", zero(), clean[f"{last}.resid_pre"] + reads[f"{last}.mlp_out"])
    parallel = family in ("phi", "gptj") or (family == "gpt_neox" and host.model.config.use_parallel_residual)
    assert torch.equal(reads[f"{last}.mlp_out"], clean[f"{last}.mlp_out"]) == parallel

    assert torch.equal(
        host.logits(ids, mask, {f"{last}.resid_pre": lambda x: y}),
        host.logits(ids, mask, {f"blocks.{BLOCKS - 2}.resid_post": lambda x: y}),
    )
    torch.testing.assert_close(host.logits(ids, mask, {"final_norm": lambda x: y}), _head(host.model, y))
    # Feeding sequence 0's embeddings to sequence 1 makes their logits equal.
    ones = torch.ones_like(mask)
    same = host.logits(ids, ones, {"embed": lambda x: x[:1].expand_as(x)})
    torch.testing.assert_close(same[0], same[1])
    torch.testing.assert_close(same[0], host.logits(ids, ones)[0])


def test_a_pass_that_starts_below_its_edit_equals_the_whole_pass_to_the_bit(host: ModelHost) -> None:
    ids, mask = _batch()
    calls: list[int] = []
    blocks = _blocks(host.model)
    handles = [_mlp(b).register_forward_hook(lambda m, a, o, i=i: calls.append(i)) for i, b in enumerate(blocks)]
    real = [block.forward for block in blocks]
    try:
        for name in host.sites:
            site, below = parse_site(name, BLOCKS), host.start_of(name)
            y = torch.randn(*ids.shape, host.width(name), generator=torch.Generator().manual_seed(3))
            edits = {name: lambda x, y=y: 0.5 * x + y, "final_norm": lambda x: 2 * x}
            logits, reads = host.run(ids, mask, [name, "final_norm"], edits)
            start = host.read(ids, mask, [below] if below else [])
            calls.clear()
            from_there, reads_there = host.run(ids, mask, [name, "final_norm"], edits, start)
            first = {"embed": 0, "final_norm": BLOCKS}.get(site.kind, (site.block or 0) + (site.kind == "resid_post"))
            assert calls == list(range(first, BLOCKS)), f"{name}: the blocks that ran"
            assert torch.equal(from_there, logits), name
            assert all(torch.equal(reads_there[n], x) for n, x in reads.items()), name
            assert not torch.equal(logits, host.logits(ids, mask)), name
    finally:
        for handle in handles:
            handle.remove()
    assert [block.forward for block in blocks] == real, "the blocks are themselves again"


def test_a_start_that_will_not_do() -> None:
    host = _host("llama")
    ids, mask = _batch()
    below = host.read(ids, mask, ["blocks.1.resid_post", "blocks.0.resid_post", "blocks.1.resid_pre"])
    start = {"blocks.1.resid_post": below["blocks.1.resid_post"]}
    for site in ("embed", "blocks.0.resid_post", "blocks.1.resid_pre", "blocks.1.mlp_out"):
        with pytest.raises(ValueError, match=rf"starts at blocks\.1\.resid_post does not compute {site}"):
            host.logits(ids, mask, {site: zero()}, start)
        with pytest.raises(ValueError, match="does not compute"):
            host.run(ids, mask, [site], start=start)
    cut = {"blocks.1.resid_post": below["blocks.1.resid_post"][:, 1:]}
    for wrong in (below, {"blocks.1.resid_pre": below["blocks.1.resid_pre"]}, cut):
        with pytest.raises(ValueError, match="start must be one resid_post"):
            host.logits(ids, mask, {}, wrong)
    with pytest.raises(ValueError, match="made"):
        host.logits(ids, mask, {"blocks.2.resid_post": lambda x: x[:, 1:]}, start)
    assert torch.equal(host.logits(ids, mask, {}, start), host.logits(ids, mask)), "a failed pass leaves no stand-ins"


def test_right_padding_changes_nothing(host: ModelHost) -> None:
    ids, mask = _batch()
    logits, reads = host.run(ids, mask, host.sites)
    alone_logits, alone = host.run(ids[1:, :6], None, host.sites)
    torch.testing.assert_close(logits[1:, :6], alone_logits, rtol=1e-4, atol=1e-4)
    for name in host.sites:
        torch.testing.assert_close(reads[name][1:, :6], alone[name], rtol=1e-4, atol=1e-4)


def test_read_stops_at_the_highest_site(host: ModelHost) -> None:
    ids, mask = _batch()
    calls: list[str] = []
    blocks, head = _blocks(host.model), host.model.get_output_embeddings()
    watched = {**{f"block {i}": block for i, block in enumerate(blocks)}, "head": head}
    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: calls.append(name)) for name, module in watched.items()
    ]
    handles.append(_mlp(blocks[1]).register_forward_hook(lambda m, a, o: calls.append("mlp 1 done")))
    try:
        for sites, expected in (
            (["blocks.0.resid_post", "embed"], ["block 0"]),
            (["blocks.1.attn_out"], ["block 0", "block 1"]),
            (["blocks.1.mlp_hidden"], ["block 0", "block 1"]),
            (["final_norm"], ["block 0", "block 1", "mlp 1 done", "block 2"]),
            ([], []),
        ):
            if not {*sites} <= {*host.sites}:
                continue
            calls.clear()
            assert set(host.read(ids, mask, sites)) == set(sites)
            assert calls == expected
    finally:
        for handle in handles:
            handle.remove()
    assert host.logits(ids, mask).isfinite().all(), "the model works on after a pass was cut short"


def test_the_text_model_inside_a_vision_language_model() -> None:
    text = CONFIG_MAPPING["llama"](**_COMMON)
    vision = dict(_VISION, model_type="clip_vision_model", projection_dim=16)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=60))
    host = ModelHost(model, name="llava")
    ids, mask = _batch()
    assert host.sites == all_sites(BLOCKS) and host.d_model == WIDTH
    logits, reads = host.run(ids, mask, host.sites)
    torch.testing.assert_close(model.get_output_embeddings()(reads["final_norm"]), logits)


def test_masked_edits_touch_only_their_positions() -> None:
    host = _host("llama")
    ids, mask = _batch()
    site = "blocks.1.resid_post"
    chosen = torch.zeros(ids.shape, dtype=torch.bool)
    chosen[0, 3] = chosen[1, 5] = True
    clean = host.read(ids, mask, [site])[site]
    seen: list[Tensor] = []

    def reconstruct(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows + 1

    vector = torch.arange(WIDTH, dtype=torch.float32)
    for edit, expected in (
        (splice(reconstruct, chosen), clean[chosen] + 1),
        (zero(chosen), torch.zeros(2, WIDTH)),
        (mean(vector, chosen), vector.expand(2, WIDTH)),
    ):
        logits, reads = host.run(ids, mask, [site], {site: edit})
        assert torch.equal(reads[site][~chosen], clean[~chosen])
        assert torch.equal(reads[site][chosen], expected)
        assert torch.equal(logits[0, :3], host.logits(ids, mask)[0, :3]), "earlier positions cannot see it"
    assert len(seen) == 1 and torch.equal(seen[0], clean[chosen])

    host.logits(ids, mask, {site: splice(reconstruct, torch.zeros_like(chosen))})
    assert len(seen) == 1, "no rows, no call"
    assert torch.equal(host.run(ids, mask, [site], {site: mean(vector)})[1][site], vector.expand_as(clean))
    assert torch.equal(host.run(ids, mask, [site], {site: splice(lambda rows: 2 * rows)})[1][site], 2 * clean)


def test_edits_compose_along_the_model() -> None:
    host = _host("gpt2")
    ids, mask = _batch()
    order: list[str] = []

    def noting(name: str) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            order.append(name)
            return x + 1

        return edit

    _, reads = host.run(
        ids, mask, ["embed", "blocks.0.resid_pre"], {name: noting(name) for name in reversed(host.sites)}
    )
    assert set(order) == set(host.sites) and order[:2] == ["embed", "blocks.0.resid_pre"] and order[-1] == "final_norm"
    assert torch.equal(reads["blocks.0.resid_pre"], reads["embed"] + 1)


def test_a_reconstruction_in_float32_fits_a_model_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.bfloat16)
    host = ModelHost(model)
    ids, mask = _batch()
    site = "blocks.1.resid_post"
    edited = host.logits(ids, mask, {site: splice(lambda rows: rows.float())})
    assert edited.dtype == torch.bfloat16 and torch.equal(edited, host.logits(ids, mask))
    assert host.logits(ids, mask, {site: mean(torch.zeros(WIDTH))}).dtype == torch.bfloat16


def test_what_a_caller_can_get_wrong() -> None:
    host = _host("gpt2")
    ids, mask = _batch()
    site = "blocks.0.resid_post"
    hooks = _hook_count(host)
    with pytest.raises(UserError, match=r"capture\.sites: 'blocks\.7\.resid_post'"):
        host.read(ids, mask, ["blocks.7.resid_post"])
    with pytest.raises(UserError, match=r"capture\.sites: 'resid'"):
        host.logits(ids, mask, {"resid": zero()})
    for edit in (lambda x: x[:, 1:], lambda x: x.sum(-1), splice(lambda rows: rows[1:]), mean(torch.zeros(3))):
        with pytest.raises(ValueError, match=r"shape|made"):
            host.logits(ids, mask, {site: edit})
    for wrong in (torch.ones(2, 3, dtype=torch.bool), mask):
        with pytest.raises(ValueError, match="mask must be bool"):
            host.logits(ids, mask, {site: zero(wrong)})
    with pytest.raises(ValueError, match=r"\[batch, pos\]"):
        host.read(ids[0], None, ["embed"])
    with pytest.raises(ValueError, match=r"\[batch, pos\]"):
        host.read(ids, mask[:, 1:], ["embed"])
    with pytest.raises(ValueError, match="65 positions, but the context of gpt2 is 64"):
        host.read(torch.zeros(1, 65, dtype=torch.long), None, ["embed"])
    with pytest.raises(
        UserError, match=rf"model\.tokenizer: token {VOCAB}, but the embedding of gpt2 has {VOCAB} rows"
    ):
        host.read(torch.full((1, 3), VOCAB), None, ["embed"])
    assert host.logits(ids, mask).isfinite().all(), "a failed pass leaves no hooks behind"
    assert _hook_count(host) == hooks


def test_a_mixture_of_experts_has_no_mlp_hidden() -> None:
    host = _host("mixtral")
    ids, mask = _batch()
    hooks = _hook_count(host)
    for call in (lambda site: host.read(ids, mask, [site]), lambda site: host.logits(ids, mask, {site: zero()})):
        with pytest.raises(
            UserError, match=r"capture\.sites: 'blocks\.1\.mlp_hidden' is no site .* mixtures of experts"
        ):
            call("blocks.1.mlp_hidden")
    assert _hook_count(host) == hooks


def test_a_model_that_is_spread_over_devices_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's hooks stand in a module's own `forward`, which a pass with a start sets aside and gives back."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.hf_device_map = {"": "cpu"}
    monkeypatch.setattr(model, "to", lambda *_: pytest.fail("moved"))
    host = ModelHost(model, device="meta")
    assert host.device == torch.device("cpu")
    first = model.model.layers[0]
    first.forward = hooked = lambda *args, real=first.forward, **kwargs: real(*args, **kwargs)
    ids, mask = _batch()
    below = host.read(ids, mask, ["blocks.0.resid_post"])
    clean = host.logits(ids, mask)
    assert torch.equal(host.logits(ids, mask, {"blocks.1.mlp_out": lambda x: x}, below), clean)
    assert first.forward is hooked


def test_an_architecture_without_the_sites_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["bloom"](hidden_size=16, n_layer=1, n_head=2, vocab_size=VOCAB)
    )
    with pytest.raises(UserError, match=r"model\.name: 'in-memory' has the architecture 'bloom'.*gemma2, .*smollm3$"):
        ModelHost(model)
    after = AutoModelForCausalLM.from_config(CONFIG_MAPPING["opt"](**_OPT, do_layer_norm_before=False))
    with pytest.raises(UserError, match=r"model\.name: 'in-memory' is an OPT that normalises after"):
        ModelHost(after)
