"""Near-duplicates: words changed, numbers changed, excerpts and overlapping windows, in any script; and nothing else."""

import json
import random
import re
from collections import Counter
from functools import cache

import pytest

from raysae.data.duplicates import near_duplicates
from raysae.data.sources import load_problems

WORDS = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(500)]


@cache
def grams(text, n):
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n, 0) + 1)}


def near(a, b, threshold):
    """The definition, written again for texts of words alone."""
    shingles, passages = ([grams(text, n) for text in (a, b)] for n in (3, 8))
    shared = len(passages[0] & passages[1])
    return len(shingles[0] & shingles[1]) >= threshold * len(shingles[0] | shingles[1]) or (
        shared >= 8 and shared >= threshold / 2 * min(map(len, passages))
    )


def united(*texts):
    return len({*near_duplicates(texts, 0.8).groups}) == 1


def walk(rng, length):
    return rng.choices(WORDS, k=length)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_groups_are_the_connected_components_of_the_definition(threshold):
    rng, texts = random.Random(1), []
    for _ in range(20):
        words = walk(rng, 40)
        for changes in range(9):
            copy = list(words)
            for place in rng.sample(range(40), changes):
                copy[place] = "changed"
            texts.append(" ".join(copy[: rng.choice((12, 25, 40))] + walk(rng, rng.choice((0, 9, 30)))))
    rng.shuffle(texts)
    expected = list(range(len(texts)))
    for i, a in enumerate(texts):
        for j in range(i):
            if near(a, texts[j], threshold) and expected[i] != expected[j]:
                low, high = sorted((expected[i], expected[j]))
                expected = [low if group == high else group for group in expected]
    assert len({*expected}) < 0.9 * len(texts)
    assert near_duplicates(texts, threshold).groups == expected


