// Clicks and boxes of a picture: one prompt an object.

export class Prompts {
  constructor() {
    this.objects = [];
    this.fresh = true;
  }

  /** A click belongs to the present object, a box starts one. */
  add(prompt) {
    if (prompt.kind === "box") {
      this.objects.push({ box: prompt.box, points: [] });
    } else {
      if (this.fresh || !this.objects.length) this.objects.push({ box: null, points: [] });
      this.objects.at(-1).points.push({ x: prompt.x, y: prompt.y, on: prompt.on });
    }
    this.fresh = prompt.kind === "box";
  }

  startObject() {
    this.fresh = true;
  }

  undo() {
    const last = this.objects.at(-1);
    if (!last) return;
    if (last.points.length) last.points.pop();
    else this.objects.pop();
    if (last.points.length === 0 && !last.box) this.objects = this.objects.filter((entry) => entry !== last);
    const present = this.objects.at(-1);
    this.fresh = present !== last || Boolean(present.box); // a removed object is over, and a box takes no clicks
  }

  clear() {
    this.objects = [];
    this.fresh = true;
  }

  /** Requests that the server takes: points and boxes apart, each with the objects' places times `scale`, [x, y]. */
  requests(scale = [1, 1]) {
    const requests = [];
    const boxed = this.objects.flatMap((entry, row) => (entry.box ? [row] : []));
    const clicked = this.objects.flatMap((entry, row) => (!entry.box && entry.points.some(({ on }) => on) ? [row] : []));
    const place = (value, index) => Math.round(value * scale[index % 2] * 100) / 100;
    if (clicked.length) {
      requests.push({
        rows: clicked,
        prompts: {
          points: clicked.map((row) => this.objects[row].points.map(({ x, y }) => [x, y].map(place))),
          point_labels: clicked.map((row) => this.objects[row].points.map(({ on }) => (on ? 1 : 0))),
        },
      });
    }
    if (boxed.length) requests.push({ rows: boxed, prompts: { boxes: boxed.map((row) => this.objects[row].box.map(place)) } });
    return requests;
  }
}
