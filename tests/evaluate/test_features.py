"""Features: rows found again in their text, streamed statistics against plain ones, purity against what chance gives."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_store
from sklearn.metrics.pairwise import cosine_similarity

from raysae.data.arithmetic import generate
from raysae.data.records import make_problem
from raysae.data.tokens import read_block, tokenize
from raysae.errors import UserError
from raysae.evaluate import features, purity, scan
from raysae.evaluate.contexts import Texts, pieces_of
from raysae.evaluate.statistics import Bootstrap
from raysae.models.embedded import build_tokenizer
from raysae.models.host import load_tokenizer
from raysae.sae.architectures import SAEConfig
from raysae.sae.sae import SAE

SITE, D = "blocks.0.resid_post", 6
DRAWS = Bootstrap(50, 0.95, 0)
SETTINGS = scan.Settings(DRAWS, contexts=4, reach=3, bins=8, silhouette_rows=300, null_latents=4)


class World:
    """Problems, their tokens, and a store whose activations are its latents: f = max(x, 0), latent 0 being one token's."""

    def __init__(self, folder: Path, packing: str = "problems", architecture: str = "relu") -> None:
        made = generate(60, 0, "train")
        self.problems = [
            make_problem(f"p/{i}", "toy", p.question, answer=p.answer) for i, p in enumerate(made)
        ]  # fmt: skip
        for i, problem in enumerate(self.problems):
            object.__setattr__(problem, "split", ("train", "validation", "validation", "test")[i % 4])
        tokenizer = build_tokenizer()
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        manifest = tokenize(self.problems, tokenizer, 160, packing, 900, 0, folder / "tokens")
        rng = np.random.default_rng(0)
        shards, columns, self.files, tables = [], {}, {}, []
        marked = tokenizer.convert_tokens_to_ids(".")
        for number, entry in enumerate(manifest["blocks"]):
            block = read_block(folder / "tokens" / entry["file"])
            rows = pd.DataFrame(
                {
                    "example_id": np.array(block.example_ids)[np.concatenate(block.example)],
                    "position": np.concatenate(block.positions),
                    "token_id": np.concatenate(block.input_ids),
                    "step": np.concatenate(block.step),
                    "kept": np.concatenate(block.loss_mask),
                }
            )
            rows = rows[rows["kept"]].sample(frac=1, random_state=number, ignore_index=True)
            x = rng.normal(size=(len(rows), D)).astype(np.float32) - 1.0
            x[:, 0] = np.where(rows["token_id"] == marked, 2 + rng.uniform(size=len(rows)), 0)
            x[:, 5] = -1  # latent 5 is dead
            shards.append((entry["split"], torch.from_numpy(x)))
            columns[number] = {name: rows[name].tolist() for name in ("example_id", "position", "token_id", "step")}
            self.files[f"{entry['split']}-{number:05d}-{number:08x}"] = folder / "tokens" / entry["file"]
            if entry["split"] == "validation":
                tables.append(rows.assign(**{f"x{i}": x[:, i] for i in range(D)}))
        self.store = tiny_store(folder / "store", shards, SITE, columns)
        self.rows = pd.concat(tables, ignore_index=True)
        knob = {"k": D} if architecture == "abstopk" else {"l1_coefficient": 0.1}
        eye, zero = torch.eye(D), torch.zeros(D)
        self.sae = SAE(
            SAEConfig(architecture, D, D, **knob), {"W_enc": eye, "b_enc": zero, "W_dec": eye, "b_dec": zero}
        )

    def measure(self, settings: scan.Settings = SETTINGS, **changes) -> features.Features:
        given = {"sae": self.sae, "files": self.files, "problems": self.problems} | changes
        corpus = features.Corpus(self.store, SITE, given["files"], self.decode, given["problems"])
        return features.measure(given["sae"], corpus, "validation", settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def found(world) -> tuple[pd.DataFrame, dict, list[dict]]:
    table, summary, cards = world.measure()
    return table, summary, list(cards)


# ----------------------------------------------------------------------------------------------------------------------
# Texts


def test_pieces_of_a_byte_level_tokenizer_are_whole_characters_and_make_the_text(shared):
    tokenizer = load_tokenizer(str(shared / "models" / "gpt2_tokenizer" / "hf"), None, False)
    text = "Tom's naïve 😀 café costs £3—日本語 ok. " * 9  # longer than one run of pieces
    ids = tokenizer(text)["input_ids"]
    backend = tokenizer.backend_tokenizer

    def decode(some):
        return backend.decode(some, skip_special_tokens=False)

    pieces = pieces_of(ids, decode)
    assert all(decode(ids[:i]).startswith("".join(pieces[:i])) for i in range(len(ids))), "no token tells of the next"
    assert len(pieces) == len(ids) > 64 and "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum("😀" in piece for piece in pieces) == 9 and pieces.count("") > 9, (
        "tokens within a character have no piece"
    )


