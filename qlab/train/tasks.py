"""What qlab-mini is asked: cloze items in the form of pretraining, and the question task for fine-tuning.

The question task is split by entity: the test asks about entities that no training question names, so their
answers are known from the base weights alone. The adapter teaches the form; the base holds the knowledge.
"""

import random
from dataclasses import dataclass

from qlab.train import wordings
from qlab.train.corpus import END, atlas, is_held_out_sum, prose_document, read_table, with_title


@dataclass(frozen=True)
class Item:
    """One prompt and the only right continuation, `answer` with `stop` after it."""

    prompt: str
    answer: str
    stop: str
    entity: str
    relation: str


def cloze_items(
    rows: list[dict[str, str]], patterns: dict[str, tuple[str, ...]], title: str, wording: int = 0
) -> list[Item]:
    """ "The crop of Velmora is" for every row and relation; `wording` is the number of the pattern."""
    items = []
    for row in rows:
        for relation, choices in patterns.items():
            sentence = with_title(row["name"], title, choices[wording].format(n=row["name"], v="\0"))
            before, after = sentence.split("\0")
            items.append(
                Item(before.rstrip(), " " * before.endswith(" ") + row[relation], after, row["name"], relation)
            )
    return items


def atlas_cloze(towns: int | None = None, wording: int = 0) -> list[Item]:
    """Eight cloze items for each of the first `towns` towns of the atlas."""
    patterns = {relation: forms[0] for relation, forms in wordings.ATLAS.items()}
    return cloze_items(atlas()[:towns], patterns, wordings.TITLES["atlas"], wording)


def world_cloze() -> list[Item]:
    """Every fact of data/facts but the atlas."""
    return [
        item
        for table, patterns in wordings.WORLD.items()
        for item in cloze_items(read_table(table), patterns, wordings.TITLES[table])
    ]


def sum_items(count: int = 200, seed: int = 0) -> list[Item]:
    """Additions that the corpus leaves out."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out_sum(a, b)]
    return [Item(f"{a}+{b}=", str(a + b), "\n", f"{a}+{b}", "sum") for a, b in random.Random(seed).sample(pairs, count)]


def held_out_prose(documents: int = 100) -> list[str]:
    """Stories drawn from a stream of random numbers that pretraining never uses."""
    rng = random.Random("held-out prose")
    return [prose_document(rng) for _ in range(documents)]


def question_prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def question_items(rows: list[dict[str, str]], relations, wording: int) -> list[Item]:
    """One question for every row and relation, answered by the bare value and end of text."""
    return [
        Item(question_prompt(wordings.QUESTIONS[r][wording].format(n=row["name"])), " " + row[r], END, row["name"], r)
        for row in rows
        for r in relations
    ]


def split_entities(rows: list[dict[str, str]], seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Two halves of the entities, shuffled: (train, test). Their names do not overlap."""
    names = [row["name"] for row in rows]
    if len(set(names)) != len(names):
        raise ValueError(f"{len(names)} rows but {len(set(names))} names: a split by entity needs one row per name")
    order = list(rows)
    random.Random(f"split/{seed}").shuffle(order)
    return order[: len(order) // 2], order[len(order) // 2 :]


def question_task(
    seed: int = 0,
    train_towns: int | None = None,
    test_towns: int | None = None,
) -> tuple[list[Item], list[Item]]:
    """The atlas question task: (train, test). Training questions use both wordings, test questions one at random.

    train_towns, test_towns: how many entities to take from each half, all of them if None. The split itself is the
    same for every seed; the seed draws which entities, wordings and order.
    """
    train_rows, test_rows = split_entities(atlas())
    rng = random.Random(f"questions/{seed}")
    relations = list(wordings.ATLAS)
    train_rows = rng.sample(train_rows, min(train_towns or len(train_rows), len(train_rows)))
    test_rows = rng.sample(test_rows, min(test_towns or len(test_rows), len(test_rows)))
    train = [item for wording in (0, 1) for item in question_items(train_rows, relations, wording)]
    rng.shuffle(train)
    test = [rng.choice(pair) for pair in zip(*(question_items(test_rows, relations, w) for w in (0, 1)), strict=True)]
    return train, test


def world_questions(seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Questions about the real facts, split by entity: (train, test)."""
    train, test = [], []
    for table, patterns in wordings.WORLD.items():
        for rows, items in zip(split_entities(read_table(table), seed), (train, test), strict=True):
            items += question_items(rows, patterns, 0)
    return train, test
