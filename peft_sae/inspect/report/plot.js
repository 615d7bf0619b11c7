// Plots: drawn as SVG to the width that there is, with one tooltip for all.

const UNKNOWN = "\u2013", SHAPES = 7;
const tip = document.getElementById("tip");

// An element with attributes and children; a string becomes text and is never read as HTML.
function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// A text on one line: what cannot be seen (control characters, line breaks, marks that turn the direction) is spelled out.
function visible(text) {
  const short = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };
  const spelled = (char) => short[char] ?? `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`;
  return String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, spelled);
}

function number(value, digits = 3) {
  if (typeof value !== "number") return UNKNOWN;
  const size = Math.abs(value);
  const text = size >= 10 ** digits && size < 1e15 ? Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f")
    : Number.isInteger(value) ? String(value) : value.toPrecision(digits);
  return text.replace(/-/g, "\u2212");
}

// The mark of an axis: the same without zeros behind the point.
function tick(value, kind) {
  return kind === "share" ? `${number(Number((100 * value).toPrecision(4)), 4)}\u00a0%`
    : FORMATS[kind](Number(value.toPrecision(4))).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

const FORMATS = {
  number: (value) => number(value),
  count: (value) => number(value, 6),
  share: (value) => typeof value === "number" ? `${number(100 * value)}\u00a0%` : UNKNOWN,
  degrees: (value) => typeof value === "number" ? `${number(value)}°` : UNKNOWN,
  times: (value) => typeof value === "number" ? `${number(value, 2)}\u00d7` : UNKNOWN,
  signed: (value) => (value > 0 ? "+" : "") + number(value),
};

// Where a value stands on an axis, and the values to mark.
function scale(axis, values, from, to) {
  const bend = axis.scale === "root" ? (value) => Math.sign(value) * Math.sqrt(Math.abs(value)) : (value) => value;
  let low = axis.min ?? Math.min(...values), high = axis.max ?? Math.max(...values);
  if (!(high > low)) [low, high] = [Math.min(low, 0), Math.max(high, low + (Math.abs(low) || 1))];
  const space = 0.04 * (bend(high) - bend(low));
  const first = bend(low) - (axis.min === undefined ? space : 0), last = bend(high) + (axis.max === undefined ? space : 0);
  const place = (value) => from + (bend(value) - first) / (last - first) * (to - from);
  return { place, ticks: ticks(axis, low, high, place, Math.abs(to - from)) };
}

function ticks(axis, low, high, place, length) {
  const wanted = Math.max(2, length / (axis.vertical ? 45 : 70));
  if (axis.kind === "degrees") return [0, 30, 60, 90];
  if (axis.scale === "root") {
    const found = [0];
    for (let size = Math.max(Math.abs(low), Math.abs(high)); found.length < wanted; size /= 4) {
      const round = Number(size.toPrecision(1));
      for (const value of [round, -round])
        if (value >= low && value <= high && found.every((one) => Math.abs(place(one) - place(value)) > 40)) found.push(value);
      if (!(size > 0) || Math.abs(place(size) - place(0)) < 40) break;
    }
    return found.filter((value) => value >= low && value <= high);
  }
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  let step = power * [1, 2, 5, 10].find((one) => one * power >= raw);
  if (axis.kind === "count") step = Math.max(1, Math.round(step));
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9 * step; value += step)
    found.push(Number(value.toPrecision(12)));
  return found;
}

// The outline of a mark; kinds differ in shape, so that nothing hangs on colour.
function outline(shape, x, y, r) {
  const points = {
    1: [[-1, -1], [1, -1], [1, 1], [-1, 1]],
    2: [[0, -1.25], [1.15, 0.9], [-1.15, 0.9]],
    3: [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]],
    4: [[0, 1.25], [1.15, -0.9], [-1.15, -0.9]],
    5: [[-0.45, -1.3], [0.45, -1.3], [0.45, -0.45], [1.3, -0.45], [1.3, 0.45], [0.45, 0.45], [0.45, 1.3], [-0.45, 1.3],
      [-0.45, 0.45], [-1.3, 0.45], [-1.3, -0.45], [-0.45, -0.45]],
    6: [[-1, -1.3], [1, -1.3], [-1, 1.3], [1, 1.3]],
  }[shape];
  if (!points) return `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`;
  return `M${points.map(([dx, dy]) => `${(x + r * dx).toFixed(1)},${(y + r * dy).toFixed(1)}`).join("L")}z`;
}

function mark(one, index, x, y, r = 4.5) {
  return drawn("path", { d: outline(index % SHAPES, x, y, r), class: `mark c${index % SHAPES}${one.hollow ? " hollow" : ""}` });
}

function legend(plot) {
  const icon = (...inside) => drawn("svg", { width: 22, height: 14, "aria-hidden": "true" }, ...inside);
  const items = plot.series.map((one, index) => [plot.line
    ? icon(drawn("path", { d: "M0,7H22", class: `line c${index} dash${index}` })) : icon(mark(one, index, 11, 7)), one.name]);
  if (plot.bars) items.push([icon(drawn("path", { d: "M11,14V2M8,2H14", class: "bar c0" })), plot.bars]);
  if (plot.control) items.push([icon(drawn("path", { d: "M4,7H18", class: "control" })), plot.control.name]);
  if (plot.diagonal) items.push([icon(drawn("path", { d: "M2,13L20,1", class: "diagonal" })), plot.diagonal]);
  return element("ul", { class: "legend" }, ...items.map(([sign, name]) => element("li", {}, sign, visible(name))));
}

