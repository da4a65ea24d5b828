// The list of images: its order and filters, and which of them is open.

class Gallery {
  constructor(viewer) {
    this.viewer = viewer;
    const labels = [...new Set(data.images.map((image) => image.label))].filter((label) => label !== null);
    labels.sort((a, b) => className(a).localeCompare(className(b)));
    byId("class").append(make("option", { value: "" }, "all classes"),
      ...labels.map((label) => make("option", { value: label }, className(label))));
    byId("filters").addEventListener("change", () => this.list());
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("previous").addEventListener("click", () => this.step(-1));
    byId("next").addEventListener("click", () => this.step(1));
    for (const option of byId("which").querySelectorAll("[value=lost], [value=won]")) option.hidden = !labels.length;
    byId("class").closest("label").hidden = !labels.length;
    const single = data.images.length < 2;
    for (const part of [byId("filters").parentElement, byId("previous"), byId("next")]) part.hidden = single;
    document.querySelector(".explorer").classList.toggle("single", single);
    viewer.onMethods = () => this.list();
    this.open(this.sorted()[0]);
  }

  get method() { return this.viewer.panels[0].method; }

  /** The images that pass the filters, in order. */
  sorted() {
    const m = this.method, label = byId("class").value;
    const left = (image) => lastOf(image.runs[m].tokens);
    const right = (image, prediction) => prediction === image.label;
    const passes = {
      all: () => true,
      changed: (image) => changed(image, m),
      lost: (image) => right(image, top(image.dense)) && !right(image, predicted(image, m)),
      won: (image) => !right(image, top(image.dense)) && right(image, predicted(image, m)),
    }[byId("which").value];
    const order = {
      changed: (a, b) => changed(b, m) - changed(a, m),
      most: (a, b) => left(b) - left(a),
      fewest: (a, b) => left(a) - left(b),
      file: () => 0,
    }[byId("order").value];
    return data.images.filter((image) => passes(image) && (label === "" || String(image.label) === label)).sort(order);
  }

  list() {
    const images = this.sorted(), m = this.method;
    byId("count").textContent = `${several(images.length, "image")} of ${data.images.length}` +
      (data.methods.length > 1 ? `, under ${data.methods[m].what}` : "");
    byId("thumbs").replaceChildren(...images.map((image) => this.thumb(image, m)));
  }

  thumb(image, m) {
    const picture = make("img", { src: image.src, alt: "", loading: "lazy" });
    picture.classList.toggle("tiny", image.src.startsWith("data:image/png"));
    const now = className(predicted(image, m)), before = className(top(image.dense));
    const words = changed(image, m)
      ? make("span", { class: "what changed" }, `${before} → ${now}`)
      : make("span", { class: "what" }, now);
    const left = make("span", { class: "what soft" }, several(lastOf(image.runs[m].tokens), "token"));
    const button = make("button", { type: "button" }, picture, words, left);
    if (image === this.viewer.image) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => this.open(image));
    return make("li", {}, button);
  }

  open(image, method = null) {
    if (!image) return;
    const focused = byId("thumbs").contains(document.activeElement);
    this.viewer.open(image, method).then(() => {
      if (focused) byId("thumbs").querySelector("[aria-current=true]")?.focus({ preventScroll: true });
    });
  }

  /** Opens the image that is so many places further in the list. */
  step(by) {
    const images = this.sorted(), at = images.indexOf(this.viewer.image);
    this.open(images[(at + by + images.length) % images.length]);
  }
}
