// The chosen image under one or two methods, with a slider over the blocks.

const NONE = "";

/** One method's picture and numbers in the viewer. */
class PanelView {
  constructor(side, method, optional, onPick) {
    this.side = side;
    this.select = make("select", { "aria-label": `Method on the ${side}` });
    if (optional) this.select.append(make("option", { value: NONE }, "no second method"));
    data.methods.forEach((each, m) => this.select.append(make("option", { value: m }, each.what)));
    this.select.value = method ?? NONE;
    this.select.addEventListener("change", onPick);
    const canvas = make("canvas", { tabindex: "0", role: "img" });
    this.picture = new TokenCanvas(canvas);
    this.readout = make("p", { class: "readout soft", "aria-live": "polite" });
    this.numbers = make("div");
    this.guesses = make("div", { class: "guesses" });
    this.body = make("div", {}, canvas, this.readout, this.numbers, this.guesses);
    this.element = make("div", { class: "panel" }, this.select, this.body);
    this.cursor = null;
    canvas.addEventListener("pointermove", (event) => this.point(this.picture.patchAt(event)));
    canvas.addEventListener("pointerdown", (event) => this.point(this.picture.patchAt(event)));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("blur", () => this.point(null));
    canvas.addEventListener("keydown", (event) => this.walk(event));
  }

  get method() { return this.select.value === NONE ? null : Number(this.select.value); }

  /** Shows an image under the chosen method. */
  async open(image) {
    this.body.hidden = this.method === null;
    if (this.method === null) return;
    const picture = new Image();
    picture.src = image.src;
    await picture.decode();
    const run = image.runs[this.method], about = data.methods[this.method];
    this.image = image;
    this.run = run;
    this.about = about;
    this.chances = run.chances === null ? null : decoded(run.chances, Uint8Array);
    this.picture.open(picture, about.grid, decoded(run.owners, Uint16Array));
    this.cursor = null;
  }

  /** Shows the state after the last decision up to `block`; null: before the first one. */
  show(block) {
    if (this.method === null) return;
    this.step = block === null ? 0 : this.about.blocks.filter((b) => b <= block).length;
    const { run, step } = this, patches = this.picture.patches;
    const tokens = run.tokens[step], saved = 1 - run.gmacs[step] / this.about.gmacs;
    const cost = `${run.gmacs[step].toPrecision(3)} of ${this.about.gmacs.toPrecision(3)} GMACs, ${percent(saved)} saved`;
    this.numbers.replaceChildren(
      ...meter("tokens left", `${tokens} of ${patches}`, tokens / patches),
      ...meter("multiply-adds (1 MAC = 1 FLOP)", cost, run.gmacs[step] / this.about.gmacs),
    );
    this.guesses.replaceChildren(
      listed("Dense model", "as-dense", this.image.dense, this.image.label),
      listed("With the tokens left", "as-reduced", run.guesses[step], this.image.label),
    );
    this.picture.canvas.setAttribute("aria-label",
      `${this.image.file} under ${this.about.what}: ${tokens} of ${patches} tokens left. Arrow keys move from patch to patch.`);
    this.point(this.cursor);
  }

  /** Highlights the token of a patch and tells about it; null: of none. */
  point(patch) {
    this.cursor = patch;
    if (!this.picture.owners) return;
    const token = patch === null ? null : this.picture.tokensAt(this.step)[patch];
    this.picture.draw(this.step, this.about.merges, token === PRUNED ? null : token);
    this.readout.textContent = patch === null ? "Point at a patch, or use the arrow keys on the picture." : this.told(patch, token);
  }

  told(patch, token) {
    const columns = this.picture.columns, tokens = this.picture.tokensAt(this.step);
    const words = [`Row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`];
    if (token === PRUNED) words.push("pruned");
    else {
      const count = tokens.reduce((sum, other) => sum + (other === token), 0);
      words.push(count > 1 ? `merged: a token of ${several(count, "patch").replace("patchs", "patches")}` : "a token of its own");
    }
    if (this.step) {
      const at = (this.step - 1) * this.picture.patches + patch;
      const chance = this.chances?.[at], verb = this.about.merges ? "merge" : "prune";
      if (this.chances !== null) {
        words.push(chance === NO_AGENT ? "no agent of its own at this decision"
          : `its agent's probability to ${verb}: ${percent(chance / CHANCES)}`);
      }
      const reward = this.reward(patch);
      if (reward !== null) words.push(`reward (${this.about.reward}): ${reward.toPrecision(3).replace("-", "−")}`);
    }
    return words.join("; ") + ".";
  }

  reward(patch) {
    const found = this.run.rewards[this.step];
    if (found === null || typeof found === "number") return found;
    const value = decoded(found, Float32Array)[patch];
    return Number.isNaN(value) ? null : value;
  }

