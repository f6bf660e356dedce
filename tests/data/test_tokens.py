"""Every token is accounted for once, in its own split, with its own step; padding never becomes a row."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AddedToken, AutoTokenizer

from raysae.data.records import make_problem, render
from raysae.data.sources import load_problems
from raysae.data.splits import SPLITS, assign_splits
from raysae.data.tokens import micro_batches, read_block, token_steps, tokenize
from raysae.errors import UserError

TOKENIZERS = ["gsm-nano", "stories260K/hf", "gpt2_tokenizer/hf"]
WEIRD = "Zoë pays 5 € for 😀😀 and 中文.\n"


@pytest.fixture(scope="session")
def tokenizers(shared):
    return {name: AutoTokenizer.from_pretrained(shared / "models" / name) for name in TOKENIZERS}


@pytest.fixture(scope="module")
def problems(shared):
    chosen = load_problems("gsm8k", str(shared / "data/gsm8k/train.jsonl"), examples=240)
    awkward = [
        make_problem(
            f"odd/{i}", "odd", f"{WEIRD}  Number {i}?", answer=f"é {i} = <<{i}={i}>>{i} 😀\n\n 中 two\n#### {i}"
        )
        for i in range(60)
    ]
    return assign_splits([*chosen, *awkward], 0.2, 0.2, None, seed=0)


def blocks_of(manifest, folder):
    return [read_block(folder / block["file"]) for block in manifest["blocks"]]


def expected_tokens(problem, tokenizer):
    ids = tokenizer(render(problem)[0], add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("packing", ["problems", "concat"])
def test_every_token_is_kept_once_in_its_split_and_step(tokenizers, problems, name, packing, tmp_path):
    tokenizer, context = tokenizers[name], 200
    manifest = tokenize(problems, tokenizer, context, packing, 4096, 0, tmp_path)
    by_id = {p.example_id: p for p in problems}
    tokens, steps, sequence_ids, cut_starts = {}, {}, [], 0
    for entry, block in zip(manifest["blocks"], blocks_of(manifest, tmp_path), strict=True):
        assert (block.name, block.split) == (entry["name"], entry["split"])
        assert len(block.sequence_id) == entry["sequences"]
        assert sum(map(len, block.input_ids)) == entry["tokens"]
        assert sum(int(mask.sum()) for mask in block.loss_mask) == entry["rows"] <= 4096
        sequence_ids.extend(block.sequence_id.tolist())
        for row, ids in enumerate(block.input_ids):
            assert 0 < len(ids) <= context
            assert packing == "concat" or len(set(block.example[row].tolist())) == 1
            for at, token in enumerate(ids.tolist()):
                example_id = block.example_ids[block.example[row][at]]
                assert by_id[example_id].split == block.split
                assert by_id[example_id].group == block.groups[block.example[row][at]]
                key = (example_id, int(block.positions[row][at]))
                assert key not in tokens
                tokens[key], steps[key] = token, int(block.step[row][at])
                assert block.loss_mask[row][at] == (token != tokenizer.bos_token_id and at > 0)
                cut_starts += at == 0 and token != tokenizer.bos_token_id

    assert sorted(sequence_ids) == list(range(len(sequence_ids)))
    dropped, largest = 0, []
    for problem in problems:
        ids = expected_tokens(problem, tokenizer)
        largest.append(max(ids))
        if packing == "problems" and len(ids) > context:
            dropped += 1
            continue
        assert [tokens.pop((problem.example_id, position)) for position in range(len(ids))] == ids
        text, spans = render(problem)
        for step, start, end in spans[1:]:
            mine = [token for place, token in enumerate(ids) if steps[problem.example_id, place] == step]
            assert tokenizer.decode(mine, clean_up_tokenization_spaces=False).strip() == text[start:end].strip()
        assert steps[problem.example_id, 0] == steps[problem.example_id, 1] == -1
    assert not tokens
    assert manifest["dropped_too_long"] == dropped and (packing == "concat" or dropped > 0)
    assert manifest["cut_starts"] == cut_starts and (cut_starts > 0) == (packing == "concat")
    assert manifest["largest_id"] == max(largest)
    assert sum(manifest["rows"].values()) == sum(block["rows"] for block in manifest["blocks"])


@pytest.mark.parametrize("packing", ["problems", "concat"])
def test_spans_are_the_steps_of_the_blocks(tokenizers, problems, packing, tmp_path):
    manifest = tokenize(problems, tokenizers["gsm-nano"], 200, packing, 4096, 0, tmp_path)
    from_blocks = set()
    for block in blocks_of(manifest, tmp_path):
        for row, sequence in enumerate(block.sequence_id):
            for at, (example, step) in enumerate(zip(block.example[row], block.step[row], strict=True)):
                if step >= 0:
                    from_blocks.add((int(sequence), at, block.example_ids[example], int(step)))
    from_spans = []
    for span in pq.read_table(tmp_path / "spans.parquet").to_pylist():
        for at in range(span["start"], span["end"]):
            from_spans.append((span["sequence_id"], at, span["example_id"], span["step"]))
    assert len(from_spans) == len(from_blocks) and set(from_spans) == from_blocks


def test_steps_follow_the_first_solid_character():
    text = "q\n ab\n#### 1"
    offsets = np.array([(0, 1), (1, 4), (4, 6), (6, 10), (10, 11), (11, 12), (12, 12)])
    spans = [(-1, 0, 1), (0, 2, 5), (1, 6, 12)]
    # "\n a" takes the step of "a", "b\n" that of "b"; the lone space lies in the answer line, an empty token nowhere.
    assert token_steps(text, spans, offsets).tolist() == [-1, 0, 0, 1, 1, 1, -1]


def test_same_seed_same_files_other_seed_other_order(tokenizers, problems, tmp_path):
    tokenizer = tokenizers["gsm-nano"]
    manifests = [
        tokenize(problems, tokenizer, 200, "problems", 4096, seed, tmp_path / name)
        for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    ]
    assert manifests[0] == manifests[1]
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert manifests[2]["rows"] == manifests[0]["rows"]
    first, other = (
        [
            block.example_ids[example[0]]
            for block in blocks_of(manifests[at], tmp_path / name)
            for example in block.example
        ]
        for at, name in [(0, "a"), (2, "c")]
    )
    assert first != other and sorted(first) == sorted(other)
    assert first != [p.example_id for split in SPLITS for p in problems if p.split == split]


def test_a_block_reads_the_same_from_its_bytes(tokenizers, problems, tmp_path):
    manifest = tokenize(problems, tokenizers["gpt2_tokenizer/hf"], 64, "concat", 2048, 0, tmp_path)
    path = tmp_path / manifest["blocks"][1]["file"]
    a, b = read_block(path), read_block(path.read_bytes())
    assert a.name == b.name == manifest["blocks"][1]["name"]
    assert a.example_ids == b.example_ids and a.groups == b.groups
    assert all(np.array_equal(x, y) for x, y in zip(a.example, b.example, strict=True))
    assert read_block(path, name="other").name == "other"
    assert [a.input_ids[0].dtype, a.positions[0].dtype, a.step[0].dtype, a.loss_mask[0].dtype, a.example[0].dtype] == [
        np.int64,
        np.int32,
        np.int16,
        np.bool_,
        np.int32,
    ]


@pytest.mark.parametrize("budget", [1, 150, 1000, 10**6])
def test_micro_batches_hold_each_sequence_once_and_never_mask_padding_in(tokenizers, problems, budget, tmp_path):
    manifest = tokenize(problems, tokenizers["gsm-nano"], 200, "problems", 4096, 0, tmp_path)
    block = read_block(tmp_path / manifest["blocks"][0]["file"])
    seen = []
    for batch in micro_batches(block, budget):
        b, width = batch.input_ids.shape
        assert b * width <= budget or b == 1
        assert batch.attention_mask.shape == batch.mask.shape == (b, width) and batch.mask.dtype == torch.bool
        for row, index in enumerate(batch.index):
            length = len(block.input_ids[index])
            assert batch.input_ids[row, :length].tolist() == block.input_ids[index].tolist()
            assert batch.attention_mask[row].tolist() == [1] * length + [0] * (width - length)
            assert batch.mask[row, :length].tolist() == block.loss_mask[index].tolist()
            assert not batch.mask[row, length:].any()
        seen.extend(batch.index.tolist())
    assert sorted(seen) == list(range(len(block.input_ids)))


def test_a_special_token_written_in_a_text_is_no_row(tokenizers, tmp_path):
    tokenizer = tokenizers["gpt2_tokenizer/hf"]
    texts = [make_problem(f"t/{i}", "t", f"before {i} <|endoftext|> after") for i in range(9)]
    manifest = tokenize(assign_splits(texts, 0.3, 0.3, None, 0), tokenizer, 32, "problems", 10**6, 0, tmp_path)
    for block in blocks_of(manifest, tmp_path):
        for ids, mask in zip(block.input_ids, block.loss_mask, strict=True):
            assert (ids == tokenizer.eos_token_id).sum() == 2
            assert np.array_equal(mask, ids != tokenizer.eos_token_id)


def test_control_tokens_of_a_chat_template_are_no_rows(tokenizers, tmp_path):
    """tokenizer.json marks them special, but they have no role of their own, so `all_special_ids` does not list them."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["gpt2_tokenizer/hf"].name_or_path)
    control = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    numbers = tokenizer.convert_tokens_to_ids(control)
    assert not {*numbers} & {*tokenizer.all_special_ids}
    chat = "<|start_header_id|>user<|end_header_id|>\n\n<think>Number {} of them?<|eot_id|>"
    texts = [make_problem(f"t/{i}", "t", chat.format(i)) for i in range(9)]
    manifest = tokenize(assign_splits(texts, 0.3, 0.3, None, 0), tokenizer, 32, "problems", 10**6, 0, tmp_path)
    rows = np.concatenate(
        [ids[mask] for b in blocks_of(manifest, tmp_path) for ids, mask in zip(b.input_ids, b.loss_mask, strict=True)]
    )
    assert not np.isin(rows, numbers).any()
    assert (rows == tokenizer.convert_tokens_to_ids("<think>")).sum() == 9, "an added token that is text stays a row"


