"""A checkpoint counts only when it is whole; what it holds comes back bit for bit; an older one outlives a newer half."""

import json
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from qlab.train import checkpoints


def write(folder, step, text="content"):
    partial = checkpoints.path_of(folder, step).with_suffix(checkpoints.PARTIAL)
    partial.mkdir(parents=True)
    (partial / "a.txt").write_text(text)
    (partial / "b.txt").write_text("other")
    return checkpoints.complete(partial, step)


def test_the_newest_whole_one_counts(tmp_path):
    assert checkpoints.latest(tmp_path / "nowhere") is None and checkpoints.latest(tmp_path) is None
    for step in (8, 100, 20):
        write(tmp_path, step)
    assert checkpoints.latest(tmp_path) == (100, tmp_path / "step-00000100")


def cut(path):
    (path / "a.txt").write_text("cont")


def change(path):
    (path / "b.txt").write_text("OTHER")


def remove(path):
    (path / "a.txt").unlink()


def unmark(path):
    (path / checkpoints.MARKER).unlink()


def cut_marker(path):
    marker = path / checkpoints.MARKER
    marker.write_text(marker.read_text()[:30])


def empty_marker(path):
    (path / checkpoints.MARKER).write_text("{}")


def of_another_step(path):
    marker = path / checkpoints.MARKER
    marker.write_text(marker.read_text().replace('"step": 8', '"step": 7'))


def rename_back(path):
    path.rename(path.with_suffix(checkpoints.PARTIAL))


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut, r"a.txt \(4 bytes\) is cut off or was changed"),
        (change, r"b.txt \(5 bytes\) is cut off or was changed"),
        (remove, "a.txt is missing"),
        (unmark, "it has no complete.json"),
        (cut_marker, "complete.json cannot be read"),
        (empty_marker, "complete.json cannot be read"),
        (of_another_step, "complete.json is that of step 7"),
        (rename_back, "it has no complete.json: it was being written"),
    ],
)
def test_a_damaged_one_is_skipped_by_name(tmp_path, damage, reason):
    older, newer = write(tmp_path, 4), write(tmp_path, 8)
    damage(newer)
    with pytest.warns(UserWarning, match=f"step-00000008.* is skipped: .*{reason}"):
        assert checkpoints.latest(tmp_path) == (4, older)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest(tmp_path, warn=False) == (4, older)


def test_a_damaged_one_is_replaced_and_others_are_deleted_only_by_a_whole_one(tmp_path):
    write(tmp_path, 4)
    cut(write(tmp_path, 8))
    (tmp_path / "step-00000012.partial").mkdir()
    assert len(list(tmp_path.iterdir())) == 3, "completing one deletes nothing"
    again = write(tmp_path, 8, "better")
    assert (again / "a.txt").read_text() == "better"
    checkpoints.delete_others(tmp_path, again)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_the_marker_is_written_after_everything_is_on_the_disk(tmp_path, monkeypatch):
    flushed, marked = [], []
    monkeypatch.setattr(checkpoints, "flush", lambda path: flushed.append(path.name))
    real = checkpoints.write_json
    monkeypatch.setattr(
        checkpoints, "write_json", lambda path, content: (marked.append(list(flushed)), real(path, content))
    )
    final = write(tmp_path, 3)
    assert marked == [["a.txt", "b.txt"]]
    assert flushed[-1] == tmp_path.name and json.loads((final / checkpoints.MARKER).read_text())["step"] == 3


def test_json_is_whole_or_not_there(tmp_path):
    checkpoints.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        checkpoints.write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def trained(steps, optimizer_class=torch.optim.AdamW, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.1, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(steps):
        step(model, optimizer, schedule)
    return model, optimizer, schedule


def step(model, optimizer, schedule):
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("settings", [{}, {"amsgrad": True}])
def test_optimizer_and_parameters_go_on_in_the_same_bits(tmp_path, settings):
    model, optimizer, schedule = trained(3, **settings)
    tensors, rest = checkpoints.optimizer_state(optimizer, model)
    assert "1.weight/exp_avg" in tensors
    checkpoints.save_tensors(tmp_path / "o.safetensors", tensors)
    checkpoints.save_tensors(tmp_path / "t.safetensors", checkpoints.trained_tensors(model))
    rest, scheduled = json.loads(json.dumps([rest, schedule.state_dict()]))
    state = torch.get_rng_state()
    step(model, optimizer, schedule)

    again, other, later = trained(1, **settings)
    checkpoints.load_trained(again, checkpoints.load_tensors(tmp_path / "t.safetensors"))
    checkpoints.load_optimizer(other, again, checkpoints.load_tensors(tmp_path / "o.safetensors"), rest)
    later.load_state_dict(scheduled)
    torch.set_rng_state(state)
    step(again, other, later)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_only_what_trains_is_saved_and_another_model_is_refused():
    model, *_ = trained(0)
    tensors = checkpoints.trained_tensors(model)
    assert list(tensors) == ["1.weight", "1.bias"]
    for wrong in (
        {"1.weight": tensors["1.weight"]},
        tensors | {"1.bias": torch.zeros(3)},
        tensors | {"2.bias": torch.zeros(3)},
    ):
        before = model[1].weight.clone()
        with pytest.raises(ValueError, match=r"what was saved is not what trains here: [12].bias"):
            checkpoints.load_trained(model, wrong)
        assert torch.equal(model[1].weight, before)


def test_random_states_come_back():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    random.gauss(0, 1), np.random.normal()  # each leaves half a pair behind
    state = json.loads(json.dumps(checkpoints.rng_state()))

    def drawn():
        return random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3).tolist()

    first = drawn()
    checkpoints.set_rng_state(state)
    assert drawn() == first
