"""Capture throughput against the bare forward pass that stops at the same block, without Ray and through it.

    python benchmarks/capture.py [--models gpt2,stories] [--repeats 7] [--json FILE]

Two models: `gpt2`, a randomly initialised 12-layer d_model 768 GPT-2 on arithmetic problems (site blocks.6.resid_post),
and `stories`, the 5-layer d_model 64 model of the test data on TinyStories (blocks.2.resid_post). Every block has the
same number of tokens.

What is counted:

- bare: `ModelHost.read` of the block's micro-batches, and nothing else. The micro-batches are made beforehand.
- plain: `capture_block`: micro-batches, forward, bf16 rows in their places, finite check, moments, Parquet columns,
  safetensors, sha256, renames. Bare and plain alternate in this process.
- Ray: the real path, `hosts.map_blocks`, with its pool of one actor. Blocks alternate between capture and bare forward
  (the same process, threads and neighbours), and a captured block is charged from the end of the block before it to its
  own end. So Ray's scheduling, reading of tokens, hand-over of results and the note of the attempt are all in it; the
  actor's start and the first blocks are not.

Beside speed: captured rows equal `output_hidden_states` of a plain transformers forward, bit for bit after rounding to
bf16; logits are the same after reading as without hooks; peak memory of the actor.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from raysae.activations.capture import CaptureSettings, capture_block
from raysae.data.sources import load_problems
from raysae.data.splits import assign_splits
from raysae.data.tokens import TokenBlock, micro_batches, read_block, tokenize
from raysae.models.embedded import build_tokenizer
from raysae.models.host import ModelHost, load_tokenizer
from raysae.on_ray.hosts import map_blocks
from raysae.placement import place_hosts

WARM_UP = 2
"""Pairs of blocks that an actor does before any counts."""


@dataclass(frozen=True)
class Case:
    """A model with tokens to run it on."""

    name: str
    model: str
    blocks: list[dict[str, Any]]
    tokens: Path
    settings: CaptureSettings
    target: float


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument("--models", default="gpt2,stories", help="which of gpt2 and stories (default both)")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    tables = []
    with tempfile.TemporaryDirectory() as directory, common.local_ray(common.cores()):
        for name in args.models.split(","):
            root = Path(directory) / name
            root.mkdir()
            case = {"gpt2": gpt2, "stories": stories}[name](root)
            tables.append(measure(case, root, max(args.repeats, 5)))
    return common.finish(tables, args.json, load)


def gpt2(root: Path) -> Case:
    """The forward pass stops before the vocabulary is used, so a small one stands for GPT-2's 50,257."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer))).save_pretrained(root / "model")
    problems = load_problems("arithmetic", examples=400)
    blocks, tokens = _tokens(root, problems, tokenizer, context_length=128, rows=2048)
    settings = CaptureSettings(("blocks.6.resid_post",), "bfloat16", 16_384, 0)
    return Case("gpt2", str(root / "model"), blocks, tokens, settings, target=0.9)