function axes(plot, width, height, edge, x, y) {
  const [left, right, top, bottom] = [edge.left, width - edge.right, edge.top, height - edge.bottom];
  const text = (kind, px, py, words, anchor, turn = null) =>
    drawn("text", { class: kind, x: px, y: py, "text-anchor": anchor, transform: turn }, words);
  const names = new Map(plot.x.names ?? []);
  const parts = [];
  for (const value of y.ticks) {
    parts.push(drawn("path", { d: `M${left},${y.place(value)}H${right}`, class: "grid" }));
    parts.push(text("tick", left - 8, y.place(value) + 4, tick(value, plot.y.kind), "end"));
  }
  for (const value of [...x.ticks.filter((one) => !names.has(one)), ...names.keys()]) {
    parts.push(drawn("path", { d: `M${x.place(value)},${bottom}v5`, class: "axis" }));
    parts.push(text("tick", x.place(value), bottom + 19, names.get(value) ?? tick(value, plot.x.kind), "middle"));
  }
  parts.push(drawn("path", { d: `M${left},${top}V${bottom}H${right}`, class: "axis" }));
  parts.push(text("label", (left + right) / 2, height - 6, plot.x.label, "middle"));
  const middle = (top + bottom) / 2;
  parts.push(text("label", 14, middle, plot.y.label, "middle", `rotate(-90 14 ${middle})`));
  return parts;
}

function draw(holder, plot) {
  const square = Boolean(plot.diagonal), width = Math.min(Math.max(280, holder.clientWidth), square ? 660 : Infinity);
  const height = square ? width - 24 : width < 600 ? 300 : 340;
  const edge = { left: 68, right: 14, top: 12, bottom: 46 };
  const points = plot.series.flatMap((one, index) => one.points.map((point) => ({ point, one, index })));
  const control = plot.control?.points ?? [];
  const ys = [...points.flatMap(({ point }) => [point[1], point[3] ?? point[1]]), ...control.map((one) => one[1])];
  const xs = points.map(({ point }) => point[0]), both = square ? [...xs, ...ys] : null;
  const x = scale(plot.x, both ?? xs, edge.left, width - edge.right);
  const y = scale({ ...plot.y, vertical: true }, both ?? ys, height - edge.bottom, edge.top);
  const still = drawn("g", { role: "img", "aria-label": `${plot.title}. ${plot.alt}` }, ...axes(plot, width, height, edge, x, y));
  if (square) {
    const [low, high] = [Math.min(...both), Math.max(...both)];
    still.append(drawn("path", { d: `M${x.place(low)},${y.place(low)}L${x.place(high)},${y.place(high)}`, class: "diagonal" }));
  }
  for (const [cx, cy] of control) still.append(drawn("path", { d: `M${x.place(cx) - 6},${y.place(cy)}h12`, class: "control" }));
  if (plot.line) plot.series.forEach((one, index) => {
    const path = one.points.map((point) => `${x.place(point[0]).toFixed(1)},${y.place(point[1]).toFixed(1)}`).join("L");
    still.append(drawn("path", { d: `M${path}`, class: `line c${index} dash${index}` }));
  });
  const marks = drawn("g", { role: "list", "aria-label": `Values of: ${plot.title}. Arrow keys go from one to the next.` });
  const placed = points.map(({ point, one, index }) => {
    const px = x.place(point[0]), py = y.place(point[1]);
    if (point[3] !== null) still.append(drawn("path", { d: `M${px},${py}V${y.place(point[3])}m-3,0h6`, class: `bar c${index % SHAPES}` }));
    const node = mark(one, index, px, py, plot.line ? 3.5 : width < 600 ? 3.6 : 4.5);
    if (plot.line) node.classList.add("quiet");
    filled(node, { role: "listitem", tabindex: -1, "aria-label": point[2].map(visible).join(", ") }, []);
    return { node, x: px, y: py, lines: point[2] };
  });
  // Features of the Subspace lie above the others, and so do the first kinds of modules.
  marks.append(...placed.map(({ node }) => node).reverse());
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-describedby": `${plot.id}-about` }, still, marks);
  holder.replaceChildren(legend(plot), svg);
  wander(svg, placed);
}

// One stop for the tab key per plot; arrow keys go from mark to mark, and a pointer finds the nearest one.
function wander(svg, placed) {
  const order = [...placed].sort((a, b) => a.x - b.x || a.y - b.y);
  let here = 0;
  order[0].node.setAttribute("tabindex", 0);
  const hide = () => { tip.hidden = true; svg.querySelector(".near")?.classList.remove("near"); };
  const show = (one) => {
    hide();
    one.node.classList.add("near");
    tip.replaceChildren(...one.lines.map((line, place) => element(place ? "div" : "b", {}, visible(line))));
    tip.hidden = false;
    const box = one.node.getBoundingClientRect(), room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, Math.min(room, box.left + box.width / 2 - tip.offsetWidth / 2))}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  };
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  svg.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    order[here].node.setAttribute("tabindex", -1);
    here = Math.max(0, Math.min(order.length - 1, here + steps[event.key]));
    order[here].node.setAttribute("tabindex", 0);
    order[here].node.focus();
  });
  svg.addEventListener("focusin", (event) => show(order.find((one) => one.node === event.target) ?? order[here]));
  svg.addEventListener("focusout", hide);
  const seek = (event) => {
    const box = svg.getBoundingClientRect(), [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const distance = (one) => Math.hypot(one.x - px, one.y - py);
    const nearest = order.reduce((best, one) => distance(one) < distance(best) ? one : best);
    if (distance(nearest) < 24) show(nearest); else hide();
  };
  svg.addEventListener("pointermove", seek);
  svg.addEventListener("pointerdown", seek);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
}