def test_an_excerpt_is_united_with_its_document_and_windows_that_overlap_by_half(shared):
    stories = load_problems(
        "text", str(shared / "data/tinystories_text/tiny_stories.txt"), text_separator=r"(?<!\n)\n(?!\n)"
    )
    text = [words for words in (p.question.split() for p in stories) if len(words) >= 240][:60]
    rng = random.Random(0)
    documents = [" ".join(words) for words in text]
    starts = [rng.randrange(len(words) - 120) for words in text]
    excerpts = [" ".join(words[s : s + 120]) for words, s in zip(text, starts, strict=True)]
    windows = [" ".join(words[s : s + 120]) for words in text for s in (0, 60, 120)]
    groups = near_duplicates([*documents, *excerpts], 0.8).groups
    assert groups[60:] == groups[:60] == list(range(60)), "each with its own document, and no two documents"
    assert near_duplicates(windows, 0.8).groups == [3 * (i // 3) for i in range(180)]
    assert not united(" ".join(text[0][:120]), " ".join(text[0][100:220])), "a sixth in common"


def test_phrases_and_short_texts_in_common_are_no_passage():
    assert not united("What is the capital of France?", "What is the capital of Spain?")
    opening = "Once upon a time there was a little girl who lived in a house"  # 14 words: 7 passages
    rng = random.Random(0)
    assert not united(*(f"{opening} {' '.join(walk(rng, 6))}" for _ in range(2)))
    assert near_duplicates(["a b", "a b", "a c", "", " "], 0.8).groups == [0, 0, 2, 3, 3]


def test_rewordings_are_united_where_they_are_asked_for():
    question = " ".join(walk(random.Random(3), 12))
    reworded = f"Say how many of these there are now, please: {question}"
    opening = "What is the sum of the following?"  # 5 shingles of the shorter one's 9
    others = [f"{opening} {' '.join(walk(random.Random(i), 4))}" for i in (4, 5)]
    few = "the sum of the ten", "add the sum of the"  # 2 shared of 3: a phrase
    for texts, alike in (((question, reworded), True), (others, True), (few, False)):
        assert not united(*texts)
        assert (len({*near_duplicates(texts, 0.8, 0.4).groups}) == 1) == alike, texts


def test_numbers_are_one_word_where_there_are_words():
    template = "{} plants {} rose bushes in each of {} rows and sells {} of them. How many are left?"
    assert united(template.format("Ann", 3, 5, 2), template.format("Ann", 4, "1,250", 2.5))
    assert not united(template.format("Ann", 3, 5, 2), "Ann has 3 cats, and 5 dogs bark at 2 of them.")
    sums = [f"{a} + {b} = {a + b}" for a in range(10, 20) for b in range(10, 20)]
    assert near_duplicates(sums, 0.8).groups == list(range(100)), "where digits are the text, they tell it apart"


def test_counterfactual_pairs_of_gsm8k_are_one_group_and_its_problems_are_not(shared):
    """Each of 1,000 problems beside itself with its numbers changed."""
    questions = [p.question for p in load_problems("gsm8k", str(shared / "data/gsm8k/train.jsonl"))]
    changed = [re.sub(r"\d+", lambda m: str(int(m[0]) + 1), q) for q in questions[:1000]]
    groups = near_duplicates([*questions, *changed], 0.8).groups
    assert groups[len(questions) :] == groups[:1000]
    sizes = Counter(groups[: len(questions)]).values()
    assert len(sizes) >= 7400 and max(sizes) <= 4


def _dyck(rng, length, kinds):
    text, open_ = [], []
    while len(text) < length:
        if open_ and rng.random() < 0.5:
            text.append(open_.pop())
        else:
            kind = rng.randrange(kinds)
            text.append("([{<"[kind])
            open_.append(")]}>"[kind])
    return "".join([*text, *reversed(open_)])


EMOJI = "😀😃😄😁😆😅🤣😂🙂🙃😉😊😇🥰😍🤩😘😗🐶🐱🐭🐹🐰🦊🐻🐼"
HAN = "".join(chr(0x4E00 + i) for i in range(300))
ARABIC = ["".join(random.Random(i).choices("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", k=5)) for i in range(300)]
HINDI = ["".join(random.Random(i).choices("कखगघचछजझटठडढतथदधनपफबभम", k=2)) + "ि" for i in range(300)]
SCRIPTS = {
    "dyck of one kind": lambda rng: _dyck(rng, 60, 1),
    "dyck of four kinds": lambda rng: _dyck(rng, 60, 4),
    "emoji": lambda rng: "".join(rng.choices(EMOJI, k=40)),
    "digits": lambda rng: " ".join(rng.choices("0123456789", k=40)),
    "formulas": lambda rng: "".join(rng.choices("xyz+-*/()=^0123456789", k=60)),
    "han": lambda rng: "".join(rng.choices(HAN, k=60)),
    "thai": lambda rng: "".join(rng.choices("กขคฆงจฉชซฌญฎฏฐฑฒณดตถ", k=60)),
    "arabic": lambda rng: " ".join(rng.choices(ARABIC, k=40)),
    "hindi": lambda rng: " ".join(rng.choices(HINDI, k=40)),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_texts_of_every_script_are_told_apart_and_their_excerpts_found(script):
    rng = random.Random(0)
    texts = [*dict.fromkeys(SCRIPTS[script](rng) for _ in range(100))]
    excerpts = [text[: len(text) * 3 // 4].strip() for text in texts]
    found = near_duplicates([*texts, *excerpts], 0.8)
    assert found.groups[: len(texts)] == list(range(len(texts)))
    assert found.groups[len(texts) :] == list(range(len(texts)))
    assert found.short == 0


def test_texts_that_cannot_be_compared_are_counted():
    found = near_duplicates(["ok", "no", "a b c", "ok", "((()))", ""], 0.8)
    assert found.groups == [0, 1, 2, 0, 4, 5]
    assert found.short == 4, "texts of two characters, and the empty one; three words and the brackets are a shingle"
    assert near_duplicates(["characters decide", "abc"], 0.8).short == 1, "of two words, by characters: four here"


def test_real_captions_and_logic_problems_are_not_merged_wholesale(shared):
    rows = json.loads((shared / "data/logic_llm/ProntoQA.dev.json").read_text())
    questions = [row["context"] for row in rows]
    assert len({*near_duplicates(questions, 0.8).groups}) >= 0.95 * len({*questions})
    lines = (shared / "data/flickr8k_en_ar/flickr8k-rev.txt").read_text().splitlines()[:3000]
    captions = [line.split("\t")[-1] for line in lines]
    assert len({*near_duplicates(captions, 0.8).groups}) >= 0.99 * len({*captions})
