// Puts the parts together; a part without data is not shown.

byId("title").textContent = data.title;
byId("about").textContent = data.about;
byId("note").textContent = data.note;
byId("timing").textContent = data.timing ? `On the clock: ${data.timing}.` : "";

const parts = { images: data.images.length, papers: data.tables.length, costs: data.rows.length, methods: data.rows.length, classes: data.classes.length };
for (const [part, there] of Object.entries(parts)) {
  byId(part).hidden = !there;
  document.querySelector(`nav [data-part=${part}]`).hidden = !there;
}
document.querySelector("nav").hidden = Object.values(parts).filter(Boolean).length < 2;
byId("leads-to-viewer").hidden = !parts.images;

const gallery = parts.images ? new Gallery(new Viewer()) : null;

/** Shows the open image under method `m` on the left. */
function showMethod(m) {
  if (gallery && m >= 0) gallery.open(gallery.viewer.image, m);
}

if (parts.methods) {
  const pick = (row) => {
    showMethod(data.methods.findIndex((method) => method.what === row.what));
    pickRow(row);
  };
  methodTable(showMethod);
  const batches = data.rows[0].times.map((time) => time.batch), batch = Math.max(...batches);
  const draw = () => {
    const wide = Math.max(260, byId("charts").clientWidth - 26);
    const charts = [chart("Accuracy against multiply-adds", "GMACs per image", (row) => row.gmacs, pick, wide)];
    if (batches.length) {
      const time = (row) => row.times.find((each) => each.batch === batch)?.ms;
      charts.push(chart("Accuracy against measured time", `milliseconds per image, batch ${batch}`, time, pick, wide));
    }
    byId("charts").replaceChildren(...charts);
  };
  draw();
  let drawn = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== drawn) draw(); // a phone's address bar changes only the height
    drawn = window.innerWidth;
  });
  byId("chart-key").append(...chartKey());
}
byId("seeds").hidden = !data.seeds.length;
if (data.seeds.length) seedTable();
if (parts.papers) paperTables();
if (parts.classes) classTable();
