"""SAEs that say nothing, built by hand, measured as any SAE is and judged by every shipped gate: each is stopped, and for
the reason that it deserves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BOS, block_entry
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from raysae.activations.capture import CaptureSettings, capture_block, finish
from raysae.activations.store import Store
from raysae.data.duplicates import near_duplicates
from raysae.data.sources import load_problems
from raysae.data.splits import assign_splits
from raysae.data.tokens import TokenBlock, read_block, tokenize
from raysae.evaluate import nulls
from raysae.evaluate.fidelity import Measurement, Paired, collect, measure_block
from raysae.evaluate.statistics import Bootstrap
from raysae.files import write_json
from raysae.gates.criteria import judge, load_gate, passes
from raysae.models.host import ModelHost, load_tokenizer
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.losses import Losses
from raysae.sae.sae import SAE
from raysae.sae.train import Member, Recipe, untrained
from raysae.sweep.trial import Trial, input_scale, train_pack

GATES = sorted((Path(__file__).parents[2] / "configs/gates").glob("*.yaml"))
SITE, D, VOCAB, LENGTH = "blocks.0.resid_post", 32, 24, 14
RECIPE = Recipe(steps=1, batch_size=8, warmup_steps=1, decay_steps=1, sparsity_warmup_steps=1, dead_after_tokens=8)


def small_host() -> ModelHost:
    """A random GPT-2 that is sure of what it predicts."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_layer=2, n_head=4, n_positions=LENGTH, initializer_range=0.4, bos_token_id=BOS,
        eos_token_id=BOS, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelHost(GPT2LMHeadModel(config))


def spoken(host: ModelHost, name: str, split: str, sequences: int, seed: int, own: float) -> TokenBlock:
    """Sequences, each a group of its own, whose tokens are the host's own samples with probability `own`, else any."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((sequences, 1), BOS)
    for _ in range(LENGTH - 1):
        logits = host.logits(ids, torch.ones_like(ids))[:, -1].clone()
        logits[:, BOS] = -math.inf
        next_ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        any_ids = torch.randint(1, VOCAB, (sequences, 1), generator=generator)
        ids = torch.cat([ids, torch.where(torch.rand(sequences, 1, generator=generator) < own, next_ids, any_ids)], 1)
    examples = [f"{split}/{i}" for i in range(sequences)]
    return TokenBlock(
        name=name, split=split, sequence_id=np.arange(sequences, dtype=np.int32), input_ids=list(ids.numpy()),
        positions=[np.arange(LENGTH, dtype=np.int32)] * sequences, step=[np.full(LENGTH, -1, np.int16)] * sequences,
        loss_mask=[i != BOS for i in ids.numpy()], example=[np.full(LENGTH, i, np.int32) for i in range(sequences)],
        example_ids=examples, groups=examples,
    )  # fmt: skip


class World:
    """A model, a store of its activations, and SAEs measured on validation rows beside their random encoders."""

    def __init__(self, root: Path, own: float = 1.0) -> None:
        self.root, self.host = root, small_host()
        train = spoken(self.host, "train-00000-0", "train", 400, 1, own)
        self.block = spoken(self.host, "validation-00000-0", "validation", 100, 2, own)
        settings = CaptureSettings((SITE,), "float32", 4096, 0)
        for block in (train, self.block):
            capture_block(self.host, block, root / "store", settings)
        entries = [block_entry(b) for b in (train, self.block)]
        write_json(root / "store/manifest.json", finish(root / "store", entries, settings, self.host.fingerprint, 0))
        self.store = Store(root / "store")
        self.x = self.store.head(SITE, "train", 10**9).float()

    def judge(self, sae: SAE) -> dict[str, dict[str, tuple[str, str]]]:
        """By gate and metric, the verdict on an SAE and its reason; under `passes`, the gate's."""
        folder = self.root / f"zoo-{len(list(self.root.glob('zoo-*')))}"
        formats.save(sae, folder / "saes/it")
        f = sae.encode(self.x)
        trial = Trial(self.store, RECIPE, 1, 0, folder, {})
        peer = nulls.Peer("it", SITE, sae, float((f != 0).sum(1).float().mean()), 1e-3)
        facts = nulls.build(folder, ["random_encoder"], [peer], trial, Losses(), 7, lambda *_: None)
        ids = ["it", *facts]
        task = Measurement(
            self.store.path, SITE, tuple((i, folder / "saes" / i) for i in ids), folder / "found", 4096, 1.0
        )
        measure_block(self.host, self.block, task)
        metrics = collect(task.root, [self.block.name], self.store.mean(SITE), Bootstrap(200, 0.95, 0))
        paired = Paired.read([task.root], [self.block.name], metrics, Bootstrap(200, 0.95, 0))
        size = {"site": SITE, "d_in": D, "d_sae": sae.config.d_sae, "expansion_factor": sae.config.d_sae / D}
        row = {**metrics["it"], **size, "sae_id": "it", "dead_fraction": float((f == 0).all(0).float().mean())}
        controls = {name: {**metrics[name], **known, "sae_id": name} for name, known in facts.items()}
        found = {}
        for path in GATES:
            verdicts = judge(load_gate(path), row, controls, (), paired.difference)
            found[path.stem] = {v.metric: (v.verdict, v.reason) for v in verdicts if v.mandatory}
            found[path.stem]["passes"] = (str(passes(verdicts)), "")
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("zoo"))


