// One image under one method: pruned patches hatched, merged tokens tinted and outlined.

const TINT = [88, 28, 160], STRONGEST = 0.55, EDGE = "#ff8c00", GONE = "#dcdfe4", HATCH = "#a5adba";

/** Draws the image of `run` on a canvas after one of its steps; `hot` is a token to highlight. */
class TokenCanvas {
  constructor(canvas) {
    this.canvas = canvas;
    this.paper = canvas.getContext("2d", { willReadFrequently: true });
  }

  /** Takes an image element, the grid, and the owners of all steps. */
  open(picture, grid, owners) {
    [this.rows, this.columns] = grid;
    this.owners = owners;
    this.cell = Math.max(4, Math.round(448 / this.columns));
    this.canvas.width = this.cell * this.columns;
    this.canvas.height = this.cell * this.rows;
    this.paper.imageSmoothingEnabled = picture.naturalWidth > 64;
    this.paper.drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
    this.pixels = this.paper.getImageData(0, 0, this.canvas.width, this.canvas.height);
    this.means = this.patchMeans();
  }

  get patches() { return this.rows * this.columns; }
  tokensAt(step) { return this.owners.subarray(step * this.patches, (step + 1) * this.patches); }

  /** Mean red, green and blue of each patch. */
  patchMeans() {
    const { cell, columns } = this, { data: bytes, width } = this.pixels;
    return Array.from({ length: this.patches }, (_, patch) => {
      const sum = [0, 0, 0], left = (patch % columns) * cell, upper = Math.floor(patch / columns) * cell;
      for (let y = upper; y < upper + cell; y++)
        for (let x = left; x < left + cell; x++)
          for (let c = 0; c < 3; c++) sum[c] += bytes[4 * (y * width + x) + c];
      return sum.map((value) => value / (cell * cell));
    });
  }

  draw(step, merges, hot = null) {
    const tokens = this.tokensAt(step), groups = groupsOf(tokens);
    this.paper.putImageData(this.pixels, 0, 0);
    tokens.forEach((token, patch) => {
      if (token === PRUNED) return this.hatch(patch);
      const group = groups.get(token);
      if (merges && group.length > 1) this.fill(patch, this.tinted(group));
    });
    if (merges) this.outline(tokens, EDGE, 2, (a, b) => a !== b && (size(groups, a) > 1 || size(groups, b) > 1));
    if (hot !== null) {
      this.outline(tokens, "#000000", 6, (a, b) => (a === hot) !== (b === hot));
      this.outline(tokens, "#ffffff", 3, (a, b) => (a === hot) !== (b === hot));
    }
  }

  tinted(group) {
    const depth = (STRONGEST * Math.log(group.length)) / Math.log(this.patches);
    const mean = [0, 1, 2].map((c) => group.reduce((sum, p) => sum + this.means[p][c], 0) / group.length);
    return `rgb(${mean.map((value, c) => Math.round((1 - depth) * value + depth * TINT[c])).join(" ")})`;
  }

  corner(patch) { return [(patch % this.columns) * this.cell, Math.floor(patch / this.columns) * this.cell]; }

  fill(patch, colour) {
    const [x, y] = this.corner(patch);
    this.paper.fillStyle = colour;
    this.paper.fillRect(x, y, this.cell, this.cell);
  }

  hatch(patch) {
    const [x, y] = this.corner(patch), { paper, cell } = this;
    this.fill(patch, GONE);
    paper.save();
    paper.beginPath();
    paper.rect(x, y, cell, cell);
    paper.clip();
    paper.strokeStyle = HATCH;
    paper.lineWidth = 1.5;
    paper.beginPath();
    for (let at = -((x + y) % 8); at < 2 * cell; at += 8) {
      paper.moveTo(x + at, y);
      paper.lineTo(x + at - cell, y + cell);
    }
    paper.stroke();
    paper.restore();
  }

  /** Lines between neighbouring patches whose tokens `apart` tells to separate; and at the border. */
  outline(tokens, colour, width, apart) {
    const { paper, cell, rows, columns } = this, outside = -1;
    paper.strokeStyle = colour;
    paper.lineWidth = width;
    paper.beginPath();
    for (let row = 0; row < rows; row++)
      for (let column = 0; column < columns; column++) {
        const own = tokens[row * columns + column], x = column * cell, y = row * cell;
        const right = column + 1 < columns ? tokens[row * columns + column + 1] : outside;
        const below = row + 1 < rows ? tokens[(row + 1) * columns + column] : outside;
        if (apart(own, right)) { paper.moveTo(x + cell, y); paper.lineTo(x + cell, y + cell); }
        if (apart(own, below)) { paper.moveTo(x, y + cell); paper.lineTo(x + cell, y + cell); }
        if (!column && apart(own, outside)) { paper.moveTo(x, y); paper.lineTo(x, y + cell); }
        if (!row && apart(own, outside)) { paper.moveTo(x, y); paper.lineTo(x + cell, y); }
      }
    paper.stroke();
  }

  /** The patch below a mouse or finger. */
  patchAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.rows);
    const inside = row >= 0 && row < this.rows && column >= 0 && column < this.columns;
    return inside ? row * this.columns + column : null;
  }
}

/** The patches of each token. */
function groupsOf(tokens) {
  const groups = new Map();
  tokens.forEach((token, patch) => {
    if (!groups.has(token)) groups.set(token, []);
    groups.get(token).push(patch);
  });
  return groups;
}

const size = (groups, token) => (token === PRUNED ? 0 : groups.get(token)?.length ?? 0);
