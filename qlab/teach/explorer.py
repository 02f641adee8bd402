"""Explorer: sliders over a plain function of the settings. See `Explorer`."""

import hashlib
import html
import inspect
import itertools
import json
import traceback
from importlib import resources

from qlab.teach.palette import ROLES
from qlab.teach.picture import Picture

MAX_STOPS = 400  # grids up to this many stops are computed beforehand
MAX_BYTES = 700_000  # of one explorer inside a notebook, which must stay under 1 MB
_KEYS = 'data-lm-suppress-shortcuts="true"'  # JupyterLab must leave the arrow keys to the control that has the focus
BUTTONS = 5  # up to this many strings are shown as buttons, more as a slider over their names


class Explorer:
    """Sliders over `fn(**settings) -> chart`, beside a static figure of the same chart.

    fn: a plain function returning the plain data of `chart(...)`; no drawing, no display, no state.
    settings: name=stops, where stops is a range or list of numbers (slider) or a list of strings (buttons).
    start: dict of the stop shown first and in the static figure (default: the middle stop of each setting).
    labels: dict name -> words beside the control, with the unit.
    live: None computes every stop beforehand if there are at most MAX_STOPS (400), so that the sliders move in the
        browser with neither kernel nor network, and otherwise computes each stop in the kernel when it is asked for.
        True or False asks for one of the two.

    Raises ValueError where the settings are not the arguments of fn, a setting has no stops or repeats one, the start is not a
    stop, or the precomputed page is larger than MAX_BYTES.
    """

    def __init__(self, fn, *, start=None, labels=None, live=None, **settings):
        self.fn = fn
        self.settings = {name: _stops(name, stops) for name, stops in settings.items()}
        self.labels = {name: (labels or {}).get(name, name.replace("_", " ")) for name in self.settings}
        self.live = self.size > MAX_STOPS if live is None else bool(live)
        self._check_names(labels or {})
        self.start = {name: stops[(len(stops) - 1) // 2] for name, stops in self.settings.items()} | (start or {})
        self._check(self.start)

    @property
    def size(self):
        """How many stops the grid of settings has."""
        size = 1
        for stops in self.settings.values():
            size *= len(stops)
        return size

    def grid(self):
        """Every combination of settings, as dicts, the last setting fastest."""
        for values in itertools.product(*self.settings.values()):
            yield dict(zip(self.settings, values, strict=True))

    def chart(self, **settings):
        """The chart at these settings; a setting left out is at its start."""
        return self.fn(**self._check(self.start | settings))

    def figure(self, **settings):
        """The chart at these settings as a matplotlib Figure."""
        return Picture(self.chart(**settings)).figure

    def png(self, **settings):
        """The chart at these settings as PNG bytes."""
        return Picture(self.chart(**settings)).png()

    def html(self):
        """One self-contained piece of HTML: controls, every stop's data, the script that draws it."""
        pool = _Pool()
        charts = [pool.put(self.fn(**settings)) for settings in self.grid()]
        data = {
            "colours": ROLES,
            "charts": charts,
            "pool": pool.items,
            "settings": [
                {"label": self.labels[n], "stops": [_words(s) for s in stops]} for n, stops in self.settings.items()
            ],
        }
        data = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
        if len(data.encode()) > MAX_BYTES:
            raise ValueError(
                f"the {self.size} stops of this explorer take {len(data.encode()):,} bytes, above the "
                f"{MAX_BYTES:,} allowed in a notebook: use fewer stops, fewer bins, or live=True"
            )
        name = "qlab-" + hashlib.sha256(data.encode()).hexdigest()[:10]
        controls = "".join(self._control(n, name) for n in self.settings)
        script = resources.files(__package__).joinpath("explorer.js").read_text(encoding="utf-8")
        return _PAGE.format(name=name, style=_STYLE.replace("NAME", name), controls=controls, script=script, data=data)

    def _control(self, name, root):
        stops, label = self.settings[name], html.escape(self.labels[name])
        now = stops.index(self.start[name])
        if isinstance(stops[0], str) and len(stops) <= BUTTONS:
            buttons = "".join(
                f'<label class="choice"><input type="radio" {_KEYS} name="{root}-{name}" value="{i}"'
                f"{' checked' if i == now else ''}> {html.escape(_words(s))}</label>"
                for i, s in enumerate(stops)
            )
            return f'<fieldset data-setting="{name}"><legend>{label}</legend>{buttons}</fieldset>'
        return (
            f'<label data-setting="{name}"><span>{label}</span><input type="range" {_KEYS} min="0" '
            f'max="{len(stops) - 1}" step="1" value="{now}"><output>{html.escape(_words(stops[now]))}</output>'
            f"</label>"
        )

    def _ipython_display_(self):
        from IPython.display import display

        where = ", ".join(f"{self.labels[n]} {_words(v)}" for n, v in self.start.items())
        static = {"image/png": self.png(), "text/plain": f"chart at {where}"}
        alt = {"image/png": {"alt": f"Chart at {where}"}}
        if self.live:
            display(static | self.widget()._repr_mimebundle_(), raw=True, metadata=alt)
        else:
            display(static, raw=True, metadata=alt)
            display({"text/html": self.html(), "text/plain": "the same chart with sliders"}, raw=True)

    def widget(self):
        """ipywidgets controls whose moves are computed in the kernel and shown as an image.

        An exception of fn is written under the sliders and raised, never swallowed.
        """
        import ipywidgets

        picture = Picture(self.chart())
        image = ipywidgets.Image(value=picture.png(compression=1), format="png")
        trouble = ipywidgets.HTML()
        controls = {}
        for name, stops in self.settings.items():
            kind = (
                ipywidgets.ToggleButtons
                if isinstance(stops[0], str) and len(stops) <= BUTTONS
                else ipywidgets.SelectionSlider
            )
            controls[name] = kind(
                options=[(_words(s), s) for s in stops],
                value=self.start[name],
                description=self.labels[name],
                style={"description_width": "initial"},
            )

        def moved(_):
            try:
                chart = self.chart(**{n: c.value for n, c in controls.items()})
                image.value = picture.draw(chart).png(compression=1)
                trouble.value = ""
            except Exception:
                trouble.value = f"<pre>{html.escape(traceback.format_exc())}</pre>"
                raise

        for control in controls.values():
            control.observe(moved, "value")
        return ipywidgets.VBox([*controls.values(), image, trouble])

    def _check_names(self, labels):
        try:
            inspect.signature(self.fn).bind(**self.settings)
        except TypeError as error:
            raise ValueError(
                f"{getattr(self.fn, '__name__', self.fn)} cannot be called with the settings "
                f"{', '.join(self.settings) or '(none)'}: {error}"
            ) from None
        unknown = set(labels) - set(self.settings)
        if unknown:
            raise ValueError(f"labels for {sorted(unknown)}, but the settings are {', '.join(self.settings)}")

    def _check(self, settings):
        for name, value in settings.items():
            if name not in self.settings:
                raise ValueError(f"no setting {name!r}; the settings are {', '.join(self.settings)}")
            if value not in self.settings[name]:
                raise ValueError(
                    f"{name}={value!r} is not a stop of this explorer; the stops are {self.settings[name]}"
                )
        return settings


class _Pool:
    """Keeps every piece of plain data once: equal lists and dicts become a reference to the first."""

    def __init__(self):
        self.items, self._index = [], {}

    def put(self, value):
        if isinstance(value, dict):
            value = {k: self.put(v) for k, v in value.items()}
        elif isinstance(value, (list, tuple)):
            value = [self.put(v) for v in value]
        else:
            return value
        text = json.dumps(value, sort_keys=True, allow_nan=False)
        if len(text) < 24:
            return value
        if text not in self._index:
            self._index[text] = len(self.items)
            self.items.append(value)
        return {"$": self._index[text]}


def _stops(name, stops):
    stops = [s.item() if hasattr(s, "item") else s for s in stops]
    if not stops or len(set(stops)) != len(stops):
        raise ValueError(f"setting {name!r} needs at least one stop and no stop twice; got {stops}")
    if any(isinstance(s, str) for s in stops) and not all(isinstance(s, str) for s in stops):
        raise ValueError(f"setting {name!r} mixes words and numbers: {stops}")
    return stops


def _words(stop):
    return stop if isinstance(stop, str) else f"{stop:g}".replace("-", "−") if not isinstance(stop, bool) else str(stop)


_STYLE = """
#NAME{background:#fff;color:#1A1A1A;max-width:940px;padding:6px 8px;font:14px/1.5 system-ui,sans-serif}
#NAME svg{width:100%;height:auto;display:block;font:13px system-ui,sans-serif;fill:#1A1A1A}
#NAME [data-setting]{display:flex;align-items:center;gap:10px;margin:4px 0;padding:0;border:0}
#NAME fieldset legend{float:left;min-width:210px} #NAME [data-setting]>span{min-width:210px}
#NAME input[type=range]{flex:1;max-width:520px;margin:0} #NAME output{min-width:64px;font-weight:bold}
#NAME .choice{margin-right:12px} #NAME :focus-visible{outline:2px solid #0B5FA5}
#NAME [data-readouts]{display:flex;flex-wrap:wrap;gap:4px 28px;padding-left:78px;min-height:3em}
""".strip()

_PAGE = """<div class="qlab-explorer" id="{name}">
<p data-asleep>Sliders: run this cell, or trust the notebook, to move them.</p>
<form data-live hidden><style>{style}</style>{controls}
<svg viewBox="0 0 900 330" role="img"></svg><div data-readouts aria-live="polite"></div></form>
<script>(() => {{
{script}
const here = document.currentScript;
explore((here && here.closest(".qlab-explorer")) || document.getElementById("{name}"), {data});
}})();</script></div>"""
