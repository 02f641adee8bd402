"""The intent task: balanced, its two halves worded differently, and every sentence unambiguous."""

from collections import Counter

import pytest

from qlab.train.intents import INTENTS, SLOTS, WORDINGS, requests, sentences


def test_three_thousand_sentences_of_sixteen_intents():
    train, test = requests("train", 3000), requests("test", 960)
    assert len(train) == 3000 and len(test) == 960 and len(INTENTS) == 16
    assert set(Counter(r.label for r in test).values()) == {60}
    assert set(Counter(r.label for r in train).values()) == {187, 188}
    texts = [r.text for r in train + test]
    assert len(set(texts)) == len(texts) and not any("{" in text for text in texts)


def test_the_test_is_worded_differently():
    assert not {r.wording for r in requests("train", 3000)} & {r.wording for r in requests("test", 960)}
    for train, test in WORDINGS.values():
        assert len(train) >= 6 and len(test) == 3 and len(set(train + test)) == len(train) + 3


def test_every_wording_is_used_and_fills_its_slots():
    used = {r.wording for split in ("train", "test") for r in requests(split, 960)}
    assert used == {wording for train, test in WORDINGS.values() for wording in train + test}
    names = {name for wording in used for name in SLOTS if f"{{{name}}}" in wording}
    assert names == set(SLOTS)


def test_no_sentence_has_two_intents():
    owners = Counter(text for intent in INTENTS for split in ("train", "test") for text in sentences(intent, split))
    assert max(owners.values()) == 1


def test_the_seed_draws():
    assert requests("train", 100) == requests("train", 100) != requests("train", 100, seed=1)
    assert [r.label for r in requests("train", 100)] != sorted(r.label for r in requests("train", 100))


def test_refusals():
    with pytest.raises(ValueError, match="got 'dev'"):
        requests("dev", 10)
    with pytest.raises(ValueError, match="its wordings give"):
        requests("test", 100_000)