@pytest.mark.parametrize("packing", ["problems", "concat"])
def test_a_tokenizer_without_a_separator_gives_no_row_for_the_first_token(tokenizers, problems, packing, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["gsm-nano"].name_or_path)
    tokenizer.bos_token = tokenizer.eos_token = None
    manifest = tokenize(problems, tokenizer, 200, packing, 4096, 0, tmp_path)
    assert manifest["separator_id"] is None
    masks = [mask for block in blocks_of(manifest, tmp_path) for mask in block.loss_mask]
    assert not any(mask[0] for mask in masks) and all(mask[1:].all() for mask in masks)


def test_a_held_out_dataset_is_of_one_split(tokenizers, problems, tmp_path):
    held_out = [p for p in problems if p.split == "test"]
    manifest = tokenize(held_out, tokenizers["gsm-nano"], 512, "problems", 4096, 0, tmp_path)
    assert {block["split"] for block in manifest["blocks"]} == {"test"} == {*manifest["rows"]}
    both = tokenize(problems, tokenizers["gsm-nano"], 512, "problems", 4096, 0, tmp_path / "all")
    assert manifest["rows"]["test"] == both["rows"]["test"] > 0


def test_a_context_that_fits_nothing_and_a_slow_tokenizer_are_named(tokenizers, problems, tmp_path):
    with pytest.raises(UserError, match=r"data.context_length: 8 leaves no example in the train split; .* has \d+ tok"):
        tokenize(problems, tokenizers["gsm-nano"], 8, "problems", 4096, 0, tmp_path)

    class Slow:
        is_fast, name_or_path = False, "slow"

    with pytest.raises(UserError, match=r"model.tokenizer: 'slow'"):
        tokenize(problems, Slow(), 8, "problems", 4096, 0, tmp_path)