@pytest.mark.parametrize("packing", ["problems", "concat"])
def test_rows_are_found_in_their_text_and_windows_do_not_leave_it(tmp_path, packing):
    world = World(tmp_path, packing)
    texts = Texts(world.store, world.store.names("validation"), world.files)
    every = np.arange(len(world.rows))
    token = texts.token_of_row[every]
    assert np.array_equal(texts.ids[token], world.rows["token_id"])
    assert np.array_equal(texts.position[token], world.rows["position"])
    assert [texts.example_ids[i] for i in texts.example[token]] == world.rows["example_id"].tolist()
    first, last = texts.window(every, 3)
    assert ((first <= token) & (token < last) & (last - first <= 7)).all() and (last - first == 7).any()
    for a, b, t in zip(first, last, token, strict=True):
        assert (texts.example[a:b] == texts.example[t]).all()
        assert np.array_equal(texts.position[a:b], texts.position[t] + np.arange(a - t, b - t)), "consecutive tokens"
    if packing == "concat":
        assert ((first > token - 3) & (first > 0)).any(), "some window stops at another example"


def test_tokens_of_another_store_are_refused(world):
    names = world.store.names("validation")
    swapped = dict(zip(names, [world.files[name] for name in reversed(names)], strict=True))
    with pytest.raises(UserError, match="capture again"):
        world.measure(files=swapped)


# ----------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.parametrize("distinct", [True, False])
def test_the_best_rows_are_those_of_a_sort_however_the_stream_is_cut(distinct):
    rng = np.random.default_rng(1)
    entries = pd.DataFrame(
        {
            "latent": rng.integers(0, 5, 900),
            "row": np.sort(rng.choice(5000, 900, replace=False)),
            "score": rng.integers(1, 30, 900) / 4.0,  # with ties
            "example": rng.integers(0, 12, 900),
        }
    )
    ordered = entries.sort_values(["latent", "score", "row"], ascending=[True, False, True])
    if distinct:
        ordered = ordered.drop_duplicates(["latent", "example"])
    expected = [part["row"].head(7).tolist() for _, part in ordered.groupby("latent")]
    for cut in (900, 100, 7):
        best = scan.TopRows(5, 7, distinct)
        for start in range(0, 900, cut):
            part = entries.iloc[start : start + cut]
            best.add(*(part[name].to_numpy() for name in ("latent", "row", "score", "example")))
        assert best.row.tolist() == expected


def test_densities_and_histograms_are_those_of_a_plain_count(world, found):
    table, summary, cards = found
    f = np.maximum(world.rows[[f"x{i}" for i in range(D)]].to_numpy(), 0)
    assert summary["rows"] == len(f)
    assert np.allclose(table["density"], (f > 0).mean(0))
    assert table["dead"].tolist() == [False] * 5 + [True] and summary["dead"] == 1
    assert (
        table["dense"].tolist() == ((f > 0).mean(0) > 0.1).tolist()
        and table["dense"].any()
        and not table["dense"].all()
    )
    for i in range(5):
        on = f[f[:, i] > 0, i]
        assert table.at[i, "max"] == pytest.approx(on.max()) and table.at[i, "mean"] == pytest.approx(on.mean())
        assert cards[i]["histogram"] == np.histogram(on, 8, (0, on.max()))[0].tolist()
    histogram = summary["density_histogram"]
    assert sum(histogram["counts"]) == 5 and histogram["never"] == 1 and histogram["edges"][-1] == 0


