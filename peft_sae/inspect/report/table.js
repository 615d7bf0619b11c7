// Tables: built some rows at a time, sorted by a column's head, filtered by words and by choices.

const PAGE = matchMedia("(max-width: 62rem)").matches ? 20 : 100;  // rows are cards on a small screen
const NUMBERS = new Set(["number", "share", "degrees", "times", "signed"]);
const SIDES = { read: "reads", write: "writes" };

// Long names may break behind a dot or a slash, and in narrow columns behind an underscore.
function breakable(text, behind = /(?<=[./])/) {
  return visible(text).split(behind).flatMap((part, place) => place ? [element("wbr"), part] : [part]);
}

function word(token) {
  return visible(token.replace(/^ +| +$/g, "") || "\u2423");
}

function example(one) {
  const about = `${visible(one.label)}, ${number(one.activation)}: `;
  return element("p", { class: "text" }, element("span", { class: "soft" }, about), visible(one.before),
    element("mark", {}, visible(one.token)), visible(one.after));
}

// The bars of a few numbers, beside the largest of them.
function spark(values) {
  const shown = values.slice(0, 32), most = Math.max(...shown) || 1;
  const bars = shown.map((value, place) => `M${3 * place + 1.5},18V${(18 - 17 * Math.max(0, value ?? 0) / most).toFixed(1)}`);
  const said = `${values.length} values from ${number(values[0])} to ${number(values[values.length - 1])}`;
  return drawn("svg", { role: "img", "aria-label": said, class: "spark", width: 3 * shown.length, height: 18 },
    drawn("title", {}, said), drawn("path", { d: bars.join("") }));
}

const CELLS = {
  text: (value) => value === null ? [] : breakable(value, /(?<=[._/])/),
  side: (value) => [SIDES[value] ?? UNKNOWN],
  name: (value, row) => /^https?:\/\//i.test(row.neuronpedia ?? "")
    ? [element("a", { href: row.neuronpedia, rel: "noopener noreferrer", target: "_blank",
      title: "dashboard on Neuronpedia" }, ...breakable(value))] : breakable(value),
  tokens: (value, row, column) => [
    ...value.map((token) => element("span", { class: "token" }, (column.second ? "\u2191\u2009" : "") + word(token))),
    ...(row[column.second] ?? []).map((token) => element("span", { class: "token lowered" }, "\u2193\u2009" + word(token)))],
  examples: (value) => {
    const [first, ...rest] = value.map(example);
    const more = rest.length ? [element("details", {}, element("summary", {}, `${rest.length} more`), ...rest)] : [];
    return first ? [first, ...more] : [];
  },
  spark: (value) => value?.length ? [spark(value)] : [UNKNOWN],
};

function sortValue(row, column) {
  const value = row[column.key];
  if (column.kind === "examples") return value.length ? Math.max(...value.map((one) => one.activation)) : null;
  if (column.kind === "spark") return value?.[0] ?? null;
  if (column.kind === "tokens") return value.join(" ") || null;
  return value ?? null;
}

// Smaller first or larger first; what is unknown is last either way.
function compare(a, b, column, turn) {
  const [first, second] = [sortValue(a, column), sortValue(b, column)];
  if (first === null || second === null) return (first === null) - (second === null);
  return turn * (typeof first === "number" ? first - second : order.compare(first, second));
}
const order = new Intl.Collator("en", { numeric: true });

function words(row) {
  return JSON.stringify([row.name, row.label, row.module, row.hook_name, row.top_module, row.tokens, row.promoted,
    row.suppressed, row.examples?.map((one) => one.before + one.token + one.after)]).toLowerCase();
}

function picked(row, key, wanted) {
  if (wanted === "") return true;
  return key === "change" ? (wanted === "up" ? row.change > 0 : row.change < 0) : row[key] === wanted;
}

function table(holder, view, rows, name) {
  const state = { sort: view.columns.find((one) => one.key === view.sort) ?? null, turn: -1, shown: PAGE };
  const found = new Map(rows.map((row) => [row, `${words(row)} ${row.block}:${row.feature}`]));
  const search = element("input", { type: "search", id: `${name}-search`, placeholder: view.hint, autocomplete: "off" });
  const controls = [element("label", {}, "Search", search)];
  const picks = view.picks.filter((pick) => rows.some((row) => typeof row[pick.key] === "string" || pick.key === "change"));
  const selects = picks.map((pick) => {
    const select = element("select", { id: `${name}-${pick.key}` }, element("option", { value: "" }, "all"));
    for (const [value, called] of pick.options)
      if (rows.some((row) => picked(row, pick.key, value))) select.append(element("option", { value }, called));
    controls.push(element("label", {}, pick.head, select));
    return [pick.key, select];
  });
  const status = element("p", { class: "status", role: "status" });
  const body = element("tbody", { role: "rowgroup" });
  const more = element("button", { type: "button", class: "more" });
  const heads = view.columns.map((column) => {
    const button = element("button", { type: "button", title: column.meaning || null }, column.head);
    const head = element("th", { scope: "col", role: "columnheader", "aria-sort": "none",
      class: NUMBERS.has(column.kind) ? "number" : null }, button);
    button.addEventListener("click", () => {
      const numeric = NUMBERS.has(column.kind) || column.kind === "examples" || column.kind === "spark";
      state.turn = state.sort === column ? -state.turn : numeric ? -1 : 1;
      state.sort = column;
      state.shown = PAGE;
      show();
    });
    return head;
  });

  function cell(row, column) {
    const value = row[column.key] ?? null;
    const inside = CELLS[column.kind]?.(value, row, column) ?? [FORMATS[column.kind](value)];
    const kind = `${NUMBERS.has(column.kind) ? "number " : ""}k-${column.kind}`;
    return element("td", { role: "cell", class: inside.length ? kind : "empty", "data-head": column.head },
      element("div", {}, ...inside));
  }

  function show() {
    const text = search.value.trim().toLowerCase();
    const wanted = JSON.stringify(text).slice(1, -1);
    const kept = rows.filter((row) => found.get(row).includes(wanted)
      && selects.every(([key, select]) => picked(row, key, select.value)));
    if (state.sort) kept.sort((a, b) => compare(a, b, state.sort, state.turn));
    heads.forEach((head, place) => head.setAttribute("aria-sort",
      view.columns[place] !== state.sort ? "none" : state.turn > 0 ? "ascending" : "descending"));
    body.replaceChildren(...kept.slice(0, state.shown).map((row) =>
      element("tr", { role: "row" }, ...view.columns.map((column) => cell(row, column)))));
    const shown = Math.min(state.shown, kept.length);
    status.textContent = shown < kept.length ? `${shown} of ${kept.length} ${view.noun} shown`
      : `${kept.length} ${view.noun}` + (kept.length < rows.length ? ` of ${rows.length}` : "");
    more.hidden = shown >= kept.length;
    more.textContent = `Show ${Math.min(PAGE, kept.length - shown)} more`;
  }

  const again = () => { state.shown = PAGE; show(); };
  search.addEventListener("input", again);
  selects.forEach(([, select]) => select.addEventListener("change", again));
  more.addEventListener("click", () => {
    const before = body.rows.length;
    state.shown += PAGE;
    show();
    if (more.hidden && body.rows[before]) {  // the button has gone, so the focus moves to what it brought
      body.rows[before].tabIndex = -1;
      body.rows[before].focus();
    }
  });
  const grid = element("table", { role: "table", "aria-labelledby": `${name}-head` },
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads)), body);
  holder.replaceChildren(element("div", { class: "controls" }, ...controls), status, grid, more);
  show();
}