  walk(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const move = moves[event.key], { rows, columns } = this.picture;
    if (event.key === "Escape") return this.point(null);
    if (!move) return;
    event.preventDefault();
    const patch = this.cursor ?? 0;
    const row = clamp(Math.floor(patch / columns) + (this.cursor === null ? 0 : move[0]), rows);
    const column = clamp((patch % columns) + (this.cursor === null ? 0 : move[1]), columns);
    this.point(row * columns + column);
  }
}

const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);

function meter(label, words, share) {
  const bar = make("div", { class: "bar", "aria-hidden": "true" }, make("i"));
  bar.firstChild.style.width = `${Math.min(100, 100 * share)}%`;
  return [make("p", { class: "meter" }, make("span", { class: "soft" }, label), make("span", {}, words)), bar];
}

function listed(title, kind, guesses, label) {
  const list = make("ol");
  for (const [name, probability] of guesses) {
    const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("i"));
    bar.firstChild.style.width = `${100 * probability}%`;
    list.append(make("li", name === label ? { class: "true-class" } : {},
      make("span", { class: "name" }, className(name)), make("span", {}, percent(probability)), bar));
  }
  return make("div", { class: kind }, make("h4", {}, title), list);
}

/** The viewer: two panels, the slider and the button that moves it. */
class Viewer {
  constructor() {
    const pick = () => this.open(this.image);
    this.panels = [new PanelView("left", 0, false, pick)];
    const beside = window.matchMedia("(min-width: 640px)").matches ? 1 : null; // one on a phone
    if (data.methods.length > 1) this.panels.push(new PanelView("right", beside, true, pick));
    byId("panels").append(...this.panels.map((panel) => panel.element));
    this.slider = byId("step");
    this.slider.addEventListener("input", () => { this.stop(); this.show(); });
    byId("play").addEventListener("click", () => (this.timer ? this.stop() : this.play()));
    this.timer = null;
    this.onMethods = () => {};
  }

  /** Shows an image from its start, or where its slider stands; `method`: for the left panel. */
  async open(image, method = null) {
    this.stop();
    if (method !== null) this.panels[0].select.value = method;
    this.image = image;
    const opening = (this.opening = {});
    await Promise.all(this.panels.map((panel) => panel.open(image)));
    if (opening !== this.opening) return; // another image was chosen while this one was decoded
    const chosen = this.panels.filter((panel) => panel.method !== null);
    const blocks = new Set(chosen.flatMap((panel) => panel.about.blocks));
    this.blocks = [null, ...[...blocks].sort((a, b) => a - b)];
    const last = this.blocks.length - 1, stood = Number(this.slider.value) / (Number(this.slider.max) || 1);
    this.slider.max = last;
    this.slider.value = this.opened ? Math.round(stood * last) : last;
    this.opened = true;
    byId("panels").classList.toggle("two", chosen.length > 1);
    byId("image-title").textContent = image.file;
    byId("image-class").textContent = image.label === null ? "true class unknown" : `true class: ${className(image.label)}`;
    this.tellLegend(chosen);
    this.show();
    this.onMethods();
  }

  tellLegend(chosen) {
    const merges = chosen.some((panel) => panel.about.merges), prunes = chosen.some((panel) => !panel.about.merges);
    const words = [];
    if (prunes || chosen.some((panel) => panel.picture.owners.includes(PRUNED))) words.push("Hatched: pruned, later blocks do not compute it.");
    if (merges) words.push("Outlined: patches merged into one token, in their mean colour; the more patches, the more violet.");
    const agents = chosen.find((panel) => panel.about.reward);
    if (agents && this.image.label === null) words.push("The true class is unknown: rewards take the dense model's class for it.");
    byId("legend").textContent = words.join(" ");
  }

  show() {
    const step = Number(this.slider.value), block = this.blocks[step];
    const decides = this.panels.find((panel) => panel.method !== null && panel.about.blocks.includes(block));
    const between = decides?.about.between;
    const words = block === null ? "before the first decision" : `after the decision ${between ? "in" : "before"} block ${block}`;
    byId("step-name").textContent = words;
    this.slider.setAttribute("aria-valuetext", words);
    for (const panel of this.panels) panel.show(block);
  }

  play() {
    const last = Number(this.slider.max);
    if (Number(this.slider.value) === last) this.slider.value = 0;
    this.show();
    this.setPlaying(setInterval(() => {
      this.slider.value = Number(this.slider.value) + 1;
      this.show();
      if (Number(this.slider.value) === last) this.stop();
    }, 900));
  }

  stop() {
    clearInterval(this.timer);
    this.setPlaying(null);
  }

  setPlaying(timer) {
    this.timer = timer;
    byId("play").textContent = timer ? "Pause" : "Play";
    byId("play").setAttribute("aria-pressed", String(Boolean(timer)));
  }
}