def test_contexts_are_the_largest_activations_of_distinct_examples_with_the_text_around(world, found):
    _, _, cards = found
    rows = world.rows
    texts = {problem.example_id: problem for problem in world.problems}
    at = rows.set_index(["example_id", "position"])
    for i in range(5):
        best = rows[rows[f"x{i}"] > 0].groupby("example_id")[f"x{i}"].max().sort_values(ascending=False)
        contexts = cards[i]["top_contexts"]
        assert [c["example_id"] for c in contexts] == best.index[:4].tolist()
        assert [c["activation"] for c in contexts] == pytest.approx(best.to_numpy()[:4], rel=1e-3)
        for context in contexts + cards[i]["random_contexts"]:
            key = context["example_id"]
            here = at.loc[(key, context["position"])]
            assert here[f"x{i}"] > 0 and here["token_id"] == context["token_id"]
            assert (
                "".join(context["tokens"]).strip("\n").strip()
                in "<|endoftext|>"
                + texts[key].question
                + "\n"
                + "\n".join([*texts[key].steps, f"#### {texts[key].answer}"])
                + "<|endoftext|>"
            )
            for offset, value in enumerate(context["activations"]):
                position = context["first"] + offset
                if value is None:
                    assert (key, position) not in at.index and position == 0
                else:
                    assert value == pytest.approx(max(at.loc[(key, position), f"x{i}"], 0), rel=1e-3)
    assert cards[5]["top_contexts"] == cards[5]["random_contexts"] == [] and "max" not in cards[5]


def test_a_latent_of_few_examples_has_their_other_rows_too():
    distinct, best = np.array([[7, 3, -1, -1]]), np.array([[7, 9, 3, 4]])
    assert scan._filled(distinct, best).tolist() == [[7, 3, 9, 4]]


def test_chunks_and_limits_do_not_change_what_is_found(world, found, monkeypatch):
    table, _, cards = found
    monkeypatch.setattr(scan, "ELEMENTS_AT_ONCE", 64 * D)
    again, _, other = world.measure()
    drawn = [name for name in table if name.endswith("_active")]  # random rows depend on the chunks
    pd.testing.assert_frame_equal(table.drop(columns=drawn), again.drop(columns=drawn))
    assert [c["top_contexts"] for c in cards] == [c["top_contexts"] for c in other]
    some, summary, _ = world.measure(scan.Settings(DRAWS, rows=500, contexts=4, null_latents=4))
    f = world.rows[[f"x{i}" for i in range(D)]].to_numpy()[:500] > 0
    assert summary["rows"] == 500 and np.array_equal(some["active_rows"], f.sum(0))


def test_signed_latents_are_ranked_by_magnitude_and_keep_their_sign(tmp_path):
    world = World(tmp_path, architecture="abstopk")
    table, _, cards = world.measure()
    card = list(cards)[1]
    lowest = world.rows["x1"].min()
    assert table.at[1, "max"] == pytest.approx(-lowest) and card["top_contexts"][0]["activation"] == pytest.approx(
        lowest, rel=1e-3
    )


# ----------------------------------------------------------------------------------------------------------------------
# Purity


def test_pair_means_are_those_over_all_pairs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4))
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = list(combinations(range(6), 2))
    cosines = cosine_similarity(x)
    assert purity.pair_cosine(units.sum(0), np.array(6)) == pytest.approx(np.mean([cosines[a, b] for a, b in pairs]))
    values = np.array([[1, 1, 2, 1, 3, -1], [4, -1, -1, -1, -1, -1]])
    agreement = purity.pair_agreement(values)
    assert agreement[0] == pytest.approx(3 / 10) and math.isnan(agreement[1])
    drawn = rng.integers(0, 4, 50)
    assert purity.chance_agreement(drawn) == pytest.approx(
        np.mean([drawn[a] == drawn[b] for a, b in combinations(range(50), 2)])
    )


def test_coherence_of_contexts_and_of_chance_is_about_the_training_mean(world, found):
    table, _, cards = found
    rows = world.rows.set_index(["example_id", "position"])[[f"x{i}" for i in range(D)]]
    mean = world.store.mean(SITE).numpy()
    for i in range(5):
        places = [(c["example_id"], c["position"]) for c in cards[i]["top_contexts"]]
        cosines = cosine_similarity(rows.loc[places].to_numpy() - mean)
        assert table.at[i, "coherence"] == pytest.approx(cosines[np.triu_indices(4, 1)].mean(), abs=1e-5)
    cosines = cosine_similarity(rows.to_numpy() - mean)
    assert table["coherence_null"].unique() == pytest.approx(cosines[np.triu_indices(len(rows), 1)].mean(), abs=1e-5)


