// What is drawn over the large picture: the zones, and the gestures of the tools. Positions are pixels of the
// camera's frames.

import { drawPointer } from "./pointer.js";

const HANDLE = 10, FINGER = 24;  // pixels of the screen around a corner that a mouse, a finger hits
export const TOOLS = ["look", "box", "click", "zone", "line"];

export class Drawing {
  // did: { box, click, zone, line }, called with what was drawn; corners, with the number of the zone's so far.
  constructor(canvas, did) {
    this.canvas = canvas;
    this.did = did;
    this.tool = "look";
    this.size = null;     // [width, height] of the frames
    this.zones = {};      // content of a zones file
    this.points = [];
    this.drag = null;
    this.pointer = null;
    this.keyed = false;   // the pointer is moved by keys
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", () => this.up());
    canvas.addEventListener("pointercancel", () => this.cancel());
    canvas.addEventListener("dblclick", () => this.finish());
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("pointerleave", () => { if (!this.drag) { this.pointer = null; this.draw(); } });
    // Keys move the pointer only for whoever came to the picture with them.
    canvas.addEventListener("mousedown", (event) => { event.preventDefault(); document.activeElement?.blur(); });
    canvas.addEventListener("focus", () => { this.keyed = true; this.pointer = this.size?.map((side) => Math.floor(side / 2) + 0.5) ?? null; this.draw(); });
    canvas.addEventListener("blur", () => { this.keyed = false; this.pointer = this.drag = null; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  use(tool) {
    this.tool = tool;
    this.canvas.dataset.tool = tool;
    this.canvas.tabIndex = tool === "look" ? -1 : 0;
    this.cancel();
  }

  show(size, zones) {
    const same = JSON.stringify([this.size, this.zones]) === JSON.stringify([size, zones]);
    [this.size, this.zones] = [size, zones];
    if (!same) this.draw();
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const inside = (value, most) => Math.min(most, Math.max(0, value));
    return [inside((event.clientX - box.left) * this.size[0] / box.width, this.size[0]),
      inside((event.clientY - box.top) * this.size[1] / box.height, this.size[1])];
  }

  down(event) {
    if (!this.size || this.tool === "look" || event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.press(this.at(event), event.pointerType === "touch" ? FINGER : HANDLE);
    this.draw();
  }

  press(point, near = HANDLE) {
    if (this.tool === "click") {
      const [width, height] = this.size;
      this.did.click(Math.min(width - 1, Math.floor(point[0])), Math.min(height - 1, Math.floor(point[1])));
    } else if (this.tool === "zone") {
      const closes = this.points.length > 2
        && Math.hypot(...point.map((value, i) => value - this.points[0][i])) * this.scale() < near;
      if (closes) this.finish();
      else this.put([...this.points, point]);
    } else {
      this.drag = { from: point, to: point };
    }
  }

  put(points) {
    this.points = points;
    this.did.corners(points.length);
  }

  // Arrows move the pointer, the space bar presses and releases it. Whether the key is one of these.
  key(event) {
    const step = event.shiftKey ? 10 : 1;
    const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (!this.keyed || !this.size || this.tool === "look" || (!way && event.key !== " ")) return false;
    this.pointer ??= this.size.map((side) => Math.floor(side / 2) + 0.5);
    if (way) {
      this.pointer = this.pointer.map((value, i) => Math.min(this.size[i] - 0.5, Math.max(0.5, value + way[i])));
      if (this.drag) this.drag.to = this.pointer;
    } else if (this.drag) this.up();
    else this.press(this.pointer);
    this.draw();
    return true;
  }

  move(event) {
    if (!this.size) return;
    this.pointer = this.at(event);
    if (this.drag) this.drag.to = this.pointer;
    if (this.drag || this.points.length) this.draw();
  }

  up() {
    const drag = this.drag;
    this.drag = null;
    if (drag && this.tool === "box") {
      const [x0, x1] = [drag.from[0], drag.to[0]].sort((a, b) => a - b).map(Math.round);
      const [y0, y1] = [drag.from[1], drag.to[1]].sort((a, b) => a - b).map(Math.round);
      if (x1 - x0 > 1 && y1 - y0 > 1) this.did.box([x0, y0, x1 - x0, y1 - y0]);
    }
    if (drag && this.tool === "line" && Math.hypot(drag.to[0] - drag.from[0], drag.to[1] - drag.from[1]) > 2) {
      this.did.line(drag.from.map(Math.round), drag.to.map(Math.round));
    }
    this.draw();
  }

  // With fewer than three corners, the zone stays under way.
  finish() {
    // A double click adds its own point twice.
    const apart = this.points.filter((p, i, all) => i === 0 || Math.hypot(p[0] - all[i - 1][0], p[1] - all[i - 1][1]) > 1);
    this.put(apart.length > 2 ? [] : apart);
    if (apart.length > 2) this.did.zone(apart.map((point) => point.map(Math.round)));
    this.draw();
  }

  cancel() {
    this.drag = null;
    this.put([]);
    this.draw();
  }

  scale() { return this.canvas.getBoundingClientRect().width / (this.size?.[0] ?? 1); }

  draw() {
    const box = this.canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(box.width * ratio);
    this.canvas.height = Math.round(box.height * ratio);
    const context = this.canvas.getContext("2d");
    if (!this.size || !box.width) return;
    context.scale(this.canvas.width / this.size[0], this.canvas.height / this.size[1]);
    const pixel = this.size[0] / box.width;
    context.font = `600 ${13 * pixel}px system-ui, sans-serif`;
    for (const zone of this.zones.zones ?? []) this.zone(context, pixel, zone);
    for (const line of this.zones.lines ?? []) this.line(context, pixel, line);
    context.lineWidth = 2 * pixel;
    context.strokeStyle = "#fff";
    context.setLineDash([6 * pixel, 4 * pixel]);
    if (this.drag && this.tool === "box") {
      const { from, to } = this.drag;
      context.strokeRect(from[0], from[1], to[0] - from[0], to[1] - from[1]);
    } else if (this.drag || this.points.length) {
      const points = this.drag ? [this.drag.from, this.drag.to] : [...this.points, ...(this.pointer ? [this.pointer] : [])];
      context.beginPath();
      points.forEach((point, i) => (i ? context.lineTo(...point) : context.moveTo(...point)));
      context.stroke();
      this.corners(context, pixel);
    }
    if (this.keyed && this.pointer) {
      context.setLineDash([]);
      drawPointer(context, pixel, this.pointer);
    }
  }

  // The first one is larger once the zone can be closed there.
  corners(context, pixel) {
    context.setLineDash([]);
    context.fillStyle = "#fff";
    context.strokeStyle = "#000";
    context.lineWidth = pixel;
    this.points.forEach(([x, y], i) => {
      const half = (i === 0 && this.points.length > 2 ? 7 : 4) * pixel;
      context.fillRect(x - half, y - half, 2 * half, 2 * half);
      context.strokeRect(x - half, y - half, 2 * half, 2 * half);
    });
  }

  // In pixels, whatever units the entry has.
  place(entry, point) {
    return entry.units === "share" ? point.map((value, i) => value * this.size[i]) : point;
  }

  zone(context, pixel, zone) {
    context.beginPath();
    const points = zone.polygon.map((point) => this.place(zone, point));
    points.forEach((point, i) => (i ? context.lineTo(...point) : context.moveTo(...point)));
    context.closePath();
    context.fillStyle = "#3aa0ff30";
    context.fill();
    context.lineWidth = 2 * pixel;
    context.strokeStyle = "#3aa0ff";
    context.stroke();
    this.label(context, pixel, zone.name, points[0]);
  }

  line(context, pixel, line) {
    const [from, to] = [this.place(line, line.from), this.place(line, line.to)];
    const length = Math.hypot(to[0] - from[0], to[1] - from[1]) || 1;
    const middle = [(from[0] + to[0]) / 2, (from[1] + to[1]) / 2];
    // To the right of whoever walks along the line.
    const side = [-(to[1] - from[1]) / length * 16 * pixel, (to[0] - from[0]) / length * 16 * pixel];
    context.lineWidth = 2.5 * pixel;
    context.strokeStyle = "#ffb347";
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.moveTo(...middle);
    context.lineTo(middle[0] + side[0], middle[1] + side[1]);
    context.stroke();
    this.label(context, pixel, line.name, from);
  }

  label(context, pixel, text, [x, y]) {
    context.lineWidth = 3 * pixel;
    context.strokeStyle = "#000b";
    context.fillStyle = "#fff";
    context.strokeText(text, x + 6 * pixel, y + 16 * pixel);
    context.fillText(text, x + 6 * pixel, y + 16 * pixel);
  }
}
