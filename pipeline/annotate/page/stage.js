// The picture with masks over it, and the gestures on it: box, polygon, brush, eraser, clicks and scribbles.

import { counts, decode, disc, line, paint } from "./masks.js";
import { drawPoints, longer, shortened } from "./scribbles.js";

const HANDLE = 8;

export class Stage {
  // did: { box, polygon, mask, click, scribble, read }, called with what was drawn, in pixels of the video.
  constructor(canvas, did) {
    this.canvas = canvas;
    this.did = did;
    this.tool = "click";
    this.negative = false;  // clicks and scribbles take away: a finger has no right button
    this.brush = 12;
    this.opacity = 0.45;
    this.image = null;  // with masks, as the server draws them
    this.plain = null;  // without masks, for painting them
    this.painted = null;  // of the selected object, until a picture shows it
    this.settled = false;  // whether the masks are those of the last change
    this.masks = [];
    this.selected = null;
    this.colour = "#ffffff";
    this.points = [];
    this.clicks = [];
    this.strokes = [];
    this.asked = null;     // pixel that the Read tool was asked about
    this.gesture = null;
    this.pointer = null;
    this.tint = document.createElement("canvas");
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", () => { this.gesture = null; this.draw(); });
    canvas.addEventListener("pointerleave", () => { this.pointer = null; this.draw(); });
    canvas.addEventListener("dblclick", () => this.finishPolygon());
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  setSize(width, height) {
    this.width = width;
    this.height = height;
    this.tint.width = width;
    this.tint.height = height;
  }

  show(image, masks, settled) {
    this.image = image;
    this.settled = settled;
    if (settled) this.painted = null;
    this.masks = masks.map((mask) => ({
      ...mask, pixels: mask.rle && mask.size[0] === this.height && mask.size[1] === this.width
        ? decode(mask.rle, this.height, this.width) : null,
    }));
    this.draw();
  }

  mine() { return this.painted ?? this.masks.find((mask) => mask.id === this.selected)?.pixels ?? null; }

  // Position of the pointer in pixels of the video.
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const inside = (value, most) => Math.min(most, Math.max(0, value));
    return [inside((event.clientX - box.left) * this.width / box.width, this.width),
      inside((event.clientY - box.top) * this.height / box.height, this.height)];
  }

  // On a pixel: the right and bottom edges of the picture belong to none.
  inside([x, y]) { return [Math.min(this.width - 1, x), Math.min(this.height - 1, y)]; }

  down(event) {
    if (!this.image) return;
    const point = this.at(event);
    this.canvas.setPointerCapture(event.pointerId);
    const other = event.button === 2 || event.altKey;
    if (this.tool === "box") this.gesture = { kind: "box", from: point, to: point };
    else if (this.tool === "polygon") this.addPoint(point);
    else if (this.tool === "brush" || this.tool === "eraser") {
      // A stroke goes on from the mask before it, which must be known.
      if (!this.settled && !this.painted) return;
      const value = (this.tool === "brush") !== other ? 1 : 0;
      const mask = this.mine()?.slice() ?? new Uint8Array(this.width * this.height);
      disc(mask, this.height, this.width, ...point, this.brush / 2, value);
      this.gesture = { kind: "paint", mask, value, last: point };
    } else if (this.tool === "scribble") {
      this.gesture = { kind: "scribble", points: [this.inside(point)], positive: other === this.negative };
    } else if (this.tool === "click" || this.tool === "read") {
      const [x, y] = this.inside(point).map(Math.floor);
      this.did[this.tool]({ x, y, positive: other === this.negative });
    }
    this.draw();
  }

  move(event) {
    this.pointer = this.at(event);
    if (this.gesture?.kind === "box") this.gesture.to = this.pointer;
    if (this.gesture?.kind === "scribble") longer(this.gesture.points, this.inside(this.pointer));
    if (this.gesture?.kind === "paint") {
      line(this.gesture.mask, this.height, this.width, this.gesture.last, this.pointer, this.brush / 2, this.gesture.value);
      this.gesture.last = this.pointer;
    }
    this.draw();
  }

