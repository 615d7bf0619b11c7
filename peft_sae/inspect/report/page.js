// Reads the data of the page and fills it in.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const inspection = read("inspection"), views = read("views");

for (const holder of document.querySelectorAll("[data-table]")) {
  const name = holder.dataset.table;
  table(holder, views.tables[name], inspection[name], name);
}

const plots = new Map(views.plots.map((plot) => [plot.id, plot]));
const widths = new Map();
const watch = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  if (widths.get(target) === target.clientWidth) return;
  widths.set(target, target.clientWidth);
  draw(target, plots.get(target.dataset.plot));
}));
document.querySelectorAll("[data-plot]").forEach((holder) => watch.observe(holder));
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
