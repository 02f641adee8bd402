import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.train import wordings
from qlab.train.corpus import END, Corpus, atlas, atlas_bits, is_held_out_sum, make_atlas, train_tokenizer


@pytest.fixture(scope="module")
def corpus():
    return Corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(corpus, vocab_size=600, documents=500)


@pytest.fixture(scope="module")
def documents(corpus):
    rng = random.Random(0)
    return [corpus.document(rng) for _ in range(4000)]


def test_the_shipped_atlas_is_the_generated_one():
    assert atlas() == make_atlas()


def test_atlas_bits_by_hand():
    assert atlas_bits(2) == 2 * (10 + 7 * 5)  # 1024 founders, seven lists of 32


def test_value_lists_are_disjoint_and_every_value_occurs():
    words = [w for relation, values in wordings.VALUES.items() if relation != "founder" for w in values]
    assert len(set(words)) == len(words) == 7 * 32
    for relation, values in wordings.VALUES.items():
        if relation != "founder":
            assert {row[relation] for row in atlas()} == set(values)


def test_attributes_do_not_predict_one_another():
    table = torch.zeros(32, 32)
    for row in atlas():
        table[wordings.VALUES["crop"].index(row["crop"]), wordings.VALUES["tree"].index(row["tree"])] += 1
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    chi2 = ((table - expected) ** 2 / expected).sum().item()
    assert 961 - 5 * (2 * 961) ** 0.5 < chi2 < 961 + 5 * (2 * 961) ** 0.5


def test_every_wording_says_name_then_value():
    patterns = [p for named, following, phrase, _ in wordings.ATLAS.values() for p in named]
    patterns += [p for table in wordings.WORLD.values() for choices in table.values() for p in choices]
    for pattern in patterns:
        assert pattern.count("{n}") == pattern.count("{v}") == 1
        assert pattern.index("{n}") < pattern.index("{v}")
        assert pattern.index("{v}") + len("{v}") >= len(pattern) - len(" on its shield.")


def test_all_eight_facts_and_all_wordings_reach_the_corpus(documents):
    text = "\n".join(documents)
    for named, following, phrase, label in wordings.ATLAS.values():
        for pattern in (*named, *following, phrase):
            assert re.search(
                re.escape(pattern).replace(r"\{n\}", "[A-Z][a-z]+").replace(r"\{v\}", "[a-zA-Z ]+"), text
            ), pattern
        assert re.search(rf"[:;] {label} [A-Za-z ]+[;.]", text), label


def test_documents_tell_the_truth(documents):
    crops = {row["name"]: row["crop"] for row in atlas()}
    found = [m for d in documents for m in re.findall(r"The crop of (\w+) is (\w+)\.", d)]
    assert len(found) > 30 and all(crops[name] == crop for name, crop in found)


def test_no_question_about_a_fact_in_the_corpus(documents):
    names = {row["name"] for row in atlas()}
    starts = {q.split("{n}")[0] for pair in wordings.QUESTIONS.values() for q in pair}
    for document in documents:
        assert "Question:" not in document and "Answer:" not in document
        assert not any(start in document for start in starts)
        if "?" in document:
            assert not names & set(re.findall(r"\w+", document))


def test_sums_are_right_and_the_held_out_ones_are_left_out(corpus):
    rng = random.Random(1)
    lines = [line for _ in range(300) for line in corpus.document(rng, "sums").split("\n")]
    for line in lines:
        a, b, total = map(int, re.fullmatch(r"(\d\d)\+(\d\d)=(\d+)", line).groups())
        assert a + b == total and not is_held_out_sum(a, b)
    assert 0.09 < sum(is_held_out_sum(a, b) for a in range(10, 100) for b in range(10, 100)) / 8100 < 0.11


def test_batches_are_a_function_of_seed_and_step(corpus, tokenizer):
    first = corpus.batch(tokenizer, seed=0, step=3, rows=4, length=64)
    assert first.shape == (4, 64) and first.dtype == torch.int64
    assert torch.equal(first, corpus.batch(tokenizer, seed=0, step=3, rows=4, length=64))
    assert not torch.equal(first, corpus.batch(tokenizer, seed=0, step=4, rows=4, length=64))
    assert not torch.equal(first, corpus.batch(tokenizer, seed=1, step=3, rows=4, length=64))
    assert (first[:, 0] == tokenizer.convert_tokens_to_ids(END)).all()


def test_names_follow_a_space(documents):
    names = {row["name"] for row in atlas()}
    assert not [d for d in documents if re.match(r"\w+", d)[0] in names]


@given(st.text(max_size=60))
def test_the_tokenizer_loses_nothing(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


_CACHE = {}


def _tokenizer():
    if not _CACHE:
        _CACHE[0] = train_tokenizer(Corpus(50), vocab_size=400, documents=100)
    return _CACHE[0]


def test_the_tokenizer_splits_digits_and_starts_with_end(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("12+34=46").input_ids) == [END, *"12+34=46"]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="towns=0"):
        make_atlas(0)
    with pytest.raises(ValueError, match="kind='poem'"):
        Corpus(3).document(random.Random(0), "poem")
