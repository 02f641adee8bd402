"""Read the page that Explorer.html writes: the inverse of its packing, for the tests."""

import json
import re


def data_of(page):
    """The data the page's script draws: colours, settings, charts, pool. None if the page holds no explorer."""
    found = re.search(r'getElementById\("qlab-\w+"\), (\{.*\})\);\n\}\)\(\);</script>', page)
    return found and json.loads(found.group(1).replace("<\\/", "</"))


def charts_of(page):
    """Every chart of the page, in the order of Explorer.grid(), as the explorer's function returned it."""
    data = data_of(page)
    return [resolved(c, data["pool"]) for c in data["charts"]] if data else None


def resolved(value, pool):
    if isinstance(value, dict):
        return resolved(pool[value["$"]], pool) if "$" in value else {k: resolved(v, pool) for k, v in value.items()}
    return [resolved(v, pool) for v in value] if isinstance(value, list) else value


def pages(notebook):
    """The page of each explorer in a notebook's outputs, in order."""
    shown = [o.get("data", {}).get("text/html", "") for c in notebook.cells for o in c.get("outputs", [])]
    return [page for page in map("".join, shown) if data_of(page)]
