"""Probes and their traps: what would inflate a score, and the guard or the flag that meets it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_store
from scipy import sparse, stats
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import KFold
from small import reseal

from raysae import cli
from raysae.data.records import make_problem, write_records
from raysae.errors import UserError
from raysae.evaluate import probes
from raysae.evaluate.linear import Settings, cross_validate, group_folds, largest_differences, score
from raysae.evaluate.statistics import group_weights
from raysae.files import write_json
from raysae.run import Run
from raysae.sae import formats
from raysae.sae.architectures import SAEConfig
from raysae.sae.sae import SAE

QUICK = Settings(folds=4, inner_folds=2, ks=(1,), cs=(0.01, 1.0), bootstrap=60, rows=2000)
ROOT = Path(__file__).resolve().parents[2]
SITE = "blocks.0.resid_post"
COLOURS = "red blue green white black amber ivory olive coral beige khaki azure".split()  # noqa: SIM905


def problem(i: int, operator: str = "+"):
    """A question that is like no other, and one worked line."""
    words = [f"{COLOURS[(i // 12**j) % 12]}{j}" for j in range(4)]
    result = {"+": 9, "*": 14, "-": 5}[operator]
    return make_problem(f"p/{i}", "toy", " ".join(words), answer=f"So <<7{operator}2={result}>>{result}\n#### {result}")


def rows_of(groups: np.ndarray, labels: np.ndarray, token: np.ndarray | None = None) -> pd.DataFrame:
    """A table as `sample` gives it: one example of one step per group."""
    names = [f"p/{g}" for g in groups]
    token = np.arange(len(groups)) % 7 if token is None else token
    return pd.DataFrame(
        {"example_id": names, "group": names, "step": 0, "label": labels.astype(str), "token_id": token}
    )


def balanced(fit, y):
    return balanced_accuracy_score(y, fit.probabilities.argmax(1))


# ----------------------------------------------------------------------------------------------------------------------
# Folds, columns, scores


def test_a_split_by_token_inflates_the_score_and_a_split_by_group_does_not():
    """Every row of a group is a copy of one vector, and the group's label is drawn at random: nothing can be known."""
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(80), 10), np.repeat(rng.integers(0, 2, 80), 10)
    x = rng.normal(size=(80, 120))[groups] + 0.01 * rng.normal(size=(800, 120))
    by_token = np.empty(800, int)
    for number, (_, held) in enumerate(KFold(4, shuffle=True, random_state=0).split(x)):
        by_token[held] = number
    assert balanced(cross_validate(x, labels, groups, by_token, QUICK), labels) > 0.95
    by_group = group_folds(groups, 4)
    assert pd.Series(by_group).groupby(groups).nunique().max() == 1
    assert balanced(cross_validate(x, labels, groups, by_group, QUICK), labels) < 0.65

    # Both signs of the leak are flagged, and neither under the split by group.
    rows, problems, weights = rows_of(groups, labels), [problem(g) for g in range(80)], group_weights(80, 60)
    shuffled = probes.shuffled(labels, rows, seed=0)
    for fold, leaks in ((by_token, True), (by_group, False)):
        done = score(cross_validate(x, shuffled, groups, fold, QUICK), shuffled, groups, fold, weights)
        gap = {"macro_f1": 0.0, "macro_f1_low": -0.1, "macro_f1_high": 0.1}
        gaps = {"raw": gap, "token": gap}
        found = probes.leakage(done, gaps, rows, fold, 2, problems, QUICK)
        assert bool(found["control"]["flag"]) == bool(found["duplicates"]["flag"]) == leaks


def test_reworded_copies_in_other_groups_are_counted():
    problems = [problem(i) for i in range(12)]
    copied = make_problem("copy", "toy", problems[0].question + "!", answer="#### 1")
    ids = np.array([*(p.example_id for p in problems), "copy"])
    fold = np.arange(13) % 4
    fold[12] = fold[0]
    assert probes.duplicates_across_folds(ids, fold, [*problems, copied]) == 0
    fold[12] = fold[0] + 1
    assert probes.duplicates_across_folds(ids, fold, [*problems, copied]) == 1


