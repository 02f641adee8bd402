import random

import pytest

from qlab.train import tasks, wordings
from qlab.train.corpus import END, Corpus, atlas


def test_cloze_item_by_hand():
    row = {"name": "Velmora", "crop": "barley"}
    patterns = {"crop": wordings.ATLAS["crop"][0]}
    assert tasks.cloze_items([row], patterns, "The town") == [
        tasks.Item("The crop of Velmora is", " barley", ".", "Velmora", "crop")
    ]
    assert tasks.cloze_items([row], patterns, "The town", wording=1)[0].prompt == "The town Velmora grows"


def test_cloze_prompts_occur_in_the_corpus():
    rng = random.Random(0)
    corpus = Corpus(3)
    text = "\n".join(corpus.document(rng, "atlas") for _ in range(2000))
    for wording in range(6):
        for item in tasks.atlas_cloze(3, wording):
            assert item.prompt + item.answer + item.stop in text
    real = "\n".join(corpus.document(rng, "world") for _ in range(8000))
    found = [item.prompt + item.answer + item.stop in real for item in tasks.world_cloze()]
    assert sum(found) / len(found) > 0.95


def test_the_split_is_by_entity_and_covers_all():
    train, test = tasks.split_entities(atlas())
    names = [{row["name"] for row in half} for half in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == len(atlas())
    assert abs(len(train) - len(test)) <= 1
    with pytest.raises(ValueError, match="2 rows but 1 names"):
        tasks.split_entities([{"name": "a"}, {"name": "a"}])


@pytest.mark.parametrize("seed", [0, 1])
def test_no_test_entity_is_named_in_training(seed):
    train, test = tasks.question_task(seed)
    text = "\n".join(item.prompt + item.answer for item in train)
    words = set(text.replace("?", " ").split())
    assert not words & {item.entity for item in test}
    assert len(train) == 2 * 8 * (len(atlas()) // 2) and len(test) == 8 * (len(atlas()) // 2)


def test_the_test_half_is_the_same_for_every_seed():
    halves = [{item.entity for item in tasks.question_task(seed)[1]} for seed in (0, 1)]
    assert halves[0] == halves[1]
    train, test = tasks.question_task(0, train_towns=5, test_towns=7)
    assert len({i.entity for i in train}) == 5 and len({i.entity for i in test}) == 7
    assert tasks.question_task(0, 5, 7) == (train, test) != tasks.question_task(1, 5, 7)


def test_questions_end_with_the_end_token_and_hold_the_answer_of_the_table():
    _, test = tasks.question_task(0, test_towns=20)
    rows = {row["name"]: row for row in atlas()}
    for item in test:
        assert item.prompt.startswith("Question: ") and item.prompt.endswith("?\nAnswer:")
        assert item.entity in item.prompt and item.stop == END
        assert item.answer == " " + rows[item.entity][item.relation]
    assert {i.relation for i in test} == set(wordings.ATLAS)


def test_world_questions_have_words_for_every_relation():
    train, test = tasks.world_questions()
    assert {i.relation for i in train} == {r for table in wordings.WORLD.values() for r in table}
    assert {i.relation for i in train} == {i.relation for i in test}


def test_sums_are_held_out_and_right():
    for item in tasks.sum_items(50):
        a, b = map(int, item.prompt[:-1].split("+"))
        assert int(item.answer) == a + b
    assert len({i.prompt for i in tasks.sum_items(200)}) == 200


def test_held_out_prose_is_not_in_the_corpus():
    rng = random.Random(3)
    corpus = Corpus(3)
    seen = {corpus.document(rng, "prose") for _ in range(5000)}
    assert not seen & set(tasks.held_out_prose())
    assert tasks.held_out_prose(3) == tasks.held_out_prose(3)
