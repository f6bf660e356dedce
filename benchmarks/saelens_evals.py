"""raysae's fidelity against SAELens' own evaluation, on the same SAE, model and tokens, from the SAE's file alone.

    python benchmarks/saelens_evals.py [--tokens 400000] [--json FILE]
    python benchmarks/saelens_evals.py --run results/<run>

The second takes the chosen SAE of a run (the closest to its gate, where none is chosen), its model and its validation
split. The first trains a TopK SAE (k 16, 512 latents) on stories260K at blocks.2.resid_post with `Pack` and saves it as a
run would.

SAELens takes everything from the file: `sae_lens.SAE.load_from_disk` the SAE, `load_model` the model by its
model_class_name and model_from_pretrained_kwargs (its folder is given, since a file names models of the hub only),
`ActivationsStore.from_sae` and `run_evals` where to read by its hook_name. The store gets our validation sequences as a
tokenised dataset. SAELens has no padding: shorter sequences are filled up on the right, and whole ones added to fill
batches, with a special token, which its evaluation leaves out and no other token sees.

First table, of rows (special tokens left out by both). SAELens' variance is about the per-dimension mean of the evaluated
rows, as ours is. Tolerances are for what is known to differ: raysae measures the rows of the store, which are bfloat16,
and SAELens those of a new forward pass, in float32, so that a few latents change sides at TopK's edge; SAELens takes the
relative bias by batch and then the mean of batches, however full. EV 1e-3, that bias 5e-3, the others 2e-3, of SAELens'
value.

Second table, of the model, in nats. Each library's own figures differ by definition, and are printed without a target:

- raysae scores a token if it and the token before it, which predicts it, are both kept; SAELens asks it of the predicting
  token only, and so scores the BOS of the next story, too.
- SAELens takes KL at the last position, too, after which there is no token to predict.
- SAELens' zero ablation zeroes special tokens as well; raysae's leaves them, as both libraries do in the splice. With
  everything zeroed this model says the same at every position (CE 6.24); with BOS left it attends to nothing else and
  is worse (7.47), so that raysae's CE recovered is the higher by 0.011.

Third table: SAELens' per-token values from `get_recons_loss` over raysae's tokens, and raysae's zero ablation at every
position. Then nothing differs but the order of sums: 1e-5 nats, and 1e-5 of CE recovered.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import common
import numpy as np
import quality
import torch

from raysae.activations.store import Store
from raysae.data.tokens import TokenBlock, read_block
from raysae.evaluate.fidelity import Measurement, collect, measure_block
from raysae.evaluate.statistics import Bootstrap
from raysae.files import read_json, write_json
from raysae.models import host as edits
from raysae.models.foreign import saelens_hooks
from raysae.models.host import ModelHost
from raysae.run import Run
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.sae import SAE
from raysae.sae.train import Member, Pack
from raysae.sweep.space import recipe
from raysae.sweep.trial import input_scale

D_SAE, K, BATCH, SEQUENCES_AT_ONCE = 512, 16, 2048, 16
ROWS = {  # name in raysae, (group, name in SAELens), tolerance
    "explained_variance": (("reconstruction_quality", "explained_variance"), 1e-3),
    "l0": (("sparsity", "l0"), 2e-3),
    "l1": (("sparsity", "l1"), 2e-3),
    "l2_ratio": (("shrinkage", "l2_ratio"), 2e-3),
    "relative_reconstruction_bias": (("shrinkage", "relative_reconstruction_bias"), 5e-3),
    "cosine": (("reconstruction_quality", "cossim"), 2e-3),
}
MODEL = {
    "ce_clean": ("model_performance_preservation", "ce_loss_without_sae"),
    "ce_spliced": ("model_performance_preservation", "ce_loss_with_sae"),
    "ce_zero": ("model_performance_preservation", "ce_loss_with_ablation"),
    "ce_loss_recovered": ("model_performance_preservation", "ce_loss_score"),
    "kl": ("model_behavior_preservation", "kl_div_with_sae"),
    "kl_zero": ("model_behavior_preservation", "kl_div_with_ablation"),
}


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=400_000, help="training tokens of the SAE (default 400,000)")
    parser.add_argument("--run", type=Path, help="a finished run, whose SAE is measured in place of a new one")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tables = of_run(root, Run.open(args.run)) if args.run else of_stories(root, args.tokens)
    return common.finish(tables, args.json, load)


def of_stories(root: Path, tokens: int) -> list[common.Table]:
    store = Store(quality.make_store(root, rows_per_block=16_384))
    formats.save(train(store, tokens), root / "sae")
    return compare(root, store, quality.SITE, root / "sae", validation_blocks(root / "tokens"))


def of_run(root: Path, run: Run) -> list[common.Table]:
    if run.best is None:
        raise SystemExit(f"error: {run.path} has no SAE")
    store, site, sae_id = Store(run.stage("store")), run.site(run.best), run.best
    tables = compare(root, store, site, run.path / "saes" / sae_id, validation_blocks(run.stage("tokens")))
    row = run.table.set_index("sae_id").loc[sae_id]
    ours = read_json(root / "ours.json")
    own = common.Table.titled(f"raysae: {sae_id} here and in the run's table")
    for name in ("fvu", "l0"):
        agree(own, name, float(row[name]), ours[name], 1e-6 * abs(float(row[name])), "table")
    return [own, *tables]


def train(store: Store, tokens: int) -> SAE:
    scale = input_scale(store, quality.SITE)
    member = Member("topk", SAEConfig("topk", quality.D_IN, D_SAE, k=K), 1e-3)
    shared = recipe(tokens, BATCH, 0.05, 0.2, 0.1, 1_000_000)
    pack = Pack([member], shared, scale, "cpu")
    pack.train(islice((x.float() for x in store.batches(quality.SITE, "train", BATCH)), shared.steps))
    sae = pack.sae("topk")
    hook = saelens_hooks(str(quality.model_path()), (quality.SITE,))[quality.SITE]
    more = {"model_from_pretrained_kwargs": {"dtype": "float32"}, "prepend_bos": True, "context_size": 512}
    return SAE(sae.config, sae.parameters, {"model_name": None, **hook._asdict(), **more})


def validation_blocks(tokens: Path) -> list[TokenBlock]:
    return [read_block(file) for file in sorted(tokens.glob("validation-*.parquet"))]


def compare(root: Path, store: Store, site: str, sae: Path, blocks: Sequence[TokenBlock]) -> list[common.Table]:
    import sae_lens
    from datasets import Dataset
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.load_model import load_model
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    made_with = store.manifest["model"]
    task = Measurement(store.path, site, (("sae", sae),), root / "found", 16_384, 1.0)
    theirs = sae_lens.SAE.load_from_disk(sae)
    named = theirs.cfg.metadata
    loading = named.model_from_pretrained_kwargs
    host = ModelHost.load(made_with["name"], made_with["revision"], loading["dtype"])
    for block in blocks:
        measure_block(host, block, task)
    ours = collect(task.root, [block.name for block in blocks], store.mean(site), Bootstrap(1000, 0.95, 0))["sae"]
    write_json(root / "ours.json", ours)

    model = load_model(
        named.model_class_name, named.model_name or made_with["name"], "cpu", loading, hook_names=[named.hook_name]
    )
    ids, kept = filled(blocks, model.tokenizer)
    dataset, length, batches = (
        Dataset.from_dict({"input_ids": ids.tolist()}),
        ids.shape[1],
        len(ids) // SEQUENCES_AT_ONCE,
    )
    served = ActivationsStore.from_sae(
        model, theirs, dataset, context_size=length, streaming=False, store_batch_size_prompts=SEQUENCES_AT_ONCE
    )
    config = get_eval_everything_config(SEQUENCES_AT_ONCE, batches, batches)
    found, _ = run_evals(theirs, served, model, ActivationScaler(), config)

    tokens = f"{sum(len(block.input_ids) for block in blocks)} sequences of up to {length} tokens"
    rows = common.Table.titled(f"rows: {ours['n_rows']:g} kept of {tokens}; SAELens reads {named.hook_name}")
    for name, ((group, other), tolerance) in ROWS.items():
        agree(rows, name, found[group][other], ours[name], tolerance * abs(found[group][other]))
    as_defined = common.Table.titled("model: as each library defines it, nats")
    for name, (group, other) in MODEL.items():
        agree(as_defined, name, found[group][other], ours[name], None)
    same = common.Table.titled(f"model: on the same {ours['n_scored_tokens']:g} tokens, the same ablation, nats")
    expected = on_our_tokens(theirs, model, ids, kept)
    ce_zero = zeroed_everywhere(host, site, ids, kept)
    ours["ce_zero"] = ce_zero
    ours["ce_loss_recovered"] = (ce_zero - ours["ce_spliced"]) / (ce_zero - ours["ce_clean"])
    for name, value in expected.items():
        agree(same, name, value, ours[name], 1e-5)
    return [rows, as_defined, same]


def filled(blocks: Sequence[TokenBlock], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, kept) of the blocks' sequences [sequences, longest], filled up with a special token that is not kept."""
    from sae_lens.util import get_special_token_ids

    sequences = [pair for block in blocks for pair in zip(block.input_ids, block.loss_mask, strict=True)]
    longest = max(len(ids) for ids, _ in sequences)
    count = -(-len(sequences) // SEQUENCES_AT_ONCE) * SEQUENCES_AT_ONCE
    ids = torch.full((count, longest), sorted(get_special_token_ids(tokenizer))[0])
    kept = torch.zeros(count, longest, dtype=torch.bool)
    for i, (tokens, mask) in enumerate(sequences):
        ids[i, : len(tokens)] = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        kept[i, : len(tokens)] = torch.from_numpy(np.asarray(mask))
    return ids, kept


def on_our_tokens(theirs: Any, model: Any, ids: torch.Tensor, kept: torch.Tensor) -> dict[str, float]:
    """SAELens' per-token CE and KL, over the tokens that raysae scores."""
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.util import get_special_token_ids

    special = get_special_token_ids(model.tokenizer)
    names = {"ce_clean": "ce_loss_without_sae", "ce_spliced": "ce_loss_with_sae", "ce_zero": "ce_loss_with_ablation"}
    names["kl"] = "kl_div_with_sae"
    sums = dict.fromkeys(names, 0.0)
    count = 0
    for batch, keep in zip(ids.split(SEQUENCES_AT_ONCE), kept.split(SEQUENCES_AT_ONCE), strict=True):
        pairs = keep[:, :-1] & keep[:, 1:]
        values = get_recons_loss(theirs, model, ActivationScaler(), batch, True, True, special)
        for name, other in names.items():
            sums[name] += values[other][:, : pairs.shape[1]][pairs].double().sum().item()
        count += int(pairs.sum())
    ce = {name: value / count for name, value in sums.items()}
    recovered = (ce["ce_zero"] - ce["ce_spliced"]) / (ce["ce_zero"] - ce["ce_clean"])
    return {**ce, "ce_loss_recovered": recovered}


def zeroed_everywhere(host: ModelHost, site: str, ids: torch.Tensor, kept: torch.Tensor) -> float:
    """raysae's CE with the site zeroed at every position, special tokens too."""
    total, count = 0.0, 0
    for batch, keep in zip(ids.split(SEQUENCES_AT_ONCE), kept.split(SEQUENCES_AT_ONCE), strict=True):
        pairs = keep[:, :-1] & keep[:, 1:]
        log_p = host.logits(batch, None, {site: edits.zero()})[:, :-1][pairs].log_softmax(-1)
        total -= log_p.gather(1, batch[:, 1:][pairs][:, None]).double().sum().item()
        count += int(pairs.sum())
    return total / count


def agree(
    table: common.Table, name: str, theirs: float, ours: float, tolerance: float | None, by: str = "SAELens"
) -> None:
    shown = f"{name}: {by} {theirs:.5f}, raysae {ours:.5f}; difference"
    table.add(shown, abs(ours - theirs), at_most=tolerance)


if __name__ == "__main__":
    sys.exit(main())