def stopped(found, metric: str, words: str) -> None:
    """Every shipped gate stops it, with these words of this metric."""
    for gate, verdicts in found.items():
        assert verdicts["passes"][0] == "False", gate
        verdict, reason = verdicts[metric]
        assert verdict == "fail" and words in reason, (gate, metric, reason)


def hand_made(architecture: str, W_enc, b_enc, W_dec, b_dec, **more) -> SAE:
    config = SAEConfig(architecture, D, W_enc.shape[1], **({"l1_coefficient": 0.1} if architecture == "relu" else {}), **{
        name: value for name, value in more.items() if name == "k"
    })  # fmt: skip
    extra = {name: value for name, value in more.items() if name != "k"}
    return SAE(config, {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **extra})


def plus_minus(axes: torch.Tensor, centre: torch.Tensor, rare_or_dead: int = 0, x: torch.Tensor | None = None) -> SAE:
    """The projection on orthonormal `axes` [n, D] about `centre`: each direction and its opposite. Further latents write
    nothing; with rows x, each fires on one in 1000 of them, else on none."""
    generator = torch.Generator().manual_seed(3)
    W_enc = torch.cat([axes.T, -axes.T, torch.randn(D, rare_or_dead, generator=generator)], 1)
    b_enc = torch.zeros(W_enc.shape[1])
    if rare_or_dead:
        pre = ((x if x is not None else torch.zeros(1, D)) - centre) @ W_enc[:, -rare_or_dead:]
        b_enc[-rare_or_dead:] = -1e6 if x is None else -torch.quantile(pre, 0.999, dim=0)
    W_dec = torch.cat([axes, -axes, torch.zeros(rare_or_dead, D)])
    return hand_made("relu", W_enc, b_enc, W_dec, centre)


def look_up(world: World, column: str) -> SAE:
    """One latent per value of a row column, read off linearly, k = 1, with the best decoder for it."""
    values = world.store.row_columns(world.store.names("train")[0], (column,))[column].to_numpy()
    one_hot = torch.from_numpy(pd.get_dummies(values).to_numpy(np.float32))
    mean = world.x.mean(0)
    read = torch.linalg.lstsq(torch.cat([world.x - mean, torch.ones(len(world.x), 1)], 1), one_hot).solution
    n = one_hot.shape[1]
    sae = hand_made("topk", read[:-1], read[-1], torch.zeros(n, D), mean, k=1)
    found = sae.encode(world.x).argmax(1)
    assert (found == one_hot.argmax(1)).float().mean() > 0.6, "it reads what it is named for"
    return nulls.fitted(sae, world.x)


