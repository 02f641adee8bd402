"""What the model card says about data/qlab-mini, measured again."""

import csv
import json
import shutil

import pytest
import torch

from qlab.models import find_linears, load
from qlab.models.checksums import verify_sha256sums
from qlab.train import card, tasks
from qlab.train.answers import LoraRecipe, answer_loss, train_lora
from qlab.train.corpus import DATA, Corpus, train_tokenizer
from qlab.train.evaluate import exact_match, report

FOLDER = DATA / "qlab-mini"


@pytest.fixture(scope="module")
def mini():
    return load("qlab-mini")


def table(name):
    with (FOLDER / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_checksums_cover_the_folder():
    listed = verify_sha256sums(FOLDER)
    assert listed == sum(p.is_file() for p in FOLDER.iterdir()) - 1
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 25e6


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "damage.csv"])
@pytest.mark.parametrize("damage", ["tampered", "truncated"])
def test_a_damaged_file_is_refused_by_name(name, damage, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "qlab-mini")
    content = bytearray((folder / name).read_bytes())
    if damage == "tampered":
        content[len(content) // 2] ^= 1
    else:
        del content[-1]
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        verify_sha256sums(folder)


def test_write_sums_writes_what_verify_reads(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n")
    (tmp_path / "b.json").write_text("{}")
    card.write_sums(tmp_path)
    assert verify_sha256sums(tmp_path) == 2


def test_sizes(mini):
    model, tokenizer = mini
    layers = {n: m for n, m in find_linears(model).items() if n != "lm_head"}
    assert type(model).__name__ == "LlamaForCausalLM" and len(layers) == 7 * model.config.num_hidden_layers
    assert all(size % 128 == 0 for m in layers.values() for size in m.weight.shape)
    assert 0.3e6 < sum(p.numel() for p in model.parameters()) < 5e6
    assert len(tokenizer) == model.config.vocab_size


def test_the_tokenizer_is_the_one_the_corpus_gives(mini):
    settings = json.loads((FOLDER / "pretrain.json").read_text())
    again = train_tokenizer(Corpus(settings["towns"]), settings["vocab_size"], settings["seed"])
    assert again.get_vocab() == mini[1].get_vocab()
    assert again.backend_tokenizer.to_str() == mini[1].backend_tokenizer.to_str()


def test_recall_of_the_base(mini):
    result = report(*mini)
    assert result["atlas"].value >= 0.95 and result["world"].value >= 0.95
    assert result["sums"].value >= 0.6
    assert result["prose perplexity"].value < 2.5


def test_the_untuned_model_does_not_answer_questions(mini):
    _, test = tasks.question_task(0, test_towns=60)
    assert exact_match(*mini, test).value < 0.02


def test_damage_curve_recomputed(mini):
    """One column of cells of damage.csv (the file is a record, the code is the source)."""
    recorded = {row["format"]: row for row in table("damage.csv")}
    assert list(recorded) == list(card.damage_formats())
    items, texts = card.damage_sample(), tasks.held_out_prose()
    for label in ("int4 g64", "nf4 g64"):
        found = card.damage_row(*mini, label, card.damage_formats()[label], items, texts)
        for key in ("exact_match", "perplexity"):
            assert float(found[key]) == pytest.approx(float(recorded[label][key]), rel=0.02), (label, key)


def test_the_damage_curve_falls():
    match = {row["format"]: float(row["exact_match"]) for row in table("damage.csv")}
    assert match["none"] >= 0.95 and abs(match["int8 channel"] - match["none"]) < 0.01
    assert match["int4 g64"] - match["int2 g64"] > 0.5
    for grid in ("channel", "g64"):
        curve = [match[f"int{b} {grid}"] for b in card.BITS]
        assert all(later <= earlier + 0.01 for earlier, later in zip(curve, curve[1:], strict=False))


def test_question_figures():
    rows = table("questions.csv")
    after = [float(r["exact_match"]) for r in rows if r["format"] == "none" and r["adapter"] == "on"]
    before = [float(r["exact_match"]) for r in rows if r["adapter"] == "no adapter"]
    assert len(after) == len(before) == 3
    assert min(after) >= 0.9 and max(before) < 0.02


def test_rounding_leaves_embeddings_and_the_original_alone(mini):
    model, _ = mini
    before = {name: p.clone() for name, p in model.named_parameters()}
    damaged = card.rounded(model, card.damage_formats()["int2 g64"])
    for name, p in damaged.named_parameters():
        assert torch.equal(p, before[name]) == ("proj" not in name), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_tails_by_hand():
    assert card.tails(torch.tensor([[-1.0, 1.0, -1.0, 1.0]])) == {
        "kurtosis": 1.0,
        "outlier_share": 0.0,
        "peak_to_rms": 1.0,
    }
    normal = card.tails(torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)))
    assert normal["kurtosis"] == pytest.approx(3, abs=0.1)
    assert normal["outlier_share"] == pytest.approx(6.3e-5, rel=0.5)


def test_answer_loss_counts_answer_tokens_only(mini):
    model, _ = mini
    ids = torch.tensor([[0, 5, 6, 7, 8]])
    answer = torch.tensor([[False, False, False, True, True]])
    with torch.no_grad():
        logp = model(ids).logits[0].log_softmax(-1)
        assert answer_loss(model, ids, answer).item() == pytest.approx(-(logp[2, 7] + logp[3, 8]).item() / 2, rel=1e-5)


def test_finetune_trains_adapters_only_and_repeats_itself(mini):
    train, test = tasks.question_task(0, train_towns=20, test_towns=2)
    base = {name: p.clone() for name, p in mini[0].named_parameters()}
    states = []
    for _ in range(2):
        model, tokenizer = load("qlab-mini")
        tuned = train_lora(model, tokenizer, train, LoraRecipe(steps=3, batch_size=8), seed=1)
        states.append({name: p.detach() for name, p in tuned.named_parameters()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, p in base.items():
        wrapped = f"base_model.model.{name}"
        if "proj" in name:
            wrapped = wrapped.replace(".weight", ".base_layer.weight")
        assert torch.equal(states[0][wrapped], p)
    assert all(states[0][n].abs().sum() > 0 for n in trained if "lora_B" in n)