def stories(root: Path) -> Case:
    shared = Path(os.environ.get("RAYSAE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
    model = shared / "models" / "stories260K" / "hf"
    text = shared / "data" / "tinystories_text" / "tiny_stories.txt"
    problems = load_problems("text", str(text), text_separator=r"(?<!\n)\n(?!\n)", text_replace=("\n\n", "\n"))
    blocks, tokens = _tokens(root, problems, load_tokenizer(str(model)), context_length=256, rows=65_536)
    settings = CaptureSettings(("blocks.2.resid_post",), "bfloat16", 16_384, 0)
    return Case("stories260K", str(model), blocks, tokens, settings, target=0.6)


def _tokens(root: Path, problems: list, tokenizer: Any, context_length: int, rows: int) -> tuple[list, Path]:
    """Training blocks of `rows` tokens, all of one size: the last, shorter one is left out."""
    split = assign_splits(problems, 0.1, 0.1, None, 0)
    made = tokenize(split, tokenizer, context_length, "concat", rows, 0, root / "tokens")
    return [b for b in made["blocks"] if b["split"] == "train" and b["rows"] > 0.9 * rows], root / "tokens"


def measure(case: Case, root: Path, repeats: int) -> common.Table:
    host = ModelHost.load(case.model)
    block = read_block(case.tokens / case.blocks[0]["file"])
    batches = list(micro_batches(block, case.settings.tokens_per_forward))
    tokens = sum(int(mask.sum()) for mask in block.loss_mask)
    facts = f"{tokens} tokens a block, {len(batches)} forward passes"
    table = common.Table.titled(f"capture of {case.name} at {case.settings.sites[0]}, {facts}")

    for name, value in check(case, host, block, root / "check").items():
        table.add(name, value)

    def bare() -> None:
        for batch in batches:
            host.read(batch.input_ids, batch.attention_mask, case.settings.sites)

    works = {"bare": bare, "plain": lambda: capture_block(host, block, root / "plain", case.settings)}
    common.alternate(works, 1)
    plain = common.alternate(works, repeats)
    ray, peak = through_ray(case, root / "ray", repeats)

    table.add("bare forward, tokens/s", common.spread([tokens / s for s in plain["bare"]]))
    table.add("capture_block, tokens/s", common.spread([tokens / s for s in plain["plain"]]))
    table.add("capture_block / bare", common.ratios(plain["bare"], plain["plain"]), at_least=case.target)
    over = common.ratios(plain["plain"], plain["bare"])
    table.add("capture_block's overhead, %", (over.median - 1) * 100)
    table.add("in the actor: bare forward, tokens/s", common.spread(ray["bare"]))
    table.add("in the actor: capture and Ray, tokens/s", common.spread(ray["capture"]))
    table.add("in the actor: Ray between blocks, ms", common.spread(ray["between"]))
    table.add("capture with Ray / bare", common.ratios(ray["capture"], ray["bare"]), at_least=case.target)
    table.add("peak memory of the actor, MB", peak)
    return table


def check(case: Case, host: ModelHost, block: TokenBlock, root: Path) -> dict[str, bool]:
    """Whether the captured rows are those of a plain forward pass with `output_hidden_states`, and logits unchanged."""
    import pyarrow.parquet as pq
    from safetensors.torch import load_file

    site = case.settings.sites[0]
    capture_block(host, block, root, case.settings)
    x = load_file(root / site / f"{block.name}.safetensors")["x"]
    columns = pq.read_table(root / "rows" / f"{block.name}.parquet").to_pydict()
    row_of = {key: row for row, key in enumerate(zip(columns["example_id"], columns["position"], strict=True))}
    model = AutoModelForCausalLM.from_pretrained(case.model).eval()
    equal, seen = True, 0
    with torch.inference_mode():
        for batch in micro_batches(block, case.settings.tokens_per_forward):
            out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
            hidden = out.hidden_states[int(site.split(".")[1]) + 1][batch.mask].bfloat16()
            keys = [
                (block.example_ids[example], position)
                for i in batch.index
                for example, position, keep in zip(
                    block.example[i], block.positions[i], block.loss_mask[i], strict=True
                )
                if keep
            ]
            equal &= torch.equal(x[[row_of[key] for key in keys]], hidden)
            seen += len(keys)
        few = batch.input_ids[:2], batch.attention_mask[:2]
        same_logits = torch.equal(host.logits(*few), model(input_ids=few[0], attention_mask=few[1]).logits)
    return {
        "rows equal hidden_states": equal,
        "every kept token is a row": seen == len(x) == len(row_of),
        "logits unchanged": same_logits,
    }


def through_ray(case: Case, root: Path, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Tokens/s of bare and captured blocks in the pool's actor, milliseconds between blocks, and peak memory in MB."""
    root.mkdir()
    blocks, tokens = _copies(case, 2 * (repeats + WARM_UP), root / "tokens")
    work = Alternating(root, case.settings)
    placement = replace(place_hosts(common.cores(), 0, 1, len(blocks)), threads=torch.get_num_threads())
    model = {"name": case.model, "revision": None, "dtype": "float32", "trust_remote_code": False}
    map_blocks(f"{case.name} through Ray", blocks, tokens, model, work, placement, max_restarts=0)
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    before, events = events[2 * WARM_UP - 1], events[2 * WARM_UP :]
    found: dict[str, list[float]] = {"bare": [], "capture": [], "between": []}
    for event in events:
        since = before["end"] if event["kind"] == "capture" else event["start"]
        found[event["kind"]].append(event["rows"] / (event["end"] - since))
        found["between"].append((event["start"] - before["end"]) * 1e3)
        before = event
    return found, events[-1]["peak_mb"]


def _copies(case: Case, count: int, folder: Path) -> tuple[list[dict[str, Any]], Path]:
    """`count` blocks, the case's linked as often as it takes under names of their own."""
    folder.mkdir()
    made = []
    for i in range(count):
        block = case.blocks[i % len(case.blocks)]
        file = f"train-{i:05d}.parquet"
        os.link(case.tokens / block["file"], folder / file)
        made.append({**block, "file": file, "name": f"train-{i:05d}-{i:08x}"})
    return made, folder


class Alternating:
    """Work for the pool: bare forward and capture in turns, each with its times in `events.jsonl`."""

    def __init__(self, root: Path, settings: CaptureSettings) -> None:
        self.root, self.settings, self.calls = root, settings, 0

    def __call__(self, host: ModelHost, block: TokenBlock) -> Mapping[str, Any]:
        kind = "bare" if self.calls % 2 == 0 else "capture"
        self.calls += 1
        rows = sum(int(mask.sum()) for mask in block.loss_mask)
        batches = list(micro_batches(block, self.settings.tokens_per_forward)) if kind == "bare" else []
        start = time.monotonic()
        for batch in batches:
            host.read(batch.input_ids, batch.attention_mask, self.settings.sites)
        if kind == "capture":
            capture_block(host, block, self.root, self.settings)
        end = time.monotonic()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with (self.root / "events.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, "rows": rows, "start": start, "end": end, "peak_mb": peak}) + "\n")
        return {"rows": rows}


if __name__ == "__main__":
    sys.exit(main())
