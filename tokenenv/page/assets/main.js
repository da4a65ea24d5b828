// Puts the parts together; a part without data is not shown.

byId("title").textContent = data.title;
byId("about").textContent = data.about;
byId("note").textContent = data.note;
byId("timing").textContent = data.timing ? `On the clock: ${data.timing}.` : "";

const parts = { images: data.images.length, costs: data.rows.length, methods: data.rows.length, classes: data.classes.length };
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
  byId("charts").append(chart("Accuracy against multiply-adds", "GMACs per image, decisions included (1 MAC = 1 FLOP)", (row) => row.gmacs, pick));
  const batches = data.rows[0].times.map((time) => time.batch), batch = Math.max(...batches);
  if (batches.length) {
    const time = (row) => row.times.find((each) => each.batch === batch)?.ms;
    byId("charts").append(chart("Accuracy against measured time", `milliseconds per image, batch ${batch}`, time, pick));
  }
  byId("chart-key").append(...chartKey());
}
if (parts.classes) classTable();