def test_degenerate_rewordings_across_folds_with_random_labels_are_flagged():
    """Three wordings of each question in groups of their own, a label per question: all that is learnt is the question."""
    rng = np.random.default_rng(0)
    questions, n = [" ".join(f"w{word}" for word in rng.choice(900, 12)) for _ in range(60)], 180
    wordings = ("{}", "Say how many of these there are now, please: {}", "{} Think step by step and then give it")
    problems = [make_problem(f"p/{i}", "toy", wordings[i % 3].format(questions[i // 3])) for i in range(n)]
    label = rng.integers(0, 2, 60)[np.arange(n) // 3]
    x = (rng.normal(size=(60, 40))[np.arange(n) // 3] + 0.1 * rng.normal(size=(n, 40))).astype(np.float32)
    f = sparse.csr_matrix(np.maximum(x, 0))
    inputs = {"token": probes.one_hot(np.arange(n) % 7), "raw": x, "random_sae": f, "sae": f}
    table, facts = probes.probe_label(inputs, rows_of(np.arange(n), label), ["0", "1"], problems, QUICK)
    assert table.set_index(["input", "probe"]).at[("raw", "dense"), "macro_f1"] > 0.8
    assert facts["leakage"]["duplicates"]["groups_across_folds"] > 50 and facts["leakage"]["duplicates"]["flag"]


def test_the_control_task_gives_a_word_type_one_label_and_classes_their_share():
    rng = np.random.default_rng(0)
    token, labels = rng.integers(0, 400, 4000), rng.choice(3, 4000, p=[0.6, 0.3, 0.1])
    control = probes.control_task(token, labels, 0)
    assert pd.Series(control).groupby(token).nunique().max() == 1
    assert np.bincount(control) / 4000 == pytest.approx([0.6, 0.3, 0.1], abs=0.02)
    assert (control != probes.control_task(token, labels, 1)).mean() > 0.3


def test_selectivity_is_against_labels_learnt_by_heart():
    """Raw rows that hold the token and nothing else: what a probe of them says of any label of the token is memory."""
    rng = np.random.default_rng(0)
    groups, token = np.repeat(np.arange(60), 8), rng.integers(0, 20, 480)
    context = rng.integers(0, 2, 480)
    by_token, told = np.eye(20, dtype=np.float32)[token], sparse.csr_matrix(context[:, None].astype(np.float32))
    inputs = {"token": probes.one_hot(token), "raw": by_token, "random_sae": told, "sae": told}
    problems = [problem(g) for g in range(60)]
    rows = rows_of(groups, token % 2, token)
    dense = (
        probes.probe_label(inputs, rows, ["0", "1"], problems, QUICK)[0].query("probe == 'dense'").set_index("input")
    )
    assert dense.at["raw", "control_f1"] > 0.95 and dense.at["raw", "selectivity"] == pytest.approx(0, abs=0.05)
    rows = rows_of(groups, context, token)
    dense = (
        probes.probe_label(inputs, rows, ["0", "1"], problems, QUICK)[0].query("probe == 'dense'").set_index("input")
    )
    assert dense.at["sae", "macro_f1"] == 1 and dense.at["sae", "selectivity_low"] > 0.3


def test_a_bigram_is_of_neighbours_of_one_example():
    rows = pd.DataFrame(
        {
            "example_id": ["a", "b", "a", "a"],
            "position": [1, 1, 0, 3],
            "token_id": [5, 6, 4, 7],
            "shard": "s",
            "row": range(4),
        }
    )
    found = probes.with_previous(rows)
    assert found["previous_id"].tolist() == [4, -1, -1, -1] and found["row"].tolist() == [0, 1, 2, 3]
    made = probes.surface(found)
    assert set(made) == {*probes.SURFACE} and made["bigram"].shape == (4, 4 + 2 + 4)
    assert made["position"].toarray()[:, -1].tolist() == [1, 1, 0, 3]


# ----------------------------------------------------------------------------------------------------------------------
# Single latents


def sparse_rows(rng, n, d):
    """Latents as an SAE gives them: some dense, most rare, of heavy tails."""
    rates = rng.beta(0.3, 3, d)
    return sparse.csr_matrix((rng.random((n, d)) < rates) * rng.lognormal(0, 1, (n, d)))


def test_degenerate_shuffled_labels_have_uniform_p_and_no_discoveries():
    """In 80 shuffles: some latent is taken for one of a class in 5 % of them, and the least p is uniform."""
    rng = np.random.default_rng(0)
    x, groups = sparse_rows(rng, 150, 128), np.arange(150)
    y = rng.choice(3, 150, p=[0.62, 0.3, 0.08])
    shuffles, found = 80, []
    for _ in range(shuffles):
        found.append(probes.effects(x, rng.permutation(y), groups, ["a", "b", "c"], QUICK, permutations=99))
    any_false = np.mean([f["discoveries"] > 0 for f in found])
    assert any_false <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / shuffles)
    assert stats.kstest([f["p"] for f in found], "uniform").pvalue > 0.01


def test_a_latent_of_a_class_is_found_and_tiny_classes_are_left_out():
    """It fires on 71 % of a class, by the same amount whenever it does, and nowhere else."""
    rng = np.random.default_rng(1)
    n, y = 200, np.repeat([0, 1, 2], [180, 17, 3])
    x = sparse_rows(rng, n, 256).tolil()
    x[:, 9] = 0
    x[180:192, 9] = 1.0
    found = probes.effects(sparse.csr_matrix(x), y, np.arange(n), ["a", "b", "tiny"], QUICK, permutations=199)
    first = found["latents"][0]
    assert (first["latent"], first["fires"]) == (9, pytest.approx(12 / 17)) and first["fires_elsewhere"] in (
        0.0,
        12 / 17,
    )
    assert first["p"] <= 0.01 and found["discoveries"] == 1 and found["left_out"] == ["tiny"]
    assert found["tested"] < 256  # those that hardly ever fire


def test_latents_are_not_tested_where_nothing_can_be_told():
    x, y = sparse_rows(np.random.default_rng(2), 30, 8), np.repeat([0, 1], [25, 5])
    found = probes.effects(x, y, np.arange(30), ["a", "b"], QUICK)
    assert found["largest_z"] is None and found["discoveries"] == 0 and found["left_out"] == ["a", "b"]
    assert "no latent was tested" in probes.in_words(found)


def test_columns_are_chosen_on_the_training_folds():
    """On noise with far more columns than rows, columns chosen on all rows predict the held-out ones too."""
    rng = np.random.default_rng(0)
    x, y, groups = rng.normal(size=(120, 5000)), rng.integers(0, 2, 120), np.arange(120)
    fold = group_folds(groups, 4)
    everywhere = x[:, largest_differences(x, y, 8)]
    assert balanced(cross_validate(everywhere, y, groups, fold, QUICK), y) > 0.75
    assert balanced(cross_validate(x, y, groups, fold, QUICK, k=8), y) < 0.65


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix])
def test_the_column_that_carries_a_class_is_chosen(layout):
    rng = np.random.default_rng(1)
    y, x = rng.integers(0, 3, 300), np.abs(rng.normal(size=(300, 40)))
    x[:, 23] += y == 2
    fit = cross_validate(layout(x), y, np.arange(300), group_folds(np.arange(300), 4), QUICK, k=1)
    assert fit.columns == [[23]] * 4


def test_scores_equal_sklearns():
    rng = np.random.default_rng(2)
    groups, y = np.repeat(np.arange(40), 5), rng.integers(0, 3, 200)
    x = rng.normal(size=(200, 6))
    x[:, 0] += y
    fold, weights = group_folds(groups, 4), group_weights(40, 60)
    fit = cross_validate(x, y, groups, fold, QUICK)
    found, predicted = score(fit, y, groups, fold, weights), fit.probabilities.argmax(1)
    assert found.values["macro_f1"][0] == pytest.approx(f1_score(y, predicted, average="macro"))
    assert found.values["balanced_accuracy"][0] == pytest.approx(balanced_accuracy_score(y, predicted))
    areas = [
        roc_auc_score(y[fold == f], fit.probabilities[fold == f], multi_class="ovr", average="macro") for f in range(4)
    ]
    assert found.values["auroc"][0] == pytest.approx(np.mean(areas))
    # A resample is the data with its groups repeated.
    again = np.concatenate([np.tile(np.flatnonzero(groups == g), int(n)) for g, n in enumerate(weights[7])])
    assert found.values["macro_f1"][7] == pytest.approx(f1_score(y[again], predicted[again], average="macro"))


# ----------------------------------------------------------------------------------------------------------------------
# One label


def test_a_label_of_the_token_is_flagged_and_a_label_of_the_context_is_not():
    rng = np.random.default_rng(3)
    groups, token = np.repeat(np.arange(60), 8), rng.integers(0, 30, 480)
    problems = [problem(g) for g in range(60)]
    context = rng.integers(0, 2, 480)
    x = np.eye(30)[token] + 0.1 * rng.normal(size=(480, 30))
    x = np.concatenate([x, context[:, None] + 0.1 * rng.normal(size=(480, 1))], 1).astype(np.float32)
    f = sparse.csr_matrix(np.maximum(x, 0))
    inputs = {"token": probes.one_hot(token), "raw": x, "random_sae": f, "sae": f}
    for label, flagged in ((token % 2, True), (context, False)):
        table, facts = probes.probe_label(inputs, rows_of(groups, label, token), ["0", "1"], problems, QUICK)
        dense = table[table["probe"] == "dense"].set_index("input")
        assert dense.at["sae", "macro_f1"] > 0.95
        assert bool(facts["leakage"]["token"]["flag"]) == flagged
        assert not facts["leakage"]["control"]["flag"] and not facts["leakage"]["duplicates"]["flag"]
        assert (
            abs(dense.at["sae", "selectivity"]) < 0.1
        )  # its columns hold the token too: any label of it can be learnt
        assert dense.at["shuffled", "macro_f1"] < dense.at["sae", "macro_f1"] - 0.2
        assert facts["gaps"]["majority"]["p"] < 0.01


def test_effects_of_noise_are_no_discoveries_and_a_planted_one_is():
    rng = np.random.default_rng(4)
    y, groups = rng.integers(0, 3, 600), np.repeat(np.arange(300), 2)
    x = np.maximum(rng.normal(size=(600, 1000)) - 1, 0)
    noise = probes.effects(sparse.csr_matrix(x), y, groups, ["a", "b", "c"], QUICK)
    assert noise["n_rows"] == 300 and noise["discoveries"] == 0
    assert noise["largest_z"] < 1.1 * noise["null_largest_z_95"]
    x[y == 1, 7] += 1
    planted = probes.effects(sparse.csr_matrix(x), y, groups, ["a", "b", "c"], QUICK)
    assert planted["latents"][0]["latent"] == 7 and planted["latents"][0]["class"] == "b"
    assert planted["discoveries"] >= 1 and planted["largest_z"] > planted["null_largest_z_95"]


def test_shuffled_labels_stay_constant_within_their_unit():
    rng = np.random.default_rng(5)
    ids = np.repeat([f"p/{i}" for i in range(30)], 6)
    rows = pd.DataFrame({"example_id": ids, "step": np.tile([0, 0, 1, 1, 2, 2], 30)})
    of_line = np.repeat(rng.integers(0, 4, 90), 2)
    mixed = probes.shuffled(of_line, rows, 0)
    units = pd.Series(mixed).groupby([rows["example_id"], rows["step"]])
    assert units.nunique().max() == 1
    assert sorted(units.first()) == sorted(of_line[::2])
    assert (mixed != of_line).mean() > 0.5
    of_example = np.repeat(rng.integers(0, 4, 30), 6)
    mixed = pd.Series(probes.shuffled(of_example, rows, 0)).groupby(rows["example_id"])
    assert mixed.nunique().max() == 1 and sorted(mixed.first()) == sorted(of_example[::6])


# ----------------------------------------------------------------------------------------------------------------------
# A store


def small_store(root, seed=0, n=48):
    """Two operators; a row's first coordinate says which, the rest are noise. Returns the subject and the problems."""
    rng = np.random.default_rng(seed)
    problems = [problem(i, "+*"[i % 2]) for i in range(n)]
    ids, steps = np.repeat([p.example_id for p in problems], 6), np.tile([-1, 0, 0, 0, 0, 1], n)
    x = rng.normal(size=(6 * n, 4)).astype(np.float32)
    x[:, 0] = np.where(np.repeat(np.arange(n) % 2, 6) == 1, 3, -3) + 0.1 * x[:, 0]
    order = rng.permutation(6 * n)
    columns = {"example_id": ids[order], "group": ids[order], "step": steps[order]}
    columns |= {"position": np.tile(np.arange(6), n)[order], "token_id": rng.integers(0, 9, 6 * n)}
    half = (
        {key: value[: 3 * n] for key, value in columns.items()},
        {key: value[3 * n :] for key, value in columns.items()},
    )
    x = torch.from_numpy(x[order])
    shards = [("test", x[: 3 * n]), ("test", x[3 * n :]), ("train", x)]
    return tiny_store(root, shards, SITE, {0: half[0], 1: half[1]}), problems


def sae_of(threshold: float) -> SAE:
    """A ReLU SAE with a latent for the sign of the first coordinate, if it comes above `threshold`, and one dead one."""
    W_enc = torch.zeros(4, 8)
    W_enc[0, 0] = 1
    parameters = {
        "W_enc": W_enc, "b_enc": torch.full((8,), -float(threshold)), "W_dec": W_enc.T.contiguous(), "b_dec": torch.zeros(4)
    }  # fmt: skip
    return SAE(SAEConfig("relu", 4, 8, l1_coefficient=0.1), parameters)


def test_probes_read_what_encode_gives_and_not_the_pre_activations(tmp_path):
    """The class is plain in the pre-activations of a latent that never fires, as it was in probes that scored 100 %."""
    store, problems = small_store(tmp_path)
    silent = sae_of(threshold=10)
    rows = probes.row_table(store, "test")
    x = probes.read_rows(store, SITE, rows)
    f = probes.latents(silent, x)
    torch.testing.assert_close(torch.from_numpy(f.toarray()), silent.encode(torch.from_numpy(x)))
    assert f.nnz == 0 and np.ptp(x @ silent.parameters["W_enc"].numpy()[:, 0]) > 5

    table, facts = probes.probe(probes.Subject(store, SITE, silent), problems, ["operation"], QUICK)
    dense = table[table["probe"] == "dense"].set_index("input")
    assert dense.at["raw", "balanced_accuracy"] == 1 and dense.at["sae", "balanced_accuracy"] == 0.5
    assert facts["operation"]["leakage"]["information"]["flag"] == "information loss"

    loud, _ = probes.probe(probes.Subject(store, SITE, sae_of(threshold=0)), problems, ["operation"], QUICK)
    one = loud[(loud["input"] == "sae") & (loud["probe"] == "k=1")].iloc[0]
    assert one["balanced_accuracy"] == 1 and one["columns"] == [0] and one["l0"] == pytest.approx(0.5, abs=0.05)


def test_rows_are_read_from_their_own_places(tmp_path):
    store, _ = small_store(tmp_path)
    rows = probes.row_table(store, "test")
    everything = torch.cat([store.shard(SITE, name) for name in store.names("test")]).numpy()
    order = np.random.default_rng(0).permutation(len(rows))
    assert (probes.read_rows(store, SITE, rows.iloc[order]) == everything[order]).all()


def test_every_baseline_has_its_row_and_an_untrained_model_only_where_one_is_given(tmp_path):
    store, problems = small_store(tmp_path / "a")
    subject = probes.Subject(store, SITE, sae_of(0))
    table, facts = probes.probe(subject, problems, ["operation", "step"], QUICK)
    measured = table[table["status"] == "measured"]
    assert set(measured["input"]) == {"majority", "shuffled", *probes.SURFACE, "raw", "random_sae", "sae"}
    absent = table[table["status"] != "measured"].set_index(["label", "input"])["status"]
    assert absent["operation", "untrained_model"] == probes.NOT_GIVEN
    assert table.loc[table["label"] == "step", "status"].tolist() == ["not measured: fewer than two classes"]
    assert "not measured" in probes.summary(table, facts)

    other = probes.Subject(*small_store(tmp_path / "b")[:1], SITE, sae_of(10))
    with_it, facts = probes.probe(subject, problems, ["operation"], QUICK, other)
    assert (with_it["status"] == "measured").all() and "untrained_model" in facts["operation"]["gaps"]
    probes.write(tmp_path / "probes", with_it, facts, QUICK, sae_id="x")
    assert len(pd.read_parquet(tmp_path / "probes" / "probes.parquet")) == len(with_it)
    assert json.loads((tmp_path / "probes" / "probes.json").read_text())["labels"]["operation"]["n_groups"] == 48


def test_labels_that_no_problem_has_are_refused_from_the_records_alone():
    problems = [problem(i, "+*"[i % 2]) for i in range(40)]
    probes.check_labels(problems, ["step", "operation"], "test", folds=5)
    for given, labels, folds in ((problems, ["step"], 5), (problems, ["operation"], 11), ([], ["operation"], 5)):
        with pytest.raises(UserError, match=r"^labels: none of (step|operation) has two classes with \d+ groups each"):
            probes.check_labels(given, labels, "test", folds)


def test_another_store_is_joined_by_example_and_position(tmp_path):
    store, _ = small_store(tmp_path / "a", seed=0)
    rows = probes.row_table(store, "test")
    reordered = rows.iloc[::-1]
    there = probes.align(reordered, store, "test")
    assert (there["row"].to_numpy() == reordered["row"].to_numpy()).all()
    shorter, _ = small_store(tmp_path / "b", n=12)
    with pytest.raises(UserError, match=r"^untrained: .* lacks tokens of this run"):
        probes.align(rows, shorter, "test")


def test_a_sample_takes_about_as_many_rows_of_every_group_and_drops_rare_classes():
    sizes = [40] * 10 + [4] * 10
    rows = pd.DataFrame({"group": np.repeat([f"g{i}" for i in range(20)], sizes), "label_x": "a"})
    rows.loc[rows["group"].isin([f"g{i}" for i in range(0, 20, 2)]), "label_x"] = "b"
    rows.loc[0, "label_x"], rows.loc[1, "label_x"] = "rare", None
    taken, classes, dropped = probes.sample(rows, "label_x", Settings(rows=60, folds=4))
    assert classes == ["a", "b"] and dropped == ["rare"] and set(taken["label"]) == {"a", "b"}
    assert len(taken) == 60 and set(taken["group"].value_counts()) == {3}
    assert taken["group"].head(20).nunique() == 20
    with pytest.raises(UserError, match=r"^rows: 5 rows hold too few groups for 4 folds"):
        probes.sample(rows, "label_x", Settings(rows=5, folds=4))
    with pytest.raises(UserError, match=r"^split: .* has no validation rows"):
        probes.row_table(type("Empty", (), {"names": lambda self, split: [], "path": "x"})(), "validation")


# ----------------------------------------------------------------------------------------------------------------------
# The job


@pytest.fixture
def run(tmp_path):
    """A run's directory as a sweep leaves it, as far as the job reads it."""
    stages, run = tmp_path / "stages", tmp_path / "run"
    _, problems = small_store(stages / "store-1")
    (stages / "records-1").mkdir()
    write_records(stages / "records-1" / "records.parquet", problems)
    formats.save(sae_of(0), run / "saes" / "one")
    pd.DataFrame({"sae_id": ["one"], "site": [SITE]}).to_parquet(run / "table.parquet")
    write_json(run / "decision.json", {"chosen": None, "closest": "one", "reason": "too few"})
    listed = [{"stage": "records", "directory": "records-1"}, {"stage": "store", "directory": "store-1"}]
    write_json(run / "ledger.json", {"stages": listed})
    write_json(stages / "records-1" / "manifest.json", {})
    reseal(run)
    return run


def test_the_job_probes_the_closest_sae_where_none_was_chosen(run):
    command = [sys.executable, str(ROOT / "jobs" / "probe.py"), str(run), "--labels", "operation,answer", "--ks", "1"]
    done = subprocess.run(
        [*command, "--split", "test", "--bootstrap", "50"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "operation: *, +; " in done.stdout and "untrained_model: not measured" in done.stdout
    about = json.loads((run / "probes" / "probes.json").read_text())
    assert about["sae_id"] == "one" and about["site"] == SITE and set(about["labels"]) == {"operation", "answer"}
    table = pd.read_parquet(run / "probes" / "probes.parquet").set_index(["label", "input", "probe"])
    assert table.loc[("operation", "sae", "k=1"), "balanced_accuracy"] == 1


def test_the_job_takes_the_run_s_own_null_as_baseline(run):
    """The null's store is the run's second one and holds the same tokens; the null has the same site and architecture."""
    stages = run.parent / "stages"
    small_store(stages / "store-0")
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["stages"].append({"stage": "store", "directory": "store-0"})
    write_json(run / "ledger.json", ledger)
    pd.DataFrame({"sae_id": ["one"], "site": [SITE], "architecture": ["relu"]}).to_parquet(run / "table.parquet")
    facts = {"kind": "untrained_model", "site": SITE, "store": "store-0", "made": True}
    kinds = {"topk": sae_of(0), "relu": sae_of(10)}  # that of another architecture would read the label, ours is silent
    names = {architecture: f"control-untrained_model-{architecture}-8-{SITE}" for architecture in kinds}
    for architecture, sae in kinds.items():
        formats.save(sae, run / "nulls" / names[architecture])
    write_json(run / "nulls.json", {names[a]: {**facts, "architecture": a} for a in kinds})
    reseal(run)
    job = cli.probe
    job([str(run), "--labels", "operation", "--split", "test", "--ks", "1", "--bootstrap", "50"])
    table = pd.read_parquet(run / "probes" / "probes.parquet").set_index(["input", "probe"])
    assert table.loc[("untrained_model", "dense"), "balanced_accuracy"] == 0.5
    assert Run.open(run).stage("store").name == "store-1"
    assert Run.open(run).untrained_model("one").store.path.name == "store-0"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--labels", "colour"], "labels.0: 'colour' is not allowed; input should be 'step', 'step_type'"),
        (["--sae", "two"], "has no SAE 'two'; it has one"),
        (["--split", "validation"], "has no validation rows"),
        (["--split", "test", "--rows", "3"], "rows: 3 rows hold too few groups for 5 folds"),
        (
            ["--split", "test", "--labels", "step"],
            "labels: none of step has two classes with 10 groups each in the test",
        ),
        (["--untrained", "nowhere"], "run: nowhere has no decision.json"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, line):
    with pytest.raises(UserError, match=re.escape(line)) as raised:
        cli.probe([str(run), *arguments])
    assert "\n" not in str(raised.value) and not (run / "probes").exists()


def test_a_run_that_lost_its_stages_says_so(run):
    shutil.rmtree(run.parent / "stages" / "store-1")
    with pytest.raises(UserError, match=r"^run: .* needs its stage .*store-1, which is not there"):
        Run.open(run).stage("store")
