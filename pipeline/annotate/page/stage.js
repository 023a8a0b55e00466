// The picture with masks over it, and the gestures on it: box, polygon, brush, eraser, clicks and scribbles.

import { bounds, counts, decode, disc, line, paint } from "./masks.js";
import { drawPointer } from "./pointer.js";
import { drawAsked, drawPoints, longer, shortened } from "./scribbles.js";
import { View } from "./view.js";

const HANDLE = 8;
const STILL = 6;  // pixels of the screen that a finger or a selecting hand may move while it taps

export class Stage {
  // did: { box, polygon, mask, click, scribble, read, pick }, called with what was drawn, in pixels of the video.
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
    this.keyed = false;    // the pointer is moved by keys
    this.fingers = new Map();
    this.tint = document.createElement("canvas");
    this.tinted = null;    // what the tint was drawn from
    this.waits = false;    // a drawing is due
    this.view = new View(canvas);
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => { this.fingers.delete(event.pointerId); this.gesture = null; this.draw(); });
    canvas.addEventListener("pointerleave", () => { this.pointer = null; this.draw(); });
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    // The keyboard moves the pointer only for whoever came to the picture with it, not after each click.
    canvas.addEventListener("mousedown", (event) => { event.preventDefault(); document.activeElement?.blur(); });
    canvas.addEventListener("focus", () => { this.keyed = true; this.pointer = this.view.middle(); this.draw(); });
    canvas.addEventListener("blur", () => { this.keyed = false; this.pointer = null; this.draw(); });
    canvas.addEventListener("dblclick", () => this.finishPolygon());
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  setSize(width, height) {
    this.width = width;
    this.height = height;
    this.view.setSize(width, height);
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

  // The object at a pixel that is shown; of several the smallest, which the others would hide from the hand.
  objectAt([x, y]) {
    const at = Math.floor(y) * this.width + Math.floor(x);
    const there = this.masks.filter((mask) => mask.pixels?.[at] && !mask.hidden);
    return there.sort((a, b) => a.area - b.area)[0]?.id ?? null;
  }

  // On a pixel: the right and bottom edges of the picture belong to none.
  inside([x, y]) { return [Math.min(this.width - 1, x), Math.min(this.height - 1, y)]; }

  // --- mouse, pen and fingers --------------------------------------------------------------------

  down(event) {
    if (!this.image) return;
    this.canvas.setPointerCapture(event.pointerId);
    const place = [event.clientX, event.clientY];
    if (event.pointerType === "touch") {
      this.fingers.set(event.pointerId, place);
      if (this.fingers.size > 1) {  // two fingers move the picture, and draw nothing
        this.gesture = { kind: "pinch" };
        this.draw();
        return;
      }
    }
    const point = this.view.at(event);
    const other = event.button === 2 || event.altKey;
    if (event.button === 1) this.gesture = { kind: "pan", last: place };
    else if (this.tool === "select") this.gesture = { kind: "pan", last: place, from: place, pick: point };
    else if (event.pointerType === "touch" && ["click", "read"].includes(this.tool)) {
      this.gesture = { kind: "tap", from: place, point, other };  // a second finger may follow
    } else this.press(point, other);
    this.draw();
  }

  move(event) {
    this.pointer = this.view.at(event);
    const place = [event.clientX, event.clientY];
    const { kind } = this.gesture ?? {};
    if (kind === "pinch") this.pinch(event.pointerId, place);
    else if (kind === "pan") {
      this.view.pan(place[0] - this.gesture.last[0], place[1] - this.gesture.last[1]);
      this.gesture.last = place;
    } else this.draws();
    if (this.fingers.has(event.pointerId)) this.fingers.set(event.pointerId, place);
    this.draw();
  }

  up(event) {
    this.fingers.delete(event.pointerId);
    const { kind, from } = this.gesture ?? {};
    const still = from && Math.hypot(event.clientX - from[0], event.clientY - from[1]) < STILL;
    if (kind === "pinch" && this.fingers.size) return;
    if (kind === "tap") {
      const { point, other } = this.gesture;
      this.gesture = null;
      if (still) this.press(point, other);
    }
    if (kind === "pan" && this.gesture.pick && still) this.did.pick(this.objectAt(this.inside(this.gesture.pick)));
    this.release();
  }

  pinch(id, place) {
    const other = [...this.fingers].find(([each]) => each !== id)?.[1];
    const before = this.fingers.get(id);
    if (!other || !before) return;
    const apart = (from) => Math.max(1, Math.hypot(from[0] - other[0], from[1] - other[1]));
    const [x, y] = [(place[0] + other[0]) / 2, (place[1] + other[1]) / 2];
    this.view.pan((place[0] - before[0]) / 2, (place[1] - before[1]) / 2);
    this.view.zoomAt(apart(place) / apart(before), x, y);
  }

  wheel(event) {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 30 : 1;
    this.view.zoomAt(Math.exp(-0.002 * lines * event.deltaY), event.clientX, event.clientY);
    this.pointer = this.view.at(event);
    this.draw();
  }

  // Larger or smaller around the middle of what is seen; 0: the whole picture.
  zoom(factor) {
    if (factor) this.view.zoomAt(factor);
    else this.view.reset();
    this.draw();
  }

  // The selected object as large as there is room; the whole picture, if it is shown so already.
  zoomToMine() {
    const box = this.mine() && bounds(this.mine(), this.height, this.width);
    if (box) this.view.zoomTo(box);
    this.draw();
  }

  // --- keys --------------------------------------------------------------------------------------

  // Arrows move the pointer, the space bar is its button. Whether the key is one of these.
  key(event) {
    const step = event.shiftKey ? 10 : 1;
    const way = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (!this.keyed || (!way && event.key !== " ")) return false;
    this.pointer ??= this.view.middle();
    if (way) {
      const most = [this.width - 0.5, this.height - 0.5];
      this.pointer = this.pointer.map((value, i) => Math.min(most[i], Math.max(0.5, Math.floor(value) + 0.5 + way[i])));
      this.view.reveal(this.pointer);
      this.draws();
    } else if (this.tool === "select") this.did.pick(this.objectAt(this.pointer));
    else if (this.gesture) this.release();
    else this.press(this.pointer, event.altKey);
    this.draw();
    return true;
  }

  // --- gestures ----------------------------------------------------------------------------------

  // other: with the right button
  press(point, other) {
    if (this.tool === "box") this.gesture = { kind: "box", from: point, to: point };
    else if (this.tool === "polygon") this.addPoint(point);
    else if (this.tool === "brush" || this.tool === "eraser") {
      // A stroke goes on from the mask before it, which must be known.
      if (!this.settled && !this.painted) return;
      const value = (this.tool === "brush") !== other ? 1 : 0;
      const mask = this.mine()?.slice() ?? new Uint8Array(this.width * this.height);
      disc(mask, this.height, this.width, ...point, this.brush / 2, value);
      this.gesture = { kind: "paint", mask, value, last: point, turn: 0 };
    } else if (this.tool === "scribble") {
      this.gesture = { kind: "scribble", points: [this.inside(point)], positive: other === this.negative };
    } else {
      const [x, y] = this.inside(point).map(Math.floor);
      this.did[this.tool]({ x, y, positive: other === this.negative });
    }
  }

  draws() {
    if (this.gesture?.kind === "box") this.gesture.to = this.pointer;
    if (this.gesture?.kind === "scribble") longer(this.gesture.points, this.inside(this.pointer));
    if (this.gesture?.kind === "paint") {
      line(this.gesture.mask, this.height, this.width, this.gesture.last, this.pointer, this.brush / 2, this.gesture.value);
      this.gesture.last = this.pointer;
      this.gesture.turn++;
    }
  }

  release() {
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
    if (this.points.length > 2 && Math.hypot(point[0] - first[0], point[1] - first[1]) * this.view.scale() < HANDLE) this.finishPolygon();
    else this.points.push(point);
  }

  // The polygon's newest corner is taken back. Whether there was one.
  dropPoint() {
    const any = this.points.length > 0;
    this.points.pop();
    this.draw();
    return any;
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

  // --- drawing -----------------------------------------------------------------------------------

  // Before the screen is painted next, however often it is asked for until then.
  draw() {
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => {
      this.waits = false;
      this.drawNow();
    });
  }

  drawNow() {
    if (!this.image) return;
    const context = this.view.begin();
    const painting = this.gesture?.kind === "paint" ? this.gesture.mask : this.painted;
    const picture = painting && this.plain ? this.plain : this.image;
    context.imageSmoothingEnabled = this.view.scale() < 3;
    context.drawImage(picture, 0, 0, this.width, this.height);
    // The picture has the others already, unless it is the one without masks.
    const missing = this.masks.filter((mask) => mask.pixels && !mask.hidden && (mask.source === "stale" || picture === this.plain)
      && !(painting && mask.id === this.selected));
    if (painting || missing.length) {
      this.drawTint(painting, missing);
      context.imageSmoothingEnabled = false;
      context.drawImage(this.tint, 0, 0, this.width, this.height);
    }
    this.drawGesture(context, 1 / this.view.scale());
  }

  // Masks as a picture of their own, drawn again only when they are others.
  drawTint(painting, missing) {
    const from = [painting, this.gesture?.turn ?? 0, this.colour, this.opacity, ...missing.flatMap((m) => [m.pixels, m.colour, m.source])];
    if (this.tinted?.length === from.length && from.every((each, i) => each === this.tinted[i])) return;
    this.tinted = from;
    const ink = this.tint.getContext("2d");
    const image = ink.createImageData(this.width, this.height);
    for (const mask of missing) paint(image, mask.pixels, this.height, this.width, mask.colour, this.opacity, mask.source === "stale");
    if (painting) paint(image, painting, this.height, this.width, this.colour, this.opacity);
    ink.putImageData(image, 0, 0);
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
    if (this.asked && this.tool === "read") drawAsked(context, pixel, this.asked);
    if (this.pointer && (this.tool === "brush" || this.tool === "eraser")) {
      context.beginPath();
      context.arc(...this.pointer, this.brush / 2, 0, 2 * Math.PI);
      context.strokeStyle = this.tool === "brush" ? "#fff" : "#f66";
      context.lineWidth = 1.5 * pixel;
      context.stroke();
    }
    if (this.pointer && this.keyed) drawPointer(context, pixel, this.pointer);
  }
}
