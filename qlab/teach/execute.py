"""Re-execute notebooks in place and leave them as they are committed: `python -m qlab.teach.execute notebooks/*.ipynb`.

Outputs are kept; widget state, timings and the kernel's own metadata are not, because they differ from run to run and
machine to machine. A notebook whose cell raises is left as it was.
"""

import argparse
import base64
import io
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(path, timeout=600):
    """Run the notebook at `path` from its own folder and write it back; returns the seconds it took.

    Raises nbclient.exceptions.CellExecutionError where a cell raises.
    """
    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two busy processes on few cores starve each other otherwise
    started = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=False,
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    seconds = time.perf_counter() - started
    partial = path.with_suffix(".partial")
    nbformat.write(clean(notebook), partial)
    partial.replace(path)
    return seconds


def clean(notebook):
    """The notebook without what belongs to one run or one machine only (changed in place, and returned)."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")})
        if cell.cell_type == "code":
            for output in cell.outputs:
                if output.get("data", {}).pop(WIDGET, None) and set(output.data) <= {"text/plain"}:
                    output.data = {}
            cell.outputs = [o for o in cell.outputs if o.get("data") != {}]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = small_png(output.data["image/png"])
    return notebook


def small_png(encoded):
    """A base64 PNG with a palette of up to 256 colours, if that is smaller: a third of the bytes, the same to the eye."""
    from PIL import Image

    before, after = base64.b64decode(encoded), io.BytesIO()
    Image.open(io.BytesIO(before)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        after, "PNG", optimize=True
    )
    return base64.b64encode(min(before, after.getvalue(), key=len)).decode()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        print(f"{path}: {execute(path):.0f} s", flush=True)


if __name__ == "__main__":
    main()
