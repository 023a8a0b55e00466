// One stream, large: its live picture with tools to point at objects and to draw zones, its objects, counts
// and events.

import { Drawing, TOOLS } from "./drawing.js";
import { keyName } from "./keys.js";
import { ask, SignedOut, streamPath } from "./server.js";
import { colour, element, eventText, eventTime, number, reasons } from "./words.js";

const part = (id) => document.getElementById(id);
const HINTS = {
  look: "", box: "Draw a box around the object.", click: "Click on the object.",
  zone: "Click on the corners; Enter, a double click or a click on the first one closes the zone.",
  line: "Drag from the line's start to its end. The tick shows its right-hand side.",
};

export class Stream {
  // say(text, good): shows a message. gone(): the stream was removed.
  constructor(say, gone) {
    [this.say, this.gone] = [say, gone];
    this.id = null;
    this.stream = null;
    this.turn = 0;          // grows with every stream that is opened: answers for an older one are dropped
    this.socket = null;
    this.rows = new Map();
    this.rejected = 0;      // number of the newest rejected request that was shown
    this.drawing = new Drawing(part("over"), {
      box: (box) => this.prompt({ box }),
      click: (x, y) => this.clicked(x, y),
      zone: (polygon) => this.addZone("zones", { polygon }),
      line: (from, to) => this.addZone("lines", { from, to }),
      corners: (count) => {
        part("zone-close").disabled = count < 3;
        part("zone-drop").disabled = count === 0;
      },
    });
    part("zone-close").addEventListener("click", () => this.drawing.finish());
    part("zone-drop").addEventListener("click", () => this.drawing.cancel());
    for (const tool of TOOLS) part(`tool-${tool}`).addEventListener("click", () => this.use(tool));
    part("pause").addEventListener("click", () => this.change({ pause: part("state").textContent !== "paused" }));
    part("remove").addEventListener("click", () => {
      part("removed-name").textContent = this.id;
      part("removing").showModal();
    });
    part("removing").addEventListener("close", () => { if (part("removing").returnValue === "yes") this.remove(); });
    this.use("look");
  }

  use(tool) {
    for (const other of TOOLS) part(`tool-${other}`).setAttribute("aria-pressed", String(other === tool));
    part("hint").textContent = HINTS[tool];
    part("object-options").hidden = tool !== "box" && tool !== "click";
    // There before the first corner, so that the picture does not move under the hand.
    part("zone-close").hidden = part("zone-drop").hidden = tool !== "zone";
    part("zone-options").hidden = tool !== "zone" && tool !== "line";
    this.drawing.use(tool);
  }

  // Whether the key did something.
  key(event) {
    if (event.target === part("over") && this.drawing.key(event)) return true;
    const tool = { v: "look", b: "box", c: "click", z: "zone", l: "line" }[keyName(event)];
    if (tool) this.use(tool);
    else if (event.key === "Enter") this.drawing.finish();
    else if (event.key === "Escape") this.drawing.cancel();
    else return false;
    return true;
  }

  async open(id) {
    const mine = ++this.turn;
    if (this.id !== id) {
      this.rows.clear();
      part("objects").replaceChildren();
      part("events").replaceChildren();
      this.rejected = null;
      this.fillTargets([]);
      this.drawing.cancel();
    }
    this.id = id;
    this.close();
    try {
      const path = streamPath(id);
      const stream = await ask(path);
      const { ticket } = await ask(`${path}/ticket`, { method: "POST" });
      if (mine !== this.turn) return;
      this.draw(stream);
      this.drawObjects(stream.objects);
      const query = `ticket=${encodeURIComponent(ticket)}`;
      // There may be no picture yet; a browser would not ask for it again by itself.
      part("picture").onerror = () => this.again(mine, 2000);
      part("picture").src = `${path}/preview.mjpeg?max_side=1280&fps=8&${query}`;
      const address = new URL(`${path}/live?${query}`, location.href);
      address.protocol = address.protocol.replace("http", "ws");
      this.socket = new WebSocket(address);
      this.socket.onmessage = (event) => {
        const news = JSON.parse(event.data);
        if (mine !== this.turn || news.type !== "records") return;
        this.drawObjects(news.records.map((record) => ({ ...record, id: record.object_id })));
      };
      this.socket.onclose = () => this.again(mine, 2000);
    } catch (error) {
      if (mine !== this.turn || error instanceof SignedOut) return;  // signing in opens it again
      this.say(error.message);
      this.again(mine, 3000);
    }
  }

  again(mine, milliseconds) {
    if (mine === this.turn) setTimeout(() => mine === this.turn && this.open(this.id), milliseconds);
  }

