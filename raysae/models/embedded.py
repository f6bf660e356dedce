"""The embedded default model: a small GPT-2 that learns multi-step arithmetic in two minutes of one core.

It exists so that a first sweep needs no download and still has a model with something to find in it: one that reads a
story, keeps the running number and computes 2-4 steps. It is trained from scratch on `raysae.data.arithmetic`, with one
token per word and per number, and is measured on problems that its training cannot have contained.

The result is an ordinary Hugging Face directory (GPT-2, fast tokenizer, safetensors), hosted like any other model.
Training is a fixed number of steps on problems seen once each, so that the same seed gives the same weights on the same
machine and number of threads. Its tensors are small: threads beyond the free cores make it many times slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raysae.data.arithmetic import TOKEN_PATTERN, ArithmeticProblem, answer_value, generate, vocabulary
from raysae.errors import UserError
from raysae.models.host import ModelFacts

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
N_BLOCKS, D_MODEL, N_HEADS = 4, 64, 4
STEPS, BATCH_SIZE, LEARNING_RATE, N_EVALUATED = 1400, 20, 0.03, 256
N_POSITIONS = 160
"""Longest sequence of the model, in tokens; problems have 85 on average and fewer than 128."""
MAX_ANSWER_TOKENS = 80
"""Where a greedy answer is cut off; solutions have fewer."""
POOL_BATCHES = 100
"""Batches of similar length are cut from pools of so many, so that about 1 % of a batch is padding."""

QUESTION_WEIGHT = 0.3
"""Weight of a question's token in the training loss; an answer's is 1. Names and numbers of a question are random, and
what cannot be predicted should not drive the gradient."""
ADAMW_RATE = 0.13
"""AdamW's learning rate, relative to Muon's."""

Progress = Callable[[int, int, float], None]
"""Called with step, number of steps and the loss in nats per token."""


def train_embedded(
    out_dir: Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    d_model: int = D_MODEL,
    n_layers: int = N_BLOCKS,
    n_heads: int = N_HEADS,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    n_evaluated: int = N_EVALUATED,
) -> dict[str, Any]:
    """Train the embedded model from scratch, measure it on held-out problems and save it to `out_dir`.

    Returns what was measured: `accuracy` (share of held-out problems whose final answer is right, greedy decoding),
    `n_evaluated`, `train_problems`, `tokens` (trained on), `loss` (held-out, nats per token), `seconds` (training) and
    `parameters`. `learning_rate` is Muon's.
    """
    if d_model % n_heads:
        raise UserError(f"d_model must be a multiple of n_heads={n_heads}, got {d_model}")
    held_out = list(generate(n_evaluated, seed, "held_out"))
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = build_model(tokenizer, d_model, n_layers, n_heads)
    started = time.perf_counter()
    _, tokens = train(model, tokenizer, seed, steps, batch_size, learning_rate, progress)
    seconds = time.perf_counter() - started
    facts = {
        "accuracy": answer_accuracy(model, tokenizer, held_out),
        "n_evaluated": n_evaluated,
        "train_problems": steps * batch_size,
        "tokens": tokens,
        "loss": token_loss(model, tokenizer, held_out),
        "seconds": seconds,
        "parameters": model.num_parameters(),
    }
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return facts


def embedded_facts() -> ModelFacts:
    """Sizes of the embedded model, which need not have been trained for it."""
    return ModelFacts(N_BLOCKS, D_MODEL, 4 * D_MODEL, len(build_tokenizer()), N_POSITIONS)


def trial_of_training(out_dir: Path, seed: int, steps: int = 24) -> tuple[float, int]:
    """(seconds, tokens) that `train_embedded` would take, from a few of its steps and one batch of answers; the model as
    it is before training goes to `out_dir`."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer, D_MODEL, N_BLOCKS, N_HEADS)
        model.save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)
        marks: list[float] = []
        _, tokens = train(
            model, tokenizer, seed, steps, BATCH_SIZE, LEARNING_RATE, lambda *_: marks.append(time.perf_counter())
        )
    per_step = median(after - before for before, after in pairwise(marks))  # the first steps, and hiccups, do not count
    start = time.perf_counter()
    answer_accuracy(model, tokenizer, list(generate(N_EVALUATED, seed, "held_out")))
    return per_step * STEPS + time.perf_counter() - start, round(tokens / steps * STEPS)


