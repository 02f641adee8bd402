"""Sweeps that can be stopped: a cell is measured once, and a file that is not its own is refused."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlab.train.cells import cell_name, run_cells

CELLS = [{"method": method, "bits": bits} for method in ("rtn", "gptq") for bits in (4, 2)]


def square(cell: dict) -> dict:
    return {"bits": cell["bits"] ** 2, "by": time.time()}


def refuses_two(cell: dict) -> dict:
    if cell["bits"] == 2:
        raise RuntimeError("no two bits today")
    return {"bits": cell["bits"]}


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_come_in_the_order_of_the_cells(tmp_path, jobs):
    assert run_cells(dict, CELLS, tmp_path, jobs, progress=False) == CELLS


def test_a_cell_is_measured_once(tmp_path):
    first = run_cells(square, CELLS[:2], tmp_path, progress=False)
    calls = []

    def again(cell):
        calls.append(cell)
        return square(cell)

    assert run_cells(again, CELLS, tmp_path, progress=False)[:2] == first
    assert calls == CELLS[2:]


def test_what_was_measured_before_an_error_is_kept(tmp_path):
    with pytest.raises(RuntimeError, match="no two bits") as error:
        run_cells(refuses_two, CELLS, tmp_path, progress=False)
    assert "'bits': 2" in error.value.__notes__[0]
    assert [json.loads(p.read_text())["row"] for p in tmp_path.glob("*.json")] == [{"bits": 4}]
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_file_of_other_settings_or_of_half_a_row_is_refused(tmp_path):
    run_cells(square, CELLS, tmp_path, progress=False)
    path = tmp_path / cell_name(CELLS[0])
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{path.name} is no file of a measured cell"):
        run_cells(square, CELLS, tmp_path, progress=False)
    path.write_text((tmp_path / cell_name(CELLS[1])).read_text())
    with pytest.raises(ValueError, match="was measured with"):
        run_cells(square, CELLS, tmp_path, progress=False)


def test_cells_that_are_equal_or_no_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 are there twice"):
        run_cells(square, [CELLS[0], dict(reversed(CELLS[0].items()))], tmp_path)
    with pytest.raises(ValueError, match="JSON does not hold"):
        run_cells(square, [{"bits": (4, 2)}], tmp_path)


def test_names_are_readable_and_differ():
    assert cell_name({"method": "gptq act-order", "bits": 4}).startswith("4-gptq_act-order-")
    assert cell_name({"lr": 1e-3}) != cell_name({"lr": 2e-3})
    assert "/" not in cell_name({"model": "../a/b"})


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    script = (
        "import time; from pathlib import Path; from qlab.train.cells import run_cells\n"
        "def slow(cell):\n"
        f"    with Path({str(tmp_path / 'calls')!r}).open('a') as file: file.write(str(cell['n']) + ' ')\n"
        "    time.sleep(.15); return {'n': cell['n']}\n"
        f"print([row['n'] for row in run_cells(slow, [dict(n=n) for n in range(8)], {str(tmp_path / 'cells')!r})])\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "cells").glob("*.json"))) < 3:
        time.sleep(0.02)
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = len(list((tmp_path / "cells").glob("*.json")))
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert again.stdout.strip() == str(list(range(8)))
    calls = Path(tmp_path / "calls").read_text().split()
    assert len(calls) <= 8 + 1 and kept >= 3  # only the one that was being measured is measured twice
