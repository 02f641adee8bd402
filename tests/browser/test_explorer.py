"""The sliders in a real browser: in JupyterLab at open, after a run, and in exported HTML with neither kernel nor network.

Latencies are printed (pytest -s), never asserted: they belong to the machine.
"""

import itertools
import shutil
import statistics
import time

import nbformat
import pytest

from qlab.teach.execute import clean

from ..teach.pages import charts_of, data_of, pages
from .conftest import NOTEBOOK, ROOT

LIVE = ".qlab-explorer [data-live]:not([hidden])"
BITS = ".qlab-explorer [data-setting=bits] input[type=range]"

# Counts the frames that show a new picture, and the time from an input event until such a frame has left the page.
RECORD = """root => {
  const picture = root.querySelector("svg"), moves = [];
  const rec = window.rec = {inputs: 0, painted: 0, latencies: [], running: true};
  let last = picture.innerHTML, changed = false;
  root.addEventListener("input", event => { rec.inputs += 1; moves.push(event.timeStamp); }, true);
  new MutationObserver(() => { changed = true; }).observe(picture, {childList: true});
  const frame = () => {
    if (changed) {
      const seen = moves.splice(0), now = picture.innerHTML;
      changed = false;
      rec.painted += now !== last;
      last = now;
      const painted = new MessageChannel();  // its message comes after this frame has been painted
      painted.port1.onmessage = () => seen.forEach(t => rec.latencies.push(performance.now() - t));
      painted.port2.postMessage(0);
    }
    if (rec.running) requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
}"""


# Puts a slider, or a row of buttons, on stop i as a hand would.
MOVE = """(control, i) => {
  const input = control.querySelector(`input[type=range], input[value="${i}"]`);
  if (input.type === "radio") return input.click();
  input.value = i;
  input.dispatchEvent(new Event("input", {bubbles: true}));
}"""


def fast_moves(page, slider, where):
    """Ten real key presses, 40 ms apart; returns how many of them were painted as a picture of their own."""
    slider.focus()
    page.keyboard.press("Home")
    page.wait_for_timeout(200)
    slider.evaluate(f"input => ({RECORD})(input.closest('.qlab-explorer'))")
    for key in ["ArrowRight"] * 7 + ["ArrowLeft"] * 3:
        page.keyboard.press(key)
        time.sleep(0.04)
    page.wait_for_timeout(300)
    inputs, painted, latencies = page.evaluate("(rec.running = false, [rec.inputs, rec.painted, rec.latencies])")
    print(
        f"\n{where}: {painted} of {inputs} fast moves painted, input to pixels median "
        f"{statistics.median(latencies):.1f} ms, worst {max(latencies):.1f} ms"
    )
    assert inputs == 10
    return painted


def moves_well(page, slider, where):
    """At least 9 of 10 fast moves painted, and pixels that differ; a busy machine gets three tries."""
    slider.scroll_into_view_if_needed()
    picture = page.locator(".qlab-explorer").first.locator("svg")
    assert any(fast_moves(page, slider, where) >= 9 for _ in range(3)), "the slider skips moves"
    five = picture.screenshot()
    assert slider.input_value() == "4"
    slider.press("Home")
    assert picture.screenshot() != five
    slider.press("End")
    eight = page.locator(".qlab-explorer").first.locator("output").first.inner_text()
    assert eight == "8" and "bits per weight 8" in picture.get_attribute("aria-label")


def shows_every_stop(explorer, saved):
    """At each stop of the controls, the numbers shown are those the explorer's function returned there."""
    controls = explorer.locator("[data-setting]")
    stops = [range(len(s["stops"])) for s in data_of(saved)["settings"]]
    for where, chart in zip(itertools.product(*stops), charts_of(saved), strict=True):
        for k, stop in enumerate(where):
            controls.nth(k).evaluate(MOVE, stop)
        shown = explorer.locator("[data-readouts] span").all_inner_texts()
        assert shown == [f"{name} {value}" for name, value in chart["readouts"]], f"stop {where}"
        marks = sum(m["kind"] != "text" for p in chart["panels"] for m in p["marks"])
        assert explorer.locator("svg g[clip-path] > *").count() >= marks


