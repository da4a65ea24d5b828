// Accuracy against a cost, as plain SVG: every dot is a link with a name.

const SHAPES = ["circle", "square", "up", "diamond", "down"];
const WIDEST = 560, TALL = 340, LEFT = 52, RIGHT = 18, UPPER = 14, LOWER = 46;

/** Steps of 1, 2 or 5 times a power of ten: about `count` of them from `low` to `high`. */
function ticks(low, high, count = 5) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(10)));
  return found;
}

/** Smallest and largest value with a margin, within `least` and `most`. */
function range(values, least, most) {
  const low = Math.min(...values), high = Math.max(...values), margin = 0.08 * (high - low) || 0.5 * Math.abs(high) || 1;
  return [Math.max(low - margin, least), Math.min(high + margin, most)];
}

function shape(kind, x, y, r, attributes) {
  const points = {
    up: [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]], down: [[0, 1.2], [1.1, -0.9], [-1.1, -0.9]],
    diamond: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]], square: [[-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]],
    star: Array.from({ length: 10 }, (_, i) => {
      const angle = (Math.PI * i) / 5 - Math.PI / 2, far = i % 2 ? 0.65 : 1.6;
      return [far * Math.cos(angle), far * Math.sin(angle)];
    }),
  }[kind];
  if (!points) return svg("circle", { cx: x, cy: y, r, ...attributes });
  return svg("polygon", { points: points.map(([a, b]) => `${x + r * a},${y + r * b}`).join(" "), ...attributes });
}

/** Colour and shape of each method; the settings of a sweep share one. */
function looks() {
  const names = [...new Set(data.rows.map((row) => row.method))].filter((name) => name !== "dense");
  return new Map([["dense", { colour: "var(--ink)", kind: "star" }],
    ...names.map((name, i) => [name, { colour: `var(--c${i % 8})`, kind: SHAPES[i % SHAPES.length] }])]);
}

/** A chart of the rows, `wide` pixels wide so that text has its size; `cost(row)` is a number. */
function chart(title, axis, cost, onPick, wide) {
  const WIDE = Math.min(WIDEST, wide), styles = looks();
  const rows = data.rows.filter((row) => cost(row) !== undefined); // not all were timed
  const [x0, x1] = range(rows.map(cost), 0, Infinity);
  const [y0, y1] = range(rows.flatMap((row) => [row.low, row.high]), -2, 102);
  const px = (value) => LEFT + ((value - x0) / (x1 - x0)) * (WIDE - LEFT - RIGHT);
  const py = (value) => TALL - LOWER - ((value - y0) / (y1 - y0)) * (TALL - UPPER - LOWER);
  const picture = svg("svg", { viewBox: `0 0 ${WIDE} ${TALL}`, role: "group", "aria-label": `${title}: ${several(rows.length, "dot")}` });
  for (const value of ticks(y0, y1).filter((v) => v >= 0 && v <= 100)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDE - RIGHT, y1: py(value), y2: py(value) }),
      svg("text", { x: LEFT - 7, y: py(value) + 4, "text-anchor": "end" }, String(value)));
  }
  for (const value of ticks(x0, x1, WIDE < 400 ? 4 : 5)) {
    picture.append(svg("line", { class: "grid", x1: px(value), x2: px(value), y1: UPPER, y2: TALL - LOWER }),
      svg("text", { x: px(value), y: TALL - LOWER + 18, "text-anchor": "middle" }, String(value)));
  }
  picture.append(svg("text", { x: (LEFT + WIDE - RIGHT) / 2, y: TALL - 8, "text-anchor": "middle" }, axis),
    svg("text", { transform: `translate(14 ${(UPPER + TALL - LOWER) / 2}) rotate(-90)`, "text-anchor": "middle" }, "top-1, %"));
  const best = frontier(rows, cost);
  const path = best.map((row, i) => (i ? `H${px(cost(row))}V${py(row.top1)}` : `M${px(cost(row))},${py(row.top1)}`));
  picture.append(svg("path", { class: "front", d: path.join("") }));
  const dense = rows.find((row) => row.dense);
  if (dense) picture.append(svg("line", { class: "dense-line", x1: LEFT, x2: WIDE - RIGHT, y1: py(dense.top1), y2: py(dense.top1) }));
  for (const [name, look] of styles) {
    const own = rows.filter((row) => row.method === name).sort((a, b) => cost(a) - cost(b));
    if (own.length > 1) picture.append(svg("polyline", { class: "series", stroke: look.colour, points: own.map((row) => `${px(cost(row))},${py(row.top1)}`).join(" ") }));
  }
  const told = make("p", { class: "picked", "aria-live": "polite" }, "Choose a dot to read about its method.");
  for (const row of rows) {
    const { colour, kind } = styles.get(row.method), x = px(cost(row)), y = py(row.top1);
    const words = `${row.what}: top-1 ${row.top1.toFixed(2)} %, ${axis} ${cost(row)}`;
    const link = svg("a", { href: `#${rowId(row)}`, "aria-label": words });
    link.append(svg("line", { class: "interval", stroke: colour, x1: x, x2: x, y1: py(row.low), y2: py(row.high) }),
      shape(kind, x, y, 6, { fill: row.frozen ? colour : "var(--card)", stroke: colour, "stroke-width": 2 }),
      svg("circle", { class: "ring", cx: x, cy: y, r: 12 }));
    for (const name of ["pointerenter", "focus"]) link.addEventListener(name, () => (told.textContent = words));
    link.addEventListener("click", () => onPick(row));
    picture.append(link);
  }
  return make("figure", { class: "chart" }, make("figcaption", {}, title), picture, told);
}

/** Rows that no other row beats in cost and top-1, by falling cost, so that steps lead left. */
function frontier(rows, cost) {
  const front = [];
  for (const row of [...rows].sort((a, b) => cost(a) - cost(b) || b.top1 - a.top1))
    if (!front.length || row.top1 > lastOf(front).top1) front.push(row);
  return front;
}

const rowId = (row) => `row-${data.rows.indexOf(row)}`;

/** The key: each method once. */
function chartKey() {
  return [...looks()].map(([name, { colour, kind }]) => {
    const mark = svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape(kind, 0, 0, 5, { fill: colour }));
    return make("li", {}, mark, name);
  });
}
