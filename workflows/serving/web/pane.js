// One picture with its results: a canvas and a list that single the same object out.

import { decodeMask } from "./rle.js";

/** A colour of the label with this index, dark enough for white text: golden-ratio steps around the hue circle. */
export function colour(index, alpha = 1) {
  return `oklch(0.46 0.17 ${Math.round(((index * 0.618034) % 1) * 360)} / ${alpha})`;
}

const el = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
};

export class Pane {
  /** `onPrompt({kind: "point" | "box", ...})` is called with pixels of the picture. */
  constructor(title, onPrompt) {
    this.onPrompt = onPrompt;
    this.objects = [];
    this.labels = [];
    this.prompts = null;
    this.single = -1;
    this.pointing = false;
    this.cursor = null;
    this.drag = null;
    this.canvas = el("canvas", { tabIndex: -1, width: 10, height: 10 });
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "No picture yet");
    this.view = el("div", { className: "view" }, this.canvas);
    this.list = el("ul", { className: "found" });
    this.empty = el("p", { className: "empty" });
    this.heading = el("h2", { textContent: title });
    this.element = el("div", { className: "pane" }, this.heading, this.view, el("div", {}, this.empty, this.list));
    this._listen();
    new ResizeObserver(() => this.draw()).observe(this.view);
  }

  setPicture(picture) {
    this.picture = picture;
    this.drag = null;
    this.show([], 0);
  }

  /** Show detections or segments whose score is above the threshold, or labels of the whole picture. */
  show(objects, threshold, names = []) {
    this.names = names;
    this.all = objects;
    this.objects = objects.filter((entry) => entry.score == null || entry.score > threshold || entry.always);
    for (const entry of this.objects) entry.tint ??= entry.mask ? this._tint(entry.mask) : null;
    this.single = -1;
    this._fillList();
    this.draw();
  }

  _key(entry, row) {
    return entry.mask ? row : Math.max(0, this.names.indexOf(entry.label));
  }

  _tint(mask) {
    const [height, width] = mask.size;
    return { bits: decodeMask(mask), width, height, images: new Map() };
  }

  _mask(entry, index) {
    const { bits, width, height, images } = entry.tint;
    if (!images.has(index)) {
      const canvas = new OffscreenCanvas(width, height), pen = canvas.getContext("2d");
      pen.fillStyle = colour(index);
      pen.fillRect(0, 0, 1, 1);
      const [red, green, blue] = pen.getImageData(0, 0, 1, 1).data;
      const pixels = pen.createImageData(width, height);
      for (let i = 0; i < bits.length; i++) {
        if (bits[i]) pixels.data.set([red, green, blue, 140], 4 * i);
      }
      pen.putImageData(pixels, 0, 0);
      images.set(index, canvas);
    }
    return images.get(index);
  }

  _fillList() {
    const focused = [...this.list.querySelectorAll("button")].indexOf(document.activeElement);
    this.list.replaceChildren(
      ...this.objects.map((entry, row) => {
        const swatch = el("span", { className: "swatch" });
        swatch.style.background = colour(this._key(entry, row));
        const score = entry.score == null ? "" : entry.score.toFixed(2);
        const button = el(
          "button", { type: "button" },
          swatch,
          el("span", { className: "name", textContent: entry.label ?? "mask" }),
          el("span", { className: "score", textContent: score }),
        );
        if (entry.bar) {
          const bar = el("i");
          bar.style.width = `${100 * entry.score}%`;
          button.append(el("span", { className: "bar" }, bar));
        }
        button.onmouseenter = button.onfocus = () => this.singleOut(row);
        button.onmouseleave = button.onblur = () => this.singleOut(-1);
        return el("li", {}, button);
      }),
    );
    if (focused >= 0) this.list.querySelectorAll("button")[Math.min(focused, this.objects.length - 1)]?.focus();
    const hidden = this.all.length - this.objects.length;
    this.empty.textContent = this.objects.length ? "" : hidden ? `${hidden} below the threshold.` : "";
    const parts = this.objects.slice(0, 20).map((entry) => `${entry.label ?? "mask"} ${entry.score?.toFixed(2) ?? ""}`);
    const text = this.picture ? `Picture with ${this.objects.length} results. ${parts.join(", ")}` : "No picture yet";
    this.canvas.setAttribute("aria-label", text);
  }

  singleOut(row) {
    if (row === this.single) return;
    this.single = row;
    this.list.querySelectorAll("button").forEach((button, index) => button.classList.toggle("on", index === row));
    this.draw();
  }

  /** Let clicks and keys give prompts, or not. */
  point(on) {
    this.pointing = on;
    this.view.classList.toggle("pointing", on);
    this.canvas.tabIndex = on ? 0 : -1;
    this.canvas.setAttribute("role", on ? "application" : "img");
    if (!on) this.cursor = this.drag = null;
    this.draw();
  }

  draw(scaleTo = null) {
    const { picture, canvas } = this;
    if (!picture) return;
    const limit = Math.max(240, Math.min(0.74 * innerHeight, 900));
    const room = Math.max(200, this.view.clientWidth);
    const scale = scaleTo ?? Math.min(room / picture.width, limit / picture.height);
    const dots = scaleTo ? 1 : devicePixelRatio || 1;
    this.scale = scale;
    const [width, height] = [Math.round(picture.width * scale), Math.round(picture.height * scale)];
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * dots);
    canvas.height = Math.round(height * dots);
    const pen = canvas.getContext("2d");
    pen.setTransform((scale * canvas.width) / width, 0, 0, (scale * canvas.height) / height, 0, 0);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(picture.bitmap, 0, 0);
    this._objects(pen, 1 / scale);
    this._prompts(pen, 1 / scale);
  }

  _objects(pen, unit) {
    const order = this.objects.map((_, row) => row).reverse().sort((a, b) => (a === this.single) - (b === this.single));
    for (const row of order) {
      const entry = this.objects[row], index = this._key(entry, row);
      if (entry.bar) continue;
      pen.globalAlpha = this.single < 0 || this.single === row ? 1 : 0.15;
      if (entry.tint) pen.drawImage(this._mask(entry, index), 0, 0);
      const [x0, y0, x1, y1] = entry.box;
      const width = (entry.tint ? 1.5 : 2.5) * unit;
      for (const [style, more] of [["rgb(255 255 255 / .75)", 2 * unit], [colour(index), 0]]) {
        pen.strokeStyle = style;
        pen.lineWidth = width + more;
        if (x1 > x0) pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
      }
      this._label(pen, unit, entry, index);
    }
    pen.globalAlpha = 1;
  }

  _label(pen, unit, entry, index) {
    const score = entry.score == null ? "" : ` ${entry.score.toFixed(2)}`;
    const text = `${entry.label ?? "mask"}${score}`;
    pen.font = `600 ${13 * unit}px system-ui, "DejaVu Sans", sans-serif`;
    const width = pen.measureText(text).width + 10 * unit, height = 20 * unit;
    const x = Math.max(0, Math.min(entry.box[0], this.picture.width - width));
    const y = entry.box[1] > height ? entry.box[1] - height : entry.box[1];
    pen.fillStyle = colour(index);
    pen.fillRect(x, y, width, height);
    pen.fillStyle = "#fff";
    pen.textBaseline = "middle";
    pen.fillText(text, x + 5 * unit, y + height / 2);
  }

  _prompts(pen, unit) {
    const ring = (x, y, fill) => {
      pen.beginPath();
      pen.arc(x, y, 6 * unit, 0, 7);
      pen.fillStyle = fill;
      pen.fill();
      pen.lineWidth = 2 * unit;
      pen.strokeStyle = "#fff";
      pen.stroke();
    };
    for (const prompt of this.pointing ? this.prompts ?? [] : []) {
      for (const { x, y, on } of prompt.points) ring(x, y, on ? "#0a8f3c" : "#c62828");
    }
    const box = this.drag?.box;
    if (box) {
      pen.setLineDash([6 * unit, 4 * unit]);
      pen.strokeStyle = "#fff";
      pen.lineWidth = 2 * unit;
      pen.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
      pen.setLineDash([]);
    }
    if (this.cursor) {
      const { x, y } = this.cursor;
      for (const [style, width] of [["#000", 4], ["#fff", 2]]) {
        pen.strokeStyle = style;
        pen.lineWidth = width * unit;
        pen.beginPath();
        pen.moveTo(x - 14 * unit, y); pen.lineTo(x + 14 * unit, y);
        pen.moveTo(x, y - 14 * unit); pen.lineTo(x, y + 14 * unit);
        pen.stroke();
      }
    }
  }

  // ---------------------------------------------------------------------------------------------- pointer and keys

  _place(event) {
    const frame = this.canvas.getBoundingClientRect();
    const inside = (value, most) => Math.max(0, Math.min(most - 0.01, value));
    return [
      inside(((event.clientX - frame.left) / frame.width) * this.picture.width, this.picture.width),
      inside(((event.clientY - frame.top) / frame.height) * this.picture.height, this.picture.height),
    ];
  }

  _hit(x, y) {
    let best = -1, area = Infinity;
    this.objects.forEach((entry, row) => {
      if (!entry.box) return;
      const [x0, y0, x1, y1] = entry.box, size = (x1 - x0) * (y1 - y0);
      if (x >= x0 && x <= x1 && y >= y0 && y <= y1 && size < area) [best, area] = [row, size];
    });
    return best;
  }

  _listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => {
      if (!this.picture || !this.pointing || event.button || !event.isPrimary) return;
      canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      this.drag = { from: this._place(event), box: null };
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.picture || !event.isPrimary) return;
      const [x, y] = this._place(event);
      if (!this.drag) return this.singleOut(this._hit(x, y));
      const [u, v] = this.drag.from;
      if (this.drag.box || Math.hypot(x - u, y - v) * this.scale > 6) {
        this.drag.box = [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)];
        this.draw();
      }
    });
    canvas.addEventListener("pointerup", (event) => {
      if (!this.drag || !event.isPrimary) return;
      const { from: [x, y], box } = this.drag;
      this.drag = null;
      if (box && box[2] - box[0] >= 1 && box[3] - box[1] >= 1) this.onPrompt({ kind: "box", box });
      else this.onPrompt({ kind: "point", x, y, on: !event.shiftKey });
    });
    canvas.addEventListener("pointercancel", () => { this.drag = null; this.draw(); }); // two fingers zoom
    canvas.addEventListener("pointerleave", () => this.drag || this.singleOut(-1));
    canvas.addEventListener("keydown", (event) => this._key_down(event));
    canvas.addEventListener("focus", () => {
      if (this.pointing && this.picture && canvas.matches(":focus-visible")) {
        this.cursor ??= { x: this.picture.width / 2, y: this.picture.height / 2 };
        this.draw();
      }
    });
    canvas.addEventListener("blur", () => { this.cursor = null; this.draw(); });
  }

  _key_down(event) {
    if (!this.pointing || !this.picture) return;
    const step = (event.shiftKey ? 40 : 8) / this.scale;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    this.cursor ??= { x: this.picture.width / 2, y: this.picture.height / 2 };
    if (moves[event.key]) {
      const [dx, dy] = moves[event.key];
      this.cursor.x = Math.max(0, Math.min(this.picture.width - 1, this.cursor.x + dx));
      this.cursor.y = Math.max(0, Math.min(this.picture.height - 1, this.cursor.y + dy));
      this.draw();
    } else if (event.key === "Enter" || event.key === " ") {
      this.onPrompt({ kind: "point", ...this.cursor, on: !event.shiftKey });
    } else return;
    event.preventDefault();
  }
}

export { el };