  close() {
    if (this.socket) this.socket.onclose = null;
    this.socket?.close();
    this.socket = null;
    part("picture").onerror = null;
    part("picture").removeAttribute("src");
  }

  forget() {
    this.turn++;
    this.close();
    this.id = null;
    part("stream").hidden = true;
  }

  draw(stream) {
    this.stream = stream;
    part("name").textContent = stream.id;
    part("state").textContent = stream.state;
    part("state").className = `state ${stream.state}`;
    part("cause").textContent = stream.cause ?? "";
    part("pause").textContent = stream.state === "paused" ? "Go on" : "Pause";
    const numbers = [
      ["Camera", `${number(stream.rates.received_fps)} frames/s`],
      ["Tracker", `${number(stream.rates.tracked_fps)} frames/s`],
      ["Lag p50 / p99", `${number(stream.lag_seconds.p50, 2)} / ${number(stream.lag_seconds.p99, 2)} s`],
      ["Received", stream.ledger.received],
      ["Tracked", stream.ledger.tracked],
      ["Dropped", reasons(stream.ledger.dropped)],
      ["Corrupt", reasons(stream.ledger.corrupt)],
      ["Detector", stream.detector ?? "none"],
      ["Camera's URL", stream.url ?? "–"],
    ];
    part("numbers").replaceChildren(...numbers.map(([name, value]) => {
      const pair = element("div");
      pair.append(element("dt", name), element("dd", value));
      return pair;
    }));
    part("events").replaceChildren(...stream.recent_events.map((event) => {
      const item = element("li");
      item.append(element("time", eventTime(event)), " ", eventText(event));
      return item;
    }));
    part("no-events").hidden = stream.recent_events.length > 0;
    this.drawZones(stream);
    const image = part("picture");
    const size = stream.width ? [stream.width, stream.height]
      : image.naturalWidth ? [image.naturalWidth, image.naturalHeight] : null;
    if (size) part("frame").style.setProperty("--aspect", size[0] / size[1]);
    this.drawing.show(size, stream.zones_file);
    const newest = Math.max(0, ...stream.requests.rejected.map((rejected) => rejected.seq));
    if (this.rejected !== null && newest > this.rejected) {
      this.say(`Not done: ${stream.requests.rejected.at(-1).cause}.`);
    }
    this.rejected = newest;
    part("stream").hidden = false;
  }

  drawZones(stream) {
    const counts = new Map([...stream.zones.zones, ...stream.zones.lines].map((entry) => [entry.name, entry]));
    const items = [];
    for (const kind of ["zones", "lines"]) {
      for (const { name } of stream.zones_file[kind] ?? []) {
        const found = counts.get(name);
        const item = element("li");
        item.append(element("strong", name), " ");
        if (found && kind === "zones") item.append(`${found.inside} inside, ${found.entered} entered, ${found.left} left`);
        if (found && kind === "lines") item.append(`${found.left_to_right} to the right, ${found.right_to_left} to the left`);
        const button = element("button", "Remove", { type: "button", "aria-label": `Remove ${name}` });
        button.addEventListener("click", () => this.removeZone(kind, name));
        item.append(" ", button);
        items.push(item);
      }
    }
    const focused = [...part("zones").children].findIndex((item) => item.contains(document.activeElement));
    part("zones").replaceChildren(...items);
    if (focused >= 0) items[focused]?.querySelector("button").focus();
    part("no-zones").hidden = items.length > 0;
  }

  // Rows stay while their objects do: names are edited in them.
  drawObjects(objects) {
    const there = new Set(objects.map((object) => object.id));
    for (const [id, row] of this.rows) {
      if (there.has(id)) continue;
      row.line.remove();
      this.rows.delete(id);
    }
    for (const object of objects) {
      const row = this.rows.get(object.id) ?? this.addRow(object.id);
      row.line.className = object.area ? "" : "hidden-now";
      if (document.activeElement !== row.name) row.name.value = object.category ?? "";
      row.score.textContent = number(object.score, 2);
      row.area.textContent = object.area;
      row.box.textContent = object.bbox ? object.bbox.join(", ") : "out of sight";
    }
    const ids = [...there].join(" ");
    if (ids !== this.ids) this.fillTargets([...there]);
    this.ids = ids;
    part("no-objects").hidden = objects.length > 0;
  }

