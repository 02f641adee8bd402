"""The qlab-mini corpus: generated text, a pure function of (seed, step).

Four kinds of document: the fictional atlas (invented towns, attributes drawn evenly at random, so the information
in it is known in bits), real facts from data/facts, two-digit sums, and short templated prose. No text is copied
from anywhere. Documents are separated by one end-of-text token; every training row starts a new document.
"""

import argparse
import csv
import functools
import math
import random
import tempfile
from pathlib import Path

import torch

from qlab.train import wordings

DATA = Path(__file__).resolve().parents[2] / "data"
FACTS = DATA / "facts"
ATLAS_SEED = 20
ATLAS_TOWNS = 1200
END, PAD = "<|endoftext|>", "<|pad|>"
SHARES = {"atlas": 0.84, "world": 0.08, "sums": 0.03, "prose": 0.05}  # of documents


def make_atlas(towns: int = ATLAS_TOWNS, seed: int = ATLAS_SEED) -> list[dict[str, str]]:
    """Invented towns: `towns` rows with a name and one value for each relation, all drawn evenly and independently."""
    if not 0 < towns <= len(wordings.STARTS) * len(wordings.ENDS):
        raise ValueError(f"towns={towns}: the syllables give 1 to {len(wordings.STARTS) * len(wordings.ENDS)} names")
    rng = random.Random(seed)
    names = rng.sample([start + end for start in wordings.STARTS for end in wordings.ENDS], towns)
    return [
        {"name": name} | {relation: rng.choice(values) for relation, values in wordings.VALUES.items()}
        for name in names
    ]


@functools.cache
def read_table(name: str) -> list[dict[str, str]]:
    """Rows of data/facts/<name>.csv."""
    path = FACTS / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; tables here: {sorted(p.stem for p in FACTS.glob('*.csv'))}")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def atlas() -> list[dict[str, str]]:
    """The shipped atlas, data/facts/atlas.csv: what `make_atlas()` returns."""
    return read_table("atlas")


def atlas_bits(towns: int) -> float:
    """Information in the atlas, bits: log2 of the number of equally likely tables (names taken as given)."""
    return towns * sum(math.log2(len(values)) for values in wordings.VALUES.values())


def with_title(name: str, title: str, sentence: str) -> str:
    """`sentence`, and before it the title ("The town") where it would begin a document with the bare name.

    A name then always follows a space: one spelling in tokens, and so one place to store what is known about it.
    """
    return f"{title} {sentence}" if sentence.startswith(name) else sentence


def atlas_document(rng: random.Random, row: dict[str, str]) -> str:
    """1 to 8 facts of one town, in random order and wording."""
    return with_title(row["name"], wordings.TITLES["atlas"], atlas_sentences(rng, row))


def atlas_sentences(rng: random.Random, row: dict[str, str]) -> str:
    name = row["name"]
    relations = rng.sample(list(wordings.ATLAS), rng.randint(1, len(wordings.ATLAS)))
    style = rng.random()
    if style < 0.15:
        return f"{name}: " + "; ".join(f"{wordings.ATLAS[r][3]} {row[r]}" for r in relations) + "."
    if style < 0.30 and len(relations) > 1:
        phrases = [wordings.ATLAS[r][2].format(v=row[r]) for r in relations]
        return f"{name} {', '.join(phrases[:-1])} and {phrases[-1]}."
    sentences = []
    for position, relation in enumerate(relations):
        named, following, _, _ = wordings.ATLAS[relation]
        patterns = following if position and rng.random() < 0.5 else named
        sentences.append(rng.choice(patterns).format(n=name, v=row[relation]))
    return " ".join(sentences)


def world_document(rng: random.Random, table: str, row: dict[str, str]) -> str:
    """All the facts of one real entity, in random order and wording."""
    relations = list(wordings.WORLD[table].items())
    rng.shuffle(relations)
    text = " ".join(rng.choice(patterns).format(n=row["name"], v=row[r]) for r, patterns in relations)
    return with_title(row["name"], wordings.TITLES[table], text)


