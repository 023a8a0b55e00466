// The streams in a grid: a small picture of each with state, frames/s, lag and objects by category.

import { picture, SignedOut, streamPath } from "./server.js";
import { byCategory, element, number } from "./words.js";

const PAUSE = 1000;   // ms between two rounds of pictures
const SIDE = 320;     // px

export class Wall {
  // list: the element that holds the tiles; chosen(id) is called for the tile that was chosen.
  constructor(list, chosen) {
    this.list = list;
    this.chosen = chosen;
    this.tiles = new Map();
    this.seen = new Set();
    this.watcher = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) this.seen.add(target.dataset.stream);
        else this.seen.delete(target.dataset.stream);
      }
    });
    this.pictures();
  }

  draw(streams, shown) {
    const there = new Set(streams.map((stream) => stream.id));
    for (const [id, tile] of this.tiles) {
      if (there.has(id)) continue;
      this.watcher.unobserve(tile.item);
      this.seen.delete(id);
      tile.item.remove();
      this.tiles.delete(id);
    }
    streams.forEach((stream, position) => {
      const tile = this.tiles.get(stream.id) ?? this.add(stream.id);
      // Tiles stay where they are: moving them would take the focus from whoever goes through them with keys.
      if (this.list.children[position] !== tile.item) this.list.insertBefore(tile.item, this.list.children[position]);
      tile.button.setAttribute("aria-current", String(stream.id === shown));
      tile.state.textContent = stream.state;
      tile.state.className = `state ${stream.state}`;
      tile.rate.textContent = `${number(stream.rates.tracked_fps)} of ${number(stream.rates.received_fps)} frames/s`;
      tile.lag.textContent = `lag ${number(stream.lag_seconds.p50, 2)} s`;
      tile.objects.textContent = stream.cause ?? byCategory(stream.objects);
      tile.item.classList.toggle("trouble", stream.state === "failed" || stream.state === "waiting");
    });
  }

  // Choose the stream that is `by` tiles after one.
  step(id, by) {
    const ids = [...this.list.children].map((item) => item.dataset.stream);
    const at = Math.max(0, ids.indexOf(id));
    if (ids.length) this.chosen(ids[(at + by + ids.length) % ids.length]);
  }

  add(id) {
    const item = element("li", null, { "data-stream": id });
    const button = element("button", null, { type: "button" });
    const canvas = element("canvas", null, { width: SIDE, height: Math.round(SIDE * 9 / 16), "aria-hidden": "true" });
    const [head, foot] = [element("span", null, { class: "head" }), element("span", null, { class: "foot" })];
    const [name, state] = [element("strong", id, { title: id }), element("span", "", { class: "state" })];
    const [rate, lag, objects] = [element("small"), element("small"), element("small", "", { class: "counts" })];
    head.append(name, " ", state);
    foot.append(rate, " ", lag);
    button.append(canvas, head, objects, foot);
    button.addEventListener("click", () => this.chosen(id));
    item.append(button);
    const tile = { item, button, canvas, state, rate, lag, objects };
    this.tiles.set(id, tile);
    this.watcher.observe(item);
    return tile;
  }

  // One picture after the other, of the tiles in sight only: a wall of many streams stays a light load.
  async pictures() {
    for (const id of document.hidden ? [] : [...this.seen]) {
      try {
        const image = await picture(`${streamPath(id)}/frame.jpg?max_side=${SIDE}&quality=70`);
        const canvas = this.tiles.get(id)?.canvas;
        if (!canvas) continue;
        [canvas.width, canvas.height] = [image.width, image.height];
        canvas.getContext("2d").drawImage(image, 0, 0);
        image.close();
      } catch (error) {
        if (error instanceof SignedOut) break;  // there may be no picture yet, or the stream is gone
      }
    }
    setTimeout(() => this.pictures(), PAUSE);
  }
}
