import dataclasses
import math

import numpy as np
import pytest
import torch

from qlab.train import evaluate, tasks
from qlab.train.corpus import Corpus, train_tokenizer
from qlab.train.evaluate import bootstrap, exact, exact_match, paired_difference, perplexity
from qlab.train.pretrain import PretrainConfig, build_model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Corpus(20), 400, documents=100)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = PretrainConfig(hidden_size=32, intermediate_size=32, layers=1, heads=2, kv_heads=1, vocab_size=400)
    return build_model(config, tokenizer)


def greedy(model, tokenizer, prompt, tokens):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        use_cache=True,
    )
    return tokenizer.decode(out[0, ids.shape[1] :])


def test_scoring_equals_greedy_decoding_with_the_cache(model, tokenizer):
    items = []
    for prompt in ("The crop of", "12+3", "In the morning", "Over the old bridge there was"):
        written = greedy(model, tokenizer, prompt, 4)
        cut = max(1, len(written) - 2)
        items.append(tasks.Item(prompt, written[:cut], written[cut:], prompt, "x"))
        wrong_stop = "Q" if written[-1] != "Q" else "R"
        items.append(dataclasses.replace(items[-1], stop=wrong_stop))
    expected = []
    for item in items:
        target = tokenizer(item.answer + item.stop, add_special_tokens=False).input_ids
        expected.append(greedy(model, tokenizer, item.prompt, len(target)) == item.answer + item.stop)
    assert any(expected) and not all(expected)
    for batch_size in (1, 3, 256):
        assert exact(model, tokenizer, items, batch_size).tolist() == expected


def test_perplexity_of_a_model_that_knows_nothing(model, tokenizer):
    blank = build_model(
        PretrainConfig(hidden_size=32, intermediate_size=32, layers=1, heads=2, kv_heads=1, vocab_size=400), tokenizer
    )
    with torch.no_grad():
        blank.lm_head.weight.zero_()
    estimate = perplexity(blank, tokenizer, tasks.held_out_prose(5))
    assert estimate.value == pytest.approx(400, rel=1e-4) and estimate.low == pytest.approx(400, rel=1e-4)


def test_perplexity_one_text_at_a_time(model, tokenizer):
    texts = tasks.held_out_prose(7)
    losses = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            logits = model(ids).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    found = perplexity(model, tokenizer, texts, batch_size=3)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found.low < found.value < found.high


def test_bootstrap_draws_whole_entities():
    alternating = np.tile([0.0, 1.0], 200)
    within = bootstrap(alternating, np.repeat(np.arange(200), 2))  # every entity has mean 0.5
    assert within == (0.5, 0.5, 0.5)
    between = bootstrap(np.repeat([0.0, 1.0] * 100, 2), np.repeat(np.arange(200), 2))
    spread = 1.96 * 0.5 / math.sqrt(200)
    assert between.value == 0.5
    assert between.high - between.low == pytest.approx(2 * spread, rel=0.15)


def test_bootstrap_is_deterministic_and_takes_strings():
    values = np.arange(30) % 4 == 0
    names = [f"town {i // 3}" for i in range(30)]
    assert bootstrap(values, names, seed=1) == bootstrap(values, names, seed=1) != bootstrap(values, names, seed=2)
    assert str(bootstrap(np.ones(3), list("abc"))) == "1.000 [1.000, 1.000]"


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    hard = rng.random(400)
    first, second = hard < 0.5, hard < 0.55
    difference = paired_difference(first, second, range(400))
    assert 0 < difference.low < difference.value < difference.high < 0.1
    alone = bootstrap(first, range(400))
    assert difference.high - difference.low < 0.6 * (alone.high - alone.low)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(2,\) and 3 groups"):
        bootstrap(np.ones(2), range(3))
    with pytest.raises(ValueError, match="2 and 3 values"):
        paired_difference(np.ones(2), np.ones(3), range(3))
    with pytest.raises(ValueError, match="no items"):
        exact_match(None, None, [])


def test_report_has_the_four_figures(model, tokenizer):
    result = evaluate.report(model, tokenizer, towns=3)
    assert list(result) == ["atlas", "world", "sums", "prose perplexity"]
    assert all(e.low <= e.value <= e.high for e in result.values())
