// The browser half of qlab.teach.Explorer: every stop is already computed; this draws the one the controls point at.
// `data.pool` holds each repeated piece of the charts once; {"$": i} stands for data.pool[i].
function explore(root, data) {
  const W = 900, H = 330, SIDE = 78, TOP = 46, BOTTOM = 62, INK = "#1A1A1A", GRID = "#D9D9D9";
  const real = v => (v && v.$ !== undefined ? data.pool[v.$] : v);
  const esc = s => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/"/g, "&quot;");
  const words = (x, y, s, more = "") => `<text x="${x}" y="${y}" ${more}>${esc(s)}</text>`;

  function scale(axis, from, to) {
    const f = axis.scale === "log" ? v => Math.log10(Math.max(v, 1e-300)) : v => v;
    const [low, high] = real(axis.limits).map(f);
    const slope = (to - from) / (high - low);
    const edge = 4 * Math.abs(to - from);  // far outside the panel: clipped anyway, and safe to write in SVG
    return v => +Math.max(-edge, Math.min(edge, from + slope * (f(v) - low))).toFixed(1);
  }

  function mark(m, X, Y, box) {
    const c = data.colours[m.role], x = real(m.x) || [], y = real(m.y) || [];
    const path = (d, more) => `<path d="${d}" fill="none" stroke="${c}" ${more}/>`;
    if (m.kind === "steps") {
      const d = y.map((v, i) => `L${X(x[i])} ${Y(v)}L${X(x[i + 1])} ${Y(v)}`).join("");
      const floor = box.bottom, start = `M${X(x[0])} ${floor}`, stop = `L${X(x[x.length - 1])} ${floor}`;
      return (m.fill ? `<path d="${start}${d}${stop}Z" fill="${c}" fill-opacity=".25"/>` : "") +
        path(start + d + stop, 'stroke-width="1.8"');
    }
    if (m.kind === "line") {
      const d = x.map((v, i) => `${i ? "L" : "M"}${X(v)} ${Y(y[i])}`).join("");
      return path(d, `stroke-width="2.4" ${m.dashed ? 'stroke-dasharray="7 5"' : ""}`);
    }
    if (m.kind === "points") return x.map((v, i) => `<circle cx="${X(v)}" cy="${Y(y[i])}" r="4" fill="${c}"/>`).join("");
    if (m.kind === "stems") {
      return path(x.map((v, i) => `M${X(v)} ${box.bottom}V${Y(y[i])}`).join(""), 'stroke-width="1.3"') +
        x.map((v, i) => `<circle cx="${X(v)}" cy="${Y(y[i])}" r="3" fill="${c}"/>`).join("");
    }
    if (m.kind === "bars") {
      const zero = Y(0);
      return x.map((v, i) => {
        const left = X(v - m.width / 2), top = Math.min(Y(y[i]), zero);
        return `<rect x="${left}" y="${top}" width="${Math.max(1, X(v + m.width / 2) - left)}" ` +
          `height="${Math.abs(zero - Y(y[i]))}" fill="${c}"/>`;
      }).join("");
    }
    const dashes = 'stroke-width="1.5" stroke-dasharray="6 4"';
    if (m.kind === "vline") return path(x.map(v => `M${X(v)} ${box.top}V${box.bottom}`).join(""), dashes);
    if (m.kind === "hline") return path(y.map(v => `M${box.left} ${Y(v)}H${box.right}`).join(""), dashes);
    if (m.kind === "span") {
      return `<rect x="${X(x[0])}" y="${box.top}" width="${X(x[1]) - X(x[0])}" ` +
        `height="${box.bottom - box.top}" fill="${c}" fill-opacity=".15"/>`;
    }
    return "";  // "text" has nothing but its label
  }

  function panel(p, i, n) {
    const width = W / n, box = {left: i * width + SIDE, right: (i + 1) * width - 16, top: TOP, bottom: H - BOTTOM};
    const xa = real(p.x), ya = real(p.y);
    const X = scale(xa, box.left, box.right), Y = scale(ya, box.bottom, box.top);
    let back = "", front = "", inside = "", key = "";
    for (const [v, s] of real(xa.ticks).map(real)) {
      back += `<path d="M${X(v)} ${box.bottom}v5" stroke="${INK}"/>`;
      front += words(X(v), box.bottom + 20, s, 'text-anchor="middle"');
    }
    for (const [v, s] of real(ya.ticks).map(real)) {
      back += `<path d="M${box.left} ${Y(v)}H${box.right}" stroke="${GRID}"/>`;
      front += words(box.left - 8, Y(v) + 4, s, 'text-anchor="end"');
    }
    front += `<path d="M${box.left} ${box.top}V${box.bottom}H${box.right}" fill="none" stroke="${INK}"/>` +
      words((box.left + box.right) / 2, H - 20, xa.label, 'text-anchor="middle" font-size="14"') +
      words(0, 0, ya.label, `text-anchor="middle" font-size="14" transform="translate(${i * width + 16} ` +
        `${(box.top + box.bottom) / 2}) rotate(-90)"`);
    if (p.title) front += words(box.left, 16, p.title, 'font-weight="bold" font-size="15"');
    for (const m of real(p.marks).map(real)) {
      inside += mark(m, X, Y, box);
      if (!m.label) continue;
      const style = `fill="${data.colours[m.role]}" font-weight="bold"`, at = real(m.at);
      if (at) front += words(X(at[0]), Y(at[1]) + 4, m.label, `${style} text-anchor="middle"`);
      else key += `<tspan ${style} dx="${key ? 14 : 0}">${esc(m.label)}</tspan>`;
    }
    const clip = `${root.id}-clip-${i}`;
    return `<clipPath id="${clip}"><rect x="${box.left}" y="${box.top - 1}" width="${box.right - box.left}" ` +
      `height="${box.bottom - box.top + 2}"/></clipPath>${back}<g clip-path="url(#${clip})">${inside}</g>${front}` +
      `<text x="${box.left}" y="${p.title ? 36 : 34}">${key}</text>`;
  }

  const controls = root.querySelectorAll("[data-setting]"), picture = root.querySelector("svg");
  const numbers = root.querySelector("[data-readouts]");
  function draw() {
    let stop = 0;
    const shown = [];
    controls.forEach((control, k) => {
      const setting = data.settings[k], chosen = control.querySelector("input:checked");
      const i = chosen ? +chosen.value : +control.querySelector("input").value;
      stop = stop * setting.stops.length + i;
      shown.push(`${setting.label} ${setting.stops[i]}`);
      const output = control.querySelector("output");
      if (output) {
        output.textContent = setting.stops[i];
        control.querySelector("input").setAttribute("aria-valuetext", setting.stops[i]);
      }
    });
    const chart = real(data.charts[stop]), panels = real(chart.panels).map(real);
    picture.innerHTML = panels.map((p, i) => panel(p, i, panels.length)).join("");
    picture.setAttribute("aria-label", shown.join(", "));
    numbers.innerHTML = real(chart.readouts).map(real)
      .map(([name, value]) => `<span>${esc(name)} <b>${esc(value)}</b></span>`).join("");
  }
  root.addEventListener("input", draw);
  root.addEventListener("submit", event => event.preventDefault());
  draw();
  root.querySelector("[data-live]").hidden = false;
  root.querySelector("[data-asleep]").hidden = true;
  // The static copy is the output right before this one; where the sliders live, one picture is enough.
  const before = root.closest(".jp-OutputArea-child")?.previousElementSibling;
  if (before?.querySelector("img")) before.style.display = "none";
}