def train(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    progress: Progress | None = None,
) -> tuple[list[float], int]:
    """Train `model` in place on `steps * batch_size` distinct training problems; the loss of each step, and all tokens.

    Muon for the blocks' matrices, AdamW for embeddings and vectors: AdamW alone needs nearly twice the tokens. The
    learning rate is constant, then falls linearly to zero. float32: at this size bfloat16 autocast gains nothing on a core.
    """
    optimizers = _optimizers(model, learning_rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps)) for optimizer in optimizers]
    newline = tokenizer.convert_tokens_to_ids("\n")
    model.train()
    losses: list[float] = []
    tokens = 0
    for step, ids in enumerate(_batches(tokenizer, seed, steps, batch_size), 1):
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits  # [batch, position, word]
        targets = _targets(ids, tokenizer.eos_token_id)
        in_answer = (ids[:, :-1] == newline).cumsum(1) > 0
        weights = torch.where(in_answer, 1.0, QUESTION_WEIGHT) * (targets >= 0)
        loss = (_cross_entropy(logits, targets) * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        tokens += int((targets >= 0).sum())
        if progress:
            progress(step, steps, losses[-1])
    model.eval()
    return losses, tokens


@torch.inference_mode()
def answer_accuracy(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[ArithmeticProblem],
    batch_size: int = 256,
) -> float:
    """Share of `problems` whose final answer the model writes, decoding greedily from `<|endoftext|>question\\n`."""
    model.eval()
    ordered = sorted(problems, key=lambda problem: len(problem.question))  # similar lengths: little padding
    correct = 0
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        prompts = [f"{tokenizer.bos_token}{problem.question}\n" for problem in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        written = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(answer_value(answer) == problem.value for answer, problem in zip(answers, batch, strict=True))
    return correct / len(problems)


@torch.inference_mode()
def token_loss(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[ArithmeticProblem]
) -> float:
    """Mean cross-entropy of question and answer tokens, in nats per token, every token counted alike."""
    ids = _pad(tokenizer, _rows(tokenizer, problems))
    targets = _targets(ids, tokenizer.eos_token_id)
    total = _cross_entropy(model(ids, attention_mask=torch.ones_like(ids)).logits, targets).double().sum()
    return (total / (targets >= 0).sum()).item()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, number 0..99 and sign of the generator's closed vocabulary.

    Spaces are no tokens; decoding puts them back, exactly for the generator's own texts.
    """
    words = [END_OF_TEXT, UNKNOWN, *vocabulary()]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="removed", invert=True)
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\0", cleanup=False),  # a space before every token but the first
            decoders.Fuse(),
            decoders.Replace(Regex(r" (?=[.,?\n>+*/=-])|(?<=[\n+*/=>-]) | (?=[0-9]+>>)|(?<=<<) "), ""),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        model_max_length=N_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, d_model: int, n_layers: int, n_heads: int) -> GPT2LMHeadModel:
    """An untrained GPT-2 for `tokenizer`, without dropout, initialised from torch's global generator."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=N_POSITIONS,
            n_embd=d_model,
            n_layer=n_layers,
            n_head=n_heads,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )


def _optimizers(model: GPT2LMHeadModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if not (".h." in name and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(others, lr=learning_rate * ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _schedule(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: up for 5 % of the steps, constant, and down to zero over the last 70 %."""
    return lambda step: min(1.0, (step + 1) / (0.05 * steps), (1 - step / steps) / 0.7)


def _batches(tokenizer: PreTrainedTokenizerBase, seed: int, steps: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield `steps` batches of training problems of similar length, int64 [batch_size, longest]."""
    problems = generate(steps * batch_size, seed, "train")
    generator = torch.Generator().manual_seed(seed)
    while pool := list(islice(problems, POOL_BATCHES * batch_size)):
        rows = sorted(_rows(tokenizer, pool), key=len)
        for index in torch.randperm(len(rows) // batch_size, generator=generator).tolist():
            yield _pad(tokenizer, rows[index * batch_size : (index + 1) * batch_size])


def _rows(tokenizer: PreTrainedTokenizerBase, problems: Sequence[ArithmeticProblem]) -> list[list[int]]:
    """Token ids of each problem between two ends of text."""
    ids: list[list[int]] = tokenizer(
        [f"{tokenizer.bos_token}{problem.text}{tokenizer.eos_token}" for problem in problems]
    )["input_ids"]
    return ids


def _pad(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> torch.Tensor:
    """Rows padded on the right, int64 [rows, longest]."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=tokenizer.pad_token_id
    )


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of each next token, [batch, position - 1]; 0 where there is none."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _targets(ids: torch.Tensor, end_id: int) -> torch.Tensor:
    """The next token of each position, [batch, position - 1]; -100 after the first end of text, which is padding."""
    targets = ids[:, 1:]
    ended_before = (targets == end_id).cumsum(1) > 1
    return targets.masked_fill(ended_before, -100)
