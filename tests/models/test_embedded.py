"""The embedded model: its tokenizer loses nothing, its training is reproducible, and it solves unseen problems."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysae.data.arithmetic import generate, vocabulary
from raysae.errors import UserError
from raysae.models.embedded import answer_accuracy, build_model, build_tokenizer, train, train_embedded


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    """More threads than free cores would make such small models many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_tokenizer_round_trip_and_offsets(tokenizer):
    for problem in generate(1000, seed=5):
        encoded = tokenizer(problem.text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == problem.text
        covered = "".join(problem.text[start:end] for start, end in offsets)
        assert covered == problem.text.replace(" ", "")
        assert [problem.text[start:end] for start, end in offsets] == tokenizer.convert_ids_to_tokens(ids)


def test_numbers_and_specials_are_single_tokens(tokenizer):
    assert len(tokenizer) == len(vocabulary()) + 2
    assert all(len(tokenizer(str(number))["input_ids"]) == 1 for number in range(100))
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.bos_token_id]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id != tokenizer.unk_token_id
    assert tokenizer("zebra 100")["input_ids"] == [tokenizer.unk_token_id] * 2


def _short_training(tokenizer, seed=0):
    torch.manual_seed(seed)
    model = build_model(tokenizer, d_model=32, n_layers=2, n_heads=2)
    losses, tokens = train(model, tokenizer, seed=seed, steps=20, batch_size=8, learning_rate=0.02)
    return model, losses, tokens


def test_loss_falls_and_training_is_reproducible(tokenizer):
    model, losses, tokens = _short_training(tokenizer)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert tokens > 20 * 8 * 40
    again, losses_again, _ = _short_training(tokenizer)
    assert losses == losses_again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_saved_model_loads_as_any_other(tmp_path):
    facts = train_embedded(tmp_path, d_model=16, n_layers=1, n_heads=2, steps=2, batch_size=4, n_evaluated=4)
    assert 0 <= facts["accuracy"] <= 1 and facts["n_evaluated"] == 4 and facts["train_problems"] == 8
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    problem = next(generate(1, seed=0))
    ids = tokenizer(problem.text, return_tensors="pt", return_offsets_mapping=True)
    assert tokenizer.decode(ids["input_ids"][0]) == problem.text
    assert model(input_ids=ids["input_ids"]).logits.shape == (1, ids["input_ids"].shape[1], len(tokenizer))
    assert list(tmp_path.glob("*.safetensors"))


def test_progress_is_called_for_every_step(tmp_path):
    calls = []
    train_embedded(
        tmp_path,
        progress=lambda *call: calls.append(call),
        d_model=16,
        n_layers=1,
        n_heads=2,
        steps=3,
        batch_size=4,
        n_evaluated=2,
    )
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]


def test_accuracy_does_not_depend_on_the_batch(tokenizer, monkeypatch):
    """Left padding must change no answer: each problem gets the same text alone and in a batch."""
    model, *_ = _short_training(tokenizer)
    problems = list(generate(6, seed=9))
    written = {}
    decode = tokenizer.batch_decode

    def keep(sequences, **kwargs):
        texts = decode(sequences, **kwargs)
        written.setdefault(len(sequences), []).extend(texts)
        return texts

    monkeypatch.setattr(tokenizer, "batch_decode", keep)
    answer_accuracy(model, tokenizer, problems, batch_size=6)
    answer_accuracy(model, tokenizer, problems, batch_size=1)
    assert written[6] == written[1]


def test_heads_must_divide_the_model(tmp_path):
    with pytest.raises(UserError, match="d_model must be a multiple of n_heads"):
        train_embedded(tmp_path, d_model=10, n_heads=4)


@pytest.mark.slow
def test_the_default_model_solves_held_out_problems(tmp_path):
    facts = train_embedded(tmp_path)
    assert facts["n_evaluated"] >= 200
    assert facts["accuracy"] >= 0.9