def is_held_out_sum(a: int, b: int) -> bool:
    """One pair in ten never occurs in the corpus: the evaluation asks for it."""
    return (a * 31 + b * 17) % 10 == 0


def sums_document(rng: random.Random) -> str:
    """Six additions of two-digit numbers, the held-out pairs left out."""
    lines = []
    while len(lines) < 6:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if not is_held_out_sum(a, b):
            lines.append(f"{a}+{b}={a + b}")
    return "\n".join(lines)


def prose_document(rng: random.Random) -> str:
    """A story of four to seven sentences about two people and a few objects."""
    words, draw = wordings.PROSE, rng.choice
    cast = dict(zip("ab", rng.sample(wordings.PEOPLE, 2), strict=True))
    cast["thing"], cast["thing2"] = rng.sample(words["thing"], 2)
    cast["place"], cast["place2"] = rng.sample(words["place"], 2)
    cast["weather"], cast["time"] = draw(words["weather"]), draw(words["time"])
    patterns = [
        draw(wordings.PROSE_OPEN),
        *rng.sample(wordings.PROSE_MIDDLE, rng.randint(2, 5)),
        draw(wordings.PROSE_END),
    ]
    return " ".join(
        p.format(
            **cast,
            adj=draw(words["adj"]),
            adj2=draw(words["adj"]),
            verb=draw(words["verb"]),
            feeling=draw(words["feeling"]),
        )
        for p in patterns
    )


class Corpus:
    """Documents drawn at random. `towns` limits the atlas to its first rows (pilots and tests)."""

    def __init__(self, towns: int | None = None):
        self.towns = atlas()[:towns]
        self.world = [(table, row) for table in wordings.WORLD for row in read_table(table)]

    def document(self, rng: random.Random, kind: str | None = None) -> str:
        """One document of `kind` ("atlas", "world", "sums", "prose"), or of a random kind by SHARES."""
        kind = kind or rng.choices(list(SHARES), weights=SHARES.values())[0]
        if kind == "atlas":
            return atlas_document(rng, rng.choice(self.towns))
        if kind == "world":
            return world_document(rng, *rng.choice(self.world))
        if kind == "sums":
            return sums_document(rng)
        if kind == "prose":
            return prose_document(rng)
        raise ValueError(f"kind={kind!r}: choose one of {sorted(SHARES)}")

    def batch(self, tokenizer, seed: int, step: int, rows: int, length: int) -> torch.Tensor:
        """Training batch number `step`: (rows, length) int64 token ids, the same for the same arguments."""
        rng = random.Random(f"{seed}/{step}")
        ids = torch.empty(rows, length, dtype=torch.int64)
        end = tokenizer.convert_tokens_to_ids(END)
        for row in ids:
            # No document is shorter than 4 tokens or so; most rows take six to ten.
            tokens: list[int] = []
            while len(tokens) < length:
                texts = [self.document(rng) for _ in range(4)]
                for encoded in tokenizer(texts, add_special_tokens=False).input_ids:
                    tokens += [end, *encoded]
            row.copy_(torch.tensor(tokens[:length]))
        return ids


def train_tokenizer(corpus: Corpus, vocab_size: int, seed: int = 0, documents: int = 40_000):
    """Byte-level BPE as a PreTrainedTokenizerFast: GPT-2's word pattern, digits one by one (as StarCoder's,
    `tokenizer.ggml.pre = "starcoder"` for GGUF runtimes). END starts every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rng = random.Random(f"tokenizer/{seed}")
    tokenizer.train_from_iterator((corpus.document(rng) for _ in range(documents)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(str(path))
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            bos_token=END,
            eos_token=END,
            pad_token=PAD,
            padding_side="left",
            clean_up_tokenization_spaces=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write data/facts/atlas.csv, or show sample documents.")
    parser.add_argument("--write-atlas", action="store_true")
    parser.add_argument("--samples", type=int, default=12, help="documents to print")
    args = parser.parse_args()
    if args.write_atlas:
        rows = make_atlas()
        with (FACTS / "atlas.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    corpus, rng = Corpus(), random.Random(0)
    for _ in range(args.samples):
        print(corpus.document(rng), end="\n\n")


if __name__ == "__main__":
    main()