def test_a_latent_of_one_token_agrees_and_latents_of_noise_do_not(world, found):
    table, summary, _ = found
    assert table.at[0, "token_agreement"] == table.at[0, "token_agreement_active"] == 1
    assert table.loc[1:4, "token_agreement_active"].mean() < 0.4
    assert table["token_agreement_null"].iloc[0] == pytest.approx(
        purity.chance_agreement(world.rows["token_id"].to_numpy())
    )
    entry = summary["means"]["token_agreement"]
    assert entry["n"] == 5 and entry["low"] <= entry["value"] <= entry["high"]
    assert entry["value"] == pytest.approx(table["token_agreement"].mean())
    assert entry["above_null"] == pytest.approx(entry["value"] - table["token_agreement_null"].iloc[0])
    assert summary["untrained"]["coherence"]["n"] == 4, "an untrained SAE is beside it"


def test_the_label_purity_of_random_rows_is_its_null_and_not_the_base_rate():
    rng = np.random.default_rng(3)
    rows = rng.choice(3, 5000, p=[0.5, 0.3, 0.2])
    random = purity.label_purity(rng.choice(rows, (2000, 8)), rows, 3)
    assert random.share.mean() == pytest.approx(random.null.mean(), abs=0.01)
    assert random.entropy.mean() == pytest.approx(random.null_entropy.mean(), abs=0.02)
    assert random.null.mean() > 0.56, "as few rows agree more often than half, by luck"
    contexts = np.array([[2, 2, 2, 2], [0, 0, 1, 1], [1, -1, -1, -1], [1, 1, -1, -1]])
    known = purity.label_purity(contexts, rows, 3)
    assert known.mode.tolist() == [2, 0, -1, 1]
    assert known.share[:2].tolist() == [1, 0.5] and known.entropy[:2] == pytest.approx([0, 1])
    assert np.isnan(known.share[2]), "one row is always pure"
    assert known.null[3] > known.null[0], "two rows agree by luck more often than four"


def test_labels_reach_contexts_by_example_and_step(world, found):
    from raysae.data.labels import label_rows

    table, _, cards = found
    labelled = label_rows(world.rows[["example_id", "step"]], world.problems).set_index(world.rows.index)
    at = pd.concat([world.rows, labelled[["label_step_type"]]], axis=1).set_index(["example_id", "position"])[
        "label_step_type"
    ]
    for i in range(5):
        seen = pd.Series([at[(c["example_id"], c["position"])] for c in cards[i]["top_contexts"]]).value_counts()
        assert table.at[i, "purity_step_type"] == pytest.approx(seen.iloc[0] / seen.sum())
        assert seen[table.at[i, "label_step_type"]] == seen.iloc[0]


def test_silhouette_tells_clusters_from_a_shuffle_of_them():
    rng = np.random.default_rng(0)
    strongest = rng.integers(0, 4, 400)
    clusters = purity.silhouette(np.eye(8)[strongest] + 0.1 * rng.normal(size=(400, 8)), strongest)
    assert clusters["value"] > 0.7 > 0.1 > clusters["null"]
    noise = purity.silhouette(rng.normal(size=(400, 8)), strongest)
    assert abs(noise["value"] - noise["null"]) < 0.05
    assert purity.silhouette(rng.normal(size=(5, 8)), np.arange(5))["value"] is None


def test_decoder_directions_in_clusters_are_nearer_than_random_ones():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16)).repeat(8, 0)
    for spread, near in ((0.3, True), (30.0, False)):
        x = centres + spread * rng.normal(size=centres.shape)
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        which, cosine, mean = purity.nearest(x)
        cosines = x @ x.T - 2 * np.eye(160)
        assert np.array_equal(which, cosines.argmax(1)) and np.allclose(cosine, cosines.max(1), atol=1e-6)
        assert np.allclose(mean, np.sort(cosines, 1)[:, -5:].mean(1), atol=1e-6)
        null = purity.random_nearest(160, 16, 160)
        assert (mean.mean() > null + 0.2) == near and (near or abs(mean.mean() - null) < 0.03)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_what_is_written_is_whole_and_can_be_read_again(world, tmp_path):
    features.write(tmp_path, world.measure(), sae_id="x")
    lines = (tmp_path / "cards.jsonl").read_text().splitlines()
    cards = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    table = pd.read_parquet(tmp_path / "features.parquet")
    summary = json.loads((tmp_path / "features.json").read_text())
    assert [card["latent"] for card in cards] == table["latent"].tolist() == list(range(D))
    assert summary["sae_id"] == "x" and summary["rows"] == len(world.rows)
    assert [card["density"] for card in cards] == pytest.approx(table["density"], rel=1e-3)
    assert not any(name.startswith("_") for name in table)
