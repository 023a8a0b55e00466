// Which part of the picture is seen, and how large. At zoom 1 the whole picture fits the room around the canvas.

const MOST_ZOOM = 40;
const MARGIN = 1.4;  // of the room, to the side of a box that is zoomed to

export class View {
  constructor(canvas) {
    this.canvas = canvas;
    [this.width, this.height] = [1, 1];  // of the video
    this.zoom = 1;
    [this.left, this.top] = [0, 0];      // pixel of the video in the upper left corner
    this.changed = () => {};             // called with the zoom
  }

  setSize(width, height) { [this.width, this.height] = [width, height]; }

  // Pixels of the screen to a pixel of the video.
  scale() {
    const { width, height } = this.canvas.parentElement.getBoundingClientRect();
    return Math.max(0.05, Math.min(width / this.width, height / this.height)) * this.zoom;
  }

  // Position of a pointer in pixels of the video.
  at({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.zoom === 1 ? box.width / this.width : this.scale();
    const inside = (value, most) => Math.min(most, Math.max(0, value));
    return [inside(this.left + (clientX - box.left) / scale, this.width), inside(this.top + (clientY - box.top) / scale, this.height)];
  }

  middle() {
    const box = this.canvas.getBoundingClientRect();
    return this.at({ clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 });
  }

  // Zoom by a factor; what is at a place of the screen stays there.
  zoomAt(factor, clientX = null, clientY = null) {
    const box = this.canvas.getBoundingClientRect();
    const place = { clientX: clientX ?? box.left + box.width / 2, clientY: clientY ?? box.top + box.height / 2 };
    const [x, y] = this.at(place);
    this.zoom = Math.min(MOST_ZOOM, Math.max(1, this.zoom * factor));
    this.fit();
    const after = this.canvas.getBoundingClientRect();
    const scale = this.scale();
    this.moveTo(x - (place.clientX - after.left) / scale, y - (place.clientY - after.top) / scale);
    this.changed(this.zoom);
  }

  // The box [left, top, width, height] in the middle, as large as there is room; if it is so already, the whole picture.
  zoomTo([left, top, width, height]) {
    const before = [this.zoom, this.left, this.top];
    const room = this.canvas.parentElement.getBoundingClientRect();
    this.zoom = 1;
    const whole = this.scale();
    this.zoom = Math.min(MOST_ZOOM, Math.max(1, Math.min(room.width / width, room.height / height) / MARGIN / whole));
    const [wide, high] = this.seen();
    this.moveTo(left + (width - wide) / 2, top + (height - high) / 2);
    if ([this.zoom, this.left, this.top].every((value, i) => Math.abs(value - before[i]) < 0.01)) this.reset();
    else this.changed(this.zoom);
  }

  reset() {
    this.zoom = 1;
    this.moveTo(0, 0);
    this.changed(1);
  }

  // By pixels of the screen.
  pan(x, y) {
    const scale = this.scale();
    this.moveTo(this.left - x / scale, this.top - y / scale);
  }

  // Move as little as makes a pixel of the video be seen.
  reveal([x, y]) {
    const [width, height] = this.seen();
    this.moveTo(Math.min(x, Math.max(this.left, x - width)), Math.min(y, Math.max(this.top, y - height)));
  }

  seen() {
    const scale = this.scale();
    const room = this.canvas.parentElement.getBoundingClientRect();
    return [Math.min(this.width, room.width / scale), Math.min(this.height, room.height / scale)];
  }

  moveTo(left, top) {
    const [width, height] = this.seen();
    this.left = Math.min(this.width - width, Math.max(0, left));
    this.top = Math.min(this.height - height, Math.max(0, top));
  }

  // Size the canvas to what is seen; its size on the screen.
  fit() {
    const room = this.canvas.parentElement.getBoundingClientRect();
    const scale = this.scale();
    const size = [Math.floor(Math.min(room.width, this.width * scale)), Math.floor(Math.min(room.height, this.height * scale))];
    [this.canvas.style.width, this.canvas.style.height] = size.map((value) => `${value}px`);
    return size;
  }

  // The context of the emptied canvas, in pixels of the video.
  begin() {
    const size = this.fit();
    this.moveTo(this.left, this.top);  // the room may have changed
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = size.map((value) => Math.round(value * ratio));
    if (this.canvas.width !== width || this.canvas.height !== height) [this.canvas.width, this.canvas.height] = [width, height];
    const context = this.canvas.getContext("2d");
    const [across, down] = this.zoom === 1 ? [width / this.width, height / this.height] : [this.scale() * ratio, this.scale() * ratio];
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    context.setTransform(across, 0, 0, down, -this.left * across, -this.top * down);
    return context;
  }
}