@pytest.fixture
def notebook(lab):
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, lab.folder / NOTEBOOK)
    return lab.folder / NOTEBOOK


def one_picture(page):
    """The static copy before the explorer is hidden while the explorer lives."""
    output = page.locator(".jp-OutputArea-child:has(.qlab-explorer)").first
    assert output.evaluate("e => getComputedStyle(e.previousElementSibling).display") == "none", "two pictures at once"


def test_trusted_notebook_is_live_at_open_and_after_a_run(lab, notebook, jupyter, page):
    jupyter("trust", notebook)
    lab.open(page, NOTEBOOK)
    slider = page.locator(BITS).first
    slider.scroll_into_view_if_needed()
    assert page.locator(LIVE).count() >= 1, "sliders of a trusted notebook must move before any cell is run"
    one_picture(page)
    moves_well(page, slider, "JupyterLab, at open, no cell run")
    lab.run_all(page)
    slider = page.locator(BITS).first
    moves_well(page, slider, "JupyterLab, after Run All")
    one_picture(page)


def test_untrusted_notebook_shows_the_static_figure(lab, notebook, page):
    source = nbformat.read(notebook, as_version=4)
    source.cells[0].source += " "  # another file than the one that was trusted
    nbformat.write(source, lab.folder / "untrusted.ipynb")
    lab.open(page, "untrusted.ipynb")
    asleep = page.get_by_text("run this cell, or trust the notebook").first
    asleep.scroll_into_view_if_needed()
    assert asleep.is_visible()
    assert page.locator(LIVE).count() == 0
    output = page.locator(".jp-OutputArea-child:has(.qlab-explorer)").first
    assert output.locator("xpath=preceding-sibling::*[1]//img").is_visible()


def test_exported_html_moves_without_kernel_or_network(notebook, jupyter, page, tmp_path):
    jupyter("nbconvert", "--to", "html", "--output-dir", tmp_path, notebook)
    page.context.set_offline(True)
    page.goto((tmp_path / NOTEBOOK).with_suffix(".html").as_uri())
    moves_well(page, page.locator(BITS).first, "exported HTML, offline")
    explorers = page.locator(".qlab-explorer")
    data = pages(nbformat.read(notebook, as_version=4))
    assert explorers.count() == len(data) >= 2
    for i, saved in enumerate(data):
        shows_every_stop(explorers.nth(i), saved)
    other = explorers.nth(1).locator("svg").inner_html()
    page.locator(BITS).first.press("Home")
    assert explorers.nth(1).locator("svg").inner_html() == other, "one explorer's slider moves another's picture"
    assert page.locator("a[href^='file:']").count() == 0


LIVE_CELL = """
from qlab.teach import Explorer, chart, line, panel

def curve(power):
    if power == 3:
        raise RuntimeError("no third power")
    return chart(panel([line(range(9), [x**power for x in range(9)], "original")], "x", "y", xlim=(0, 8), ylim=(0, 9)))

Explorer(curve, power=range(1, 6), start={"power": 1}, live=True)
"""


def test_live_explorer_moves_and_shows_its_errors(lab, page):
    live = clean(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LIVE_CELL)]))
    nbformat.write(live, lab.folder / "live.ipynb")
    lab.open(page, "live.ipynb")
    lab.run_all(page)
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.wait_for(timeout=60_000)
    source = page.locator("img.widget-image").get_attribute("src")
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("old => document.querySelector('img.widget-image').src !== old", arg=source, timeout=20_000)
    page.keyboard.press("ArrowRight")
    page.get_by_text("RuntimeError: no third power").first.wait_for(timeout=20_000)
