// The table of methods, and that of classes, which its headings sort.

function methodTable(onShow) {
  const batches = data.rows[0].times.map((time) => time.batch);
  const heads = ["method", "backbone", "top-1 %", "change, pp [95 %]", "same as dense %", "GMACs", "saved %",
    ...batches.flatMap((batch) => [`ms, batch ${batch}`, `speed-up, batch ${batch}`])];
  const body = make("tbody");
  for (const row of data.rows) {
    const [mean, low, high] = row.change;
    const change = row.dense ? "–" : `${signed(mean)} [${signed(low)}, ${signed(high)}]`;
    const tone = high < 0 ? "worse" : low > 0 ? "better" : "";
    const name = make("th", { scope: "row" }, row.what);
    const m = data.methods.findIndex((method) => method.what === row.what);
    if (m >= 0) {
      const link = make("a", { href: "#images" }, row.what);
      link.addEventListener("click", () => onShow(m));
      name.replaceChildren(link);
    }
    if (row.front) name.append(make("span", { role: "img", "aria-label": "on the Pareto front" }, " ★"));
    const cells = [row.dense ? "–" : row.frozen ? "frozen" : "fine-tuned", row.top1.toFixed(2)];
    const rest = [row.agreement.toFixed(1), row.gmacs.toPrecision(4), row.saved.toFixed(1),
      ...batches.flatMap((batch) => {
        const time = row.times.find((each) => each.batch === batch);  // the row of exact savings has none
        return time ? [time.ms.toPrecision(3), `${time.speedup.toFixed(2)} ×`] : ["–", "–"];
      })];
    body.append(make("tr", { id: rowId(row), tabindex: "-1" }, name, ...cells.map((c) => make("td", {}, c)),
      make("td", { class: tone }, change), ...rest.map((c) => make("td", {}, c))));
  }
  byId("method-table").append(make("caption", { class: "skip" }, "Methods with accuracy and cost"),
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))), body);
}

function seedTable() {
  const spread = ({ mean, sd, low, high }, show) => `${show(mean)} ± ${sd.toFixed(2)} [${show(low)}, ${show(high)}]`;
  const plain = (value) => value.toFixed(2), heads = ["runs", "seeds", "top-1 %", "change, pp", "saved %", "same as dense %"];
  const rows = data.seeds.map((row) => make("tr", {}, make("th", { scope: "row", title: row.rows.join(", ") }, row.what),
    ...[String(row.rows.length), spread(row.top1, plain), spread(row.change, signed), spread(row.saved, plain),
      spread(row.agreement, plain)].map((cell) => make("td", {}, cell))));
  byId("seed-table").append(make("caption", { class: "skip" }, "Runs of several seeds"),
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))), make("tbody", {}, ...rows));
}

/** The tables of a paper with ours, ready as text, and what has to be known about them. */
function paperTables() {
  for (const table of data.tables) {
    const rows = table.rows.map(([first, ...cells]) => make("tr", {}, make("th", { scope: "row" }, first), ...cells.map((cell) => make("td", {}, cell))));
    byId("paper-tables").append(make("h3", {}, table.title), make("p", { class: "soft" }, table.note),
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": table.title }, make("table", {},
        make("caption", { class: "skip" }, table.title),
        make("thead", {}, make("tr", {}, ...table.heads.map((head) => make("th", { scope: "col" }, head)))), make("tbody", {}, ...rows))));
  }
  byId("paper-notes").append(...data.notes.map((note) => make("li", {}, note)));
}

/** Marks the row of a method and moves the focus to it. */
function pickRow(row) {
  for (const other of byId("method-table").querySelectorAll(".picked")) other.classList.remove("picked");
  byId(rowId(row)).classList.add("picked");
  byId(rowId(row)).focus({ preventScroll: true });
}

function classTable() {
  const whats = Object.keys(data.classes[0].top1);
  const columns = [
    { head: "class", value: (row) => row.name, text: (row) => row.name },
    { head: "images", value: (row) => row.images, text: (row) => String(row.images) },
    ...whats.map((what) => ({ head: what, value: (row) => row.top1[what], text: (row) => row.top1[what].toFixed(1) })),
  ];
  const body = make("tbody"), heads = columns.map((column) => make("th", { scope: "col" }));
  const fill = (rows) => body.replaceChildren(...rows.map((row) => make("tr", {},
    ...columns.map((column, i) => make(i ? "td" : "th", i ? { class: tone(row, column.head) } : { scope: "row" }, column.text(row))))));
  columns.forEach((column, i) => {
    const button = make("button", { type: "button" }, column.head);
    button.addEventListener("click", () => {
      const falling = heads[i].getAttribute("aria-sort") !== "descending";
      for (const head of heads) head.removeAttribute("aria-sort");
      heads[i].setAttribute("aria-sort", falling ? "descending" : "ascending");
      fill([...data.classes].sort((a, b) => (falling ? -1 : 1) * compared(column.value(a), column.value(b))));
    });
    heads[i].append(button);
  });
  fill(data.classes);
  byId("class-table").append(make("caption", { class: "skip" }, "Top-1 class by class"), make("thead", {}, make("tr", {}, ...heads)), body);
}

const compared = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);

function tone(row, what) {
  if (!(what in row.top1) || what === "dense") return "";
  const change = row.top1[what] - row.top1.dense;
  return change < 0 ? "worse" : change > 0 ? "better" : "";
}