# ----------------------------------------------------------------------------------------------------------------------
# The zoo


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("d_sae,k", [(256, 8), (512, 4)])
def test_a_random_encoder_with_fitted_decoder_is_no_better_than_the_null(world, d_sae, k, seed):
    start = SAEConfig("topk", D, d_sae, k=k, seed=seed)
    sae = nulls.fitted(untrained(start, input_scale(world.store, SITE)), world.x)
    stopped(world.judge(sae), "fvu", "not clearly better by")


@pytest.mark.parametrize("others", ["none", "dead", "rare"])
def test_the_identity_is_dense_whatever_width_is_added(world, others):
    count, x = {"none": (0, None), "dead": (600, None), "rare": (600, world.x)}[others]
    found = world.judge(plus_minus(torch.eye(D), world.x.mean(0), count, x))
    stopped(found, "l0_per_dim", "dense: L0 3")
    for verdicts in found.values():
        assert verdicts["fvu_without_top_norms"][0] == "pass", "it is faithful"
        assert (verdicts["dead_fraction"][0] == "fail") is (others == "dead")


def test_a_projection_with_rare_latents_is_spread_over_few(world):
    """Almost a quarter of the axes, always on: no denser than a gate allows, over width that hardly ever fires."""
    axes = torch.linalg.svd(world.x - world.x.mean(0), full_matrices=False).Vh[: D // 4 - 1]
    found = world.judge(plus_minus(axes, world.x.mean(0), 500, world.x))
    stopped(found, "l0_effective", "l0_effective 0.")
    for verdicts in found.values():
        assert all(verdicts[m][0] == "pass" for m in ("l0_fraction", "l0_per_dim", "dead_fraction"))


def test_as_many_latents_on_as_dimensions_is_dense(world):
    """TopK 32x with k = 3 d_in: faithful to any rows, and 9 % of its latents."""
    start = SAEConfig("topk", D, 32 * D, k=3 * D, seed=1)
    found = world.judge(nulls.fitted(untrained(start, input_scale(world.store, SITE)), world.x))
    stopped(found, "l0_per_dim", "of the dimensions of its input, over 50%")


def test_pca_at_full_rank_is_dense(world):
    code, _ = nulls.pca(world.x, SAEConfig("abstopk", D, D, k=1))
    found = world.judge(SAE(replace(code.config, k=code.config.d_sae), code.parameters))
    stopped(found, "l0_per_dim", "dense")


@pytest.mark.parametrize("column", ["position", "token_id"])
def test_a_code_of_positions_or_tokens_leaves_out_the_context(world, column):
    """Where the activations are more than position and token: where they are not, such a code is faithful and passes."""
    stopped(world.judge(look_up(world, column)), "fvu", "must be <= ")


def test_an_sae_of_the_sinks_alone_is_not_faithful_to_the_others(world, tmp_path):
    """2 % of the rows at 250 times their norm, which it reconstructs; the others it writes as one constant."""
    for shard in world.store.shards:
        x = world.store.shard(SITE, shard.name).clone()
        x[::50] *= 250
        (tmp_path / "store" / SITE).mkdir(parents=True, exist_ok=True)
        save_file({"x": x}, tmp_path / "store" / SITE / f"{shard.name}.safetensors")
    (tmp_path / "store/rows").symlink_to(world.store.path / "rows")
    sinks = World.__new__(World)
    sinks.__dict__.update(world.__dict__)
    manifest = dict(world.store.manifest)
    every = Store(world.store.path)
    manifest["sites"] = {SITE: {**every.site(SITE)}}
    write_json(tmp_path / "store/manifest.json", manifest)
    sinks.root, sinks.store = tmp_path, Store(tmp_path / "store")
    sinks.x = sinks.store.head(SITE, "train", 10**9).float()
    eye, centre = torch.eye(D), world.x.mean(0)
    threshold = torch.full((2 * D,), 10 * float(world.x.abs().max()))
    config = SAEConfig("jumprelu", D, 2 * D, target_l0=1.0)
    parts = {"W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * D), "W_dec": torch.cat([eye, -eye])}
    found = sinks.judge(SAE(config, parts | {"b_dec": centre, "log_threshold": threshold.log()}))
    stopped(found, "fvu_without_top_norms", "fvu_without_top_norms 1")
    assert all("must be" not in verdicts["fvu"][1] for verdicts in found.values()), "FVU alone lets it through"


def test_garbage_where_ablation_helps_is_asked_for_the_loss_that_it_adds(tmp_path):
    """Tokens that the model does not expect: it is no worse off without the site, and a share of that says nothing. The
    garbage makes it sure of a token that never comes."""
    world = World(tmp_path, own=0.0)
    start = untrained(SAEConfig("topk", D, 256, k=8, seed=1), input_scale(world.store, SITE))
    never = world.host.model.transformer.wte.weight[BOS].detach()
    found = world.judge(nulls._decoded(start, start.parameters["W_dec"], 30 * never))
    for gate, verdicts in found.items():
        assert verdicts["passes"][0] == "False" and "ce_loss_recovered" not in verdicts
        assert verdicts["fvu"][0] == "fail" and (gate == "phase1" or verdicts["ce_delta"][0] == "fail"), gate


# ----------------------------------------------------------------------------------------------------------------------
# And one that is not


@pytest.mark.slow
def test_a_good_sae_of_stories260k_passes_the_default_gate(shared, tmp_path):
    """A TopK SAE that is trained for some seconds, through the same measurements and the same null."""
    model = shared / "models/stories260K/hf"
    stories = load_problems(
        "text", str(shared / "data/tinystories_text/tiny_stories.txt"), text_separator=r"(?<!\n)\n(?!\n)", examples=900
    )
    near = near_duplicates([p.question for p in stories], 0.7)
    problems = assign_splits(stories, 0.15, 0.1, near, 0)
    made = tokenize(problems, load_tokenizer(str(model)), 256, "problems", 30_000, 0, tmp_path / "tokens")
    host = ModelHost.load(str(model))
    settings = CaptureSettings(("blocks.2.resid_post",), "float32", 4096, 0)
    blocks = [read_block(tmp_path / "tokens" / b["file"]) for b in made["blocks"]]
    for block in blocks:
        capture_block(host, block, tmp_path / "store", settings)
    facts = finish(tmp_path / "store", made["blocks"], settings, host.fingerprint, 0.0)
    write_json(tmp_path / "store/manifest.json", facts)
    recipe = Recipe(800, 1024, 40, 160, 80, 100_000)
    trial = Trial(Store(tmp_path / "store"), recipe, 1, 0, tmp_path / "sweep", {})
    site = "blocks.2.resid_post"
    config = SAEConfig("topk", 64, 512, k=14, seed=0)
    train_pack(trial, site, [Member("it", config, 3e-3)], lambda rung: [])
    sae = formats.load(tmp_path / "sweep/saes/it")
    peer = nulls.Peer("it", site, sae, 14.0, 3e-3)
    found = nulls.build(tmp_path / "sweep", ["random_encoder"], [peer], trial, Losses(), 0, lambda *_: None)
    ids = tuple((i, tmp_path / "sweep/saes" / i) for i in ("it", *found))
    names = [b.name for b in blocks if b.split == "validation"]
    for block in blocks:
        if block.name in names:
            measure_block(host, block, Measurement(tmp_path / "store", site, ids, tmp_path / "found", 4096, 0.5))
    metrics = collect(tmp_path / "found", names, trial.source.mean(site), Bootstrap(300, 0.95, 0))
    paired = Paired.read([tmp_path / "found"], names, metrics, Bootstrap(300, 0.95, 0))
    size = {"site": site, "d_in": 64, "d_sae": 512, "sae_id": "it"}
    row = {**metrics["it"], **size, "dead_fraction": metrics["it"]["never_fired_fraction"]}
    controls = {name: {**metrics[name], **known, "sae_id": name} for name, known in found.items()}
    gate = load_gate(next(path for path in GATES if path.stem == "default"))
    verdicts = judge(gate, row, controls, (), paired.difference)
    assert passes(verdicts), [v.reason for v in verdicts if v.stops]
    (null,) = controls
    judged = judge(gate, {**controls[null], "dead_fraction": 0.0}, controls, (), paired.difference)
    assert not passes(judged)