  up() {
    const done = this.gesture;
    this.gesture = null;
    if (done?.kind === "box") {
      const [x0, x1] = [done.from[0], done.to[0]].sort((a, b) => a - b).map(Math.round);
      const [y0, y1] = [done.from[1], done.to[1]].sort((a, b) => a - b).map(Math.round);
      if (x1 - x0 > 1 && y1 - y0 > 1) this.did.box([x0, y0, x1 - x0, y1 - y0]);
    }
    if (done?.kind === "scribble") this.did.scribble({ points: shortened(done.points), positive: done.positive });
    if (done?.kind === "paint") {
      this.painted = done.mask;
      this.did.mask(counts(done.mask, this.height, this.width), done.mask.some((value) => value === 1));
    }
    this.draw();
  }

  addPoint(point) {
    const [first] = this.points;
    const scale = this.canvas.getBoundingClientRect().width / this.width;
    if (this.points.length > 2 && Math.hypot(point[0] - first[0], point[1] - first[1]) * scale < HANDLE) this.finishPolygon();
    else this.points.push(point);
  }

  finishPolygon() {
    const points = this.points;
    this.points = [];
    // A double click adds its own point twice.
    const apart = points.filter((p, i) => i === 0 || Math.hypot(p[0] - points[i - 1][0], p[1] - points[i - 1][1]) > 0.5);
    if (apart.length > 2) this.did.polygon(apart.flat().map((value) => Math.round(value * 10) / 10));
    this.draw();
  }

  cancel() {
    this.points = [];
    this.gesture = null;
    this.draw();
  }

  draw() {
    if (!this.image) return;
    const room = this.canvas.parentElement.getBoundingClientRect();
    const scale = Math.max(0.05, Math.min(room.width / this.width, room.height / this.height));
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.floor(this.width * scale), Math.floor(this.height * scale)];
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = scale < 3;
    const painting = this.gesture?.kind === "paint" ? this.gesture.mask : this.painted;
    const picture = painting && this.plain ? this.plain : this.image;
    context.drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
    const ink = this.tint.getContext("2d");
    const tinted = ink.createImageData(this.width, this.height);
    for (const mask of this.masks) {
      // The picture has the others already, unless it is the one without masks.
      const missing = mask.source === "stale" || picture === this.plain;
      if (mask.pixels && missing && !mask.hidden && !(painting && mask.id === this.selected)) {
        paint(tinted, mask.pixels, this.height, this.width, mask.colour, this.opacity, mask.source === "stale");
      }
    }
    if (painting) paint(tinted, painting, this.height, this.width, this.colour, this.opacity);
    ink.putImageData(tinted, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.tint, 0, 0, this.canvas.width, this.canvas.height);
    context.scale(this.canvas.width / this.width, this.canvas.height / this.height);
    this.drawGesture(context, this.width / width);
  }

  // pixel: size of a pixel of the screen in pixels of the video
  drawGesture(context, pixel) {
    context.lineWidth = 2 * pixel;
    context.strokeStyle = this.colour;
    if (this.gesture?.kind === "box") {
      const { from, to } = this.gesture;
      context.setLineDash([6 * pixel, 4 * pixel]);
      context.strokeRect(from[0], from[1], to[0] - from[0], to[1] - from[1]);
      context.setLineDash([]);
    }
    if (this.points.length) {
      context.beginPath();
      this.points.forEach((point, i) => (i ? context.lineTo(...point) : context.moveTo(...point)));
      if (this.pointer) context.lineTo(...this.pointer);
      context.stroke();
      context.fillStyle = "#fff";
      for (const point of this.points) context.fillRect(point[0] - 3 * pixel, point[1] - 3 * pixel, 6 * pixel, 6 * pixel);
    }
    const strokes = this.gesture?.kind === "scribble" ? [...this.strokes, this.gesture] : this.strokes;
    drawPoints(context, pixel, this.clicks, strokes);
    if (this.asked && this.tool === "read") {
      const [x, y] = [this.asked.x + 0.5, this.asked.y + 0.5];
      for (const [ink, width] of [["#000", 4], ["#fff", 2]]) {
        context.strokeStyle = ink;
        context.lineWidth = width * pixel;
        context.beginPath();
        context.arc(x, y, 7 * pixel, 0, 2 * Math.PI);
        context.stroke();
      }
    }
    if (this.pointer && (this.tool === "brush" || this.tool === "eraser")) {
      context.beginPath();
      context.arc(...this.pointer, this.brush / 2, 0, 2 * Math.PI);
      context.strokeStyle = this.tool === "brush" ? "#fff" : "#f66";
      context.lineWidth = 1.5 * pixel;
      context.stroke();
    }
  }
}