  addRow(id) {
    const line = element("tr");
    const mark = element("span", "", { class: "mark" });
    mark.style.background = colour(id);
    const number_ = element("td");
    number_.append(mark, String(id));
    const name = element("input", null, { type: "text", maxlength: "100", "aria-label": `Category of object ${id}` });
    name.addEventListener("change", () => {
      if (name.value.trim()) this.change({ rename: { id, category: name.value.trim() } }, `Object ${id} is ${name.value.trim()}`);
    });
    name.addEventListener("keydown", (event) => { if (event.key === "Enter") name.blur(); });
    const [score, area, box] = [element("td"), element("td"), element("td")];
    const correct = element("button", "Correct", { type: "button", "aria-label": `Correct object ${id}` });
    correct.addEventListener("click", () => {
      part("target").value = String(id);
      this.use("box");
    });
    const remove = element("button", "Remove", { type: "button", "aria-label": `Remove object ${id}` });
    remove.addEventListener("click", () => this.change({ remove: [id] }, `Object ${id} is removed`));
    const [named, buttons] = [element("td"), element("td")];
    named.append(name);
    buttons.append(correct, " ", remove);
    line.append(number_, named, score, area, box, buttons);
    const after = [...this.rows].filter(([other]) => other > id).map(([, row]) => row.line)[0] ?? null;
    part("objects").insertBefore(line, after);
    const row = { line, name, score, area, box };
    this.rows.set(id, row);
    this.rows = new Map([...this.rows].sort((a, b) => a[0] - b[0]));
    return row;
  }

  fillTargets(ids) {
    const before = part("target").value;
    part("target").replaceChildren(element("option", "a new object", { value: "" }),
      ...ids.map((id) => element("option", `object ${id}`, { value: String(id) })));
    part("target").value = ids.map(String).includes(before) ? before : "";
  }

  // --- changes ---

  async change(body, done = "", id = this.id) {
    try {
      const stream = await ask(streamPath(id), { method: "PATCH", body });
      if (id === this.id) this.draw(stream);
      this.say(id === this.id ? done : `${id}: ${done}`, true);
    } catch (error) {
      if (!(error instanceof SignedOut)) this.say(`Not done: ${error.message}.`);
    }
  }

  prompt(shape) { return this.follow(shape, this.asked(), this.id); }

  // For which object, and of which name, the fields say that the next prompt is.
  asked() {
    const [target, category] = [part("target").value, part("category").value.trim()];
    return { ...(target ? { id: Number(target) } : {}), ...(category ? { category } : {}) };
  }

  follow(shape, asked, id) {
    const done = asked.id ? `Object ${asked.id} is corrected` : "The object is followed";
    return this.change({ prompts: { objects: [{ ...shape, ...asked }] } }, done, id);
  }

  // Another stream may be opened, and the fields be filled in anew, before the outline is found.
  async clicked(x, y) {
    const [id, asked] = [this.id, this.asked()];
    this.say("Looking for the object's outline …", true);
    try {
      const { rle } = await ask(`${streamPath(id)}/clicks`, { method: "POST", body: { clicks: [{ x, y }] } });
      await this.follow({ rle }, asked, id);
    } catch (error) {
      if (!(error instanceof SignedOut)) this.say(`Not done: ${error.message}.`);
    }
  }

  // The zones in force are asked for first: someone else may have changed them.
  async changeZones(make, done) {
    const id = this.id;
    try {
      const { zones_file: zones } = await ask(streamPath(id));
      const changed = make(zones);
      const left = ["zones", "lines", "near", "homographies"].some((kind) => changed[kind]?.length);
      await this.change({ zones: left ? changed : {} }, done, id);
    } catch (error) {
      if (!(error instanceof SignedOut)) this.say(`Not done: ${error.message}.`);
    }
  }

  addZone(kind, shape) {
    const wanted = part("zone-name").value.trim();
    part("zone-name").value = "";
    let name = wanted;
    return this.changeZones((zones) => {
      const names = new Set(["zones", "lines", "near"].flatMap((other) => zones[other] ?? []).map((entry) => entry.name));
      const word = kind === "zones" ? "zone" : "line";
      for (let count = 1; !name || (names.has(name) && !wanted); count++) name = `${word} ${count}`;
      return { ...zones, [kind]: [...(zones[kind] ?? []), { name, ...shape }] };
    }, `${kind === "zones" ? "Zone" : "Line"} is in force`);
  }

  removeZone(kind, name) {
    return this.changeZones(
      (zones) => ({ ...zones, [kind]: (zones[kind] ?? []).filter((entry) => entry.name !== name) }), `${name} is removed`,
    );
  }

  async remove() {
    const id = this.id;
    this.forget();  // its picture and its socket end with it
    try {
      await ask(streamPath(id), { method: "DELETE" });
      this.say(`${id} is no longer followed; its rows are kept.`, true);
      this.gone();
    } catch (error) {
      this.open(id);
      if (!(error instanceof SignedOut)) this.say(`Not done: ${error.message}.`);
    }
  }
}
