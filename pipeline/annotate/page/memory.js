// The memory: gauges, settings, what is remembered before a frame, what a pixel or an object is read from, and
// edits: pin, unpin, forget, clear.

import { ask, thumbnail } from "./server.js";
import { element, tiny } from "./objects.js";

const SETTINGS = [
  ["mem_every", "Remember every … frames", 1],
  ["min_mid_term_frames", "Working frames, least", 1],
  ["max_mid_term_frames", "Working frames, most", 2],
  ["max_long_term_elements", "Long-term elements, most", 1],
  ["num_prototypes", "Prototypes a time", 1],
  ["top_k", "Top k", 1],
];
const GROUPS = { long_term: "Long-term prototypes", copied: "Copied from another stream" };
const NAMES = { working: "Working", permanent: "Permanent", long_term: "Long-term" };

export class MemoryPanel {
  // now(): { state, frame, selected }. change(path, method, body): as in annotate.js. fail(error). go(frame).
  constructor(place, { now, change, fail, go }) {
    Object.assign(this, { place, now, change, fail, go });
    this.listed = null;    // what is remembered before a frame
    this.reads = null;     // the newest answer
    this.drawn = "";
    this.pictures = new Map();
    this.build();
  }

  build() {
    const heading = element("h2", { textContent: "Memory" });
    this.gauges = element("div", { className: "gauges" });
    this.settings = element("details");
    this.settings.append(element("summary", { textContent: "Settings" }));
    this.inputs = SETTINGS.map(([name, text, least]) => {
      const input = element("input", { type: "number", min: least, name });
      const label = element("label", { textContent: `${text} ` });
      label.append(input);
      input.onchange = () => this.set(name, input);
      this.settings.append(label);
      return [name, input];
    });
    this.back = element("button", { type: "button", textContent: "As at the beginning", onclick: () => this.reset() });
    this.settings.append(element("p", { className: "soft", textContent: "They act on the whole video: propagating tracks it again from its first frame." }), this.back);
    this.inside = element("details", { id: "remembered" });
    this.inside.append(element("summary", { textContent: "Remembered before this frame" }));
    this.inside.ontoggle = () => this.look();
    this.span = element("div", { className: "line", id: "forgetting" });
    this.first = this.number("First frame to forget");
    this.last = this.number("Last frame to forget");
    this.who = element("select", { id: "forgets" });
    this.who.setAttribute("aria-label", "Who forgets");
    const forget = element("button", { type: "button", textContent: "Forget", onclick: () => this.forget() });
    this.span.append("Frames ", this.first, " to ", this.last, this.who, forget);
    this.clear = element("button", { type: "button", id: "clear", textContent: "Clear all but prompted and pinned frames" });
    this.clear.onclick = () => this.edit({ clear: true });
    this.frames = element("ul", { className: "frames" });
    this.frames.setAttribute("aria-label", "Remembered frames");
    this.inside.append(this.frames, this.span, this.clear);
    this.from = element("div", { id: "reads" });
    this.from.setAttribute("role", "region");
    this.from.setAttribute("aria-label", "Read from");
    this.from.setAttribute("aria-live", "polite");
    this.edits = element("ul", { className: "edits" });
    this.edits.setAttribute("aria-label", "Edits of the memory");
    this.place.append(heading, this.gauges, this.from, this.inside, this.edits, this.settings);
  }

  number(text) {
    const input = element("input", { type: "number", min: 0 });
    input.setAttribute("aria-label", text);
    return input;
  }

  set(name, input) {
    if (!input.value) return this.draw();
    this.change("v1/memory/settings", "PATCH", { [name]: Number(input.value) }).then(() => this.draw());
  }

  reset() {
    this.change("v1/memory/settings", "PATCH", Object.fromEntries(SETTINGS.map(([name]) => [name, null])));
  }

  async edit(body) {
    const { frame } = this.now();
    if (await this.change(`v1/memory/${frame}`, "POST", body)) this.look();
  }

  forget() {
    if (!this.first.value) return this.first.focus();
    const last = this.last.value || this.first.value;
    const body = { forget: [Number(this.first.value), Number(last)] };
    if (this.who.value) body.object = Number(this.who.value);
    this.edit(body);
  }

  toggle() {
    this.inside.open = !this.inside.open;
    if (this.inside.open) this.inside.querySelector("summary").focus();
  }

  // Ask what is remembered before the frame in sight, if the list is open.
  async look() {
    if (!this.inside.open) return;
    const { frame } = this.now();
    try {
      this.listed = await ask(`v1/memory/${frame}`);
      this.why = "";
    } catch (error) {
      [this.listed, this.why] = [null, error.message];
    }
    this.drawFrames();
    this.drawGauges(this.now().state.memory);
  }

  // What the selected object, or a pixel, is read from on the frame in sight.
  async readAt(point) {
    const { frame, selected } = this.now();
    const body = point ? { x: point.x, y: point.y } : { object: selected };
    this.from.textContent = "Reading …";
    try {
      this.reads = { ...(await ask(`v1/reads/${frame}`, { method: "POST", body })), point };
      this.drawReads();
    } catch (error) {
      this.reads = null;
      this.from.textContent = "";
      this.fail(error);
    }
  }

  // --- drawing ---------------------------------------------------------------------------------

  draw() {
    const { state, frame } = this.now();
    const memory = state.memory;
    this.drawGauges(memory);
    // What has buttons is drawn again only if it has changed: else the keyboard would lose its place.
    const key = JSON.stringify([memory.settings, memory.edits, frame, state.objects.map((o) => o.id), this.listed?.frame]);
    if (key === this.drawn) return;
    this.drawn = key;
    for (const [name, input] of this.inputs) {
      if (document.activeElement !== input) input.value = String(memory.settings[name] ?? "");
      input.classList.toggle("changed", memory.settings[name] !== memory.usual[name]);
    }
    this.back.disabled = SETTINGS.every(([name]) => memory.settings[name] === memory.usual[name]);
    if (document.activeElement !== this.who) {
      const before = this.who.value;
      this.who.replaceChildren(new Option("all objects", ""), ...state.objects.map((o) => new Option(`object ${o.id}`, String(o.id))));
      this.who.value = state.objects.some((o) => String(o.id) === before) ? before : "";
    }
    this.edits.replaceChildren(...memory.edits.map((edit) => this.editItem(edit)));
    if (this.reads && this.reads.frame !== frame) {
      this.reads = null;
      this.from.replaceChildren();
    }
    if (this.inside.open && this.listed?.frame !== frame) this.look();
  }

  drawGauges(memory) {
    // Before this session has tracked anything, what is remembered before the frame that was looked at.
    const filled = memory.gauges ?? this.listed?.gauges;
    const regions = filled?.regions ?? [];
    const items = regions.map((region) => this.gauge(
      NAMES[region.kind], region.elements, region.limit,
      `${region.elements} of ${region.limit ?? "any number of"} elements, ${region.frames} ${region.frames === 1 ? "frame" : "frames"}`,
    ));
    const device = memory.device;
    const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
    const mib = (bytes) => `${Math.round(bytes / 2 ** 20)} MiB`;
    items.push(this.gauge(device.name === "cpu" ? "This process" : device.name, device.bytes, device.limit,
      `${mib(device.bytes)}${device.limit ? ` of ${gib(device.limit)}` : ""}${filled ? `, for the video ${mib(filled.bytes)}` : ""}`));
    if (!regions.length) items.unshift(element("p", { className: "soft", textContent: "Propagate, or open “Remembered before this frame”." }));
    this.gauges.replaceChildren(...items);
  }

  gauge(name, value, limit, text) {
    const label = element("label");
    const bar = element("meter", { min: 0, max: limit ?? Math.max(1, value), value });
    bar.setAttribute("aria-label", name);
    bar.setAttribute("aria-valuetext", text);
    label.append(element("b", { textContent: name }), " ", element("span", { textContent: text }), bar);
    return label;
  }

  editItem(edit) {
    const item = element("li");
    const about = edit.object === undefined ? "" : ` by object ${edit.object}`;
    const text = edit.forget ? `frames ${edit.forget[0]} to ${edit.forget[1]} are forgotten${about}`
      : edit.pin !== undefined ? `frame ${edit.pin} is pinned` : `frame ${edit.unpin} is unpinned`;
    const go = element("button", { type: "button", className: "name", textContent: `From frame ${edit.frame}: ${text}` });
    go.onclick = () => this.go(edit.frame);
    item.append(go);
    item.append(tiny("Take back", `edit: ${text}`, () => this.change(`v1/memory/${edit.frame}/${edit.number}`, "DELETE")));
    return item;
  }

  drawFrames() {
    if (!this.listed) {
      this.frames.replaceChildren(element("li", { className: "soft", textContent: this.why || "Nothing is remembered." }));
      return;
    }
    const prototypes = this.listed.frames.filter((entry) => entry.kind === "long_term");
    const whole = this.listed.frames.filter((entry) => entry.kind !== "long_term");
    const items = whole.map((entry) => {
      const item = this.tile(entry.frame, `${NAMES[entry.kind]}${entry.pinned ? ", pinned" : ""}`,
        entry.given.length ? `prompt of ${entry.given.join(", ")}` : `use ${entry.use.toPrecision(2)}`);
      item.append(entry.pinned
        ? tiny("Unpin", `frame ${entry.frame}`, () => this.edit({ unpin: entry.frame }))
        : tiny("Pin", `frame ${entry.frame}`, () => this.edit({ pin: entry.frame })),
      tiny("Forget", `frame ${entry.frame}`, () => { this.first.value = this.last.value = String(entry.frame); this.forget(); }));
      return item;
    });
    if (prototypes.length) {
      const sum = prototypes.reduce((all, entry) => all + entry.elements, 0);
      items.push(element("li", { className: "group", textContent: `Long-term: ${sum} prototypes of ${prototypes.length} frames` }));
    }
    if (!items.length) items.push(element("li", { className: "soft", textContent: "Nothing is remembered before this frame." }));
    this.frames.replaceChildren(...items);
  }

  drawReads() {
    const { frame, point, objects } = this.reads;
    const head = element("h3", { textContent: point ? `Read at ${point.x}, ${point.y} on frame ${frame}` : `Read on frame ${frame}` });
    const parts = objects.flatMap((object) => {
      const list = element("ul", { className: "frames" });
      list.setAttribute("aria-label", `Object ${object.id} is read from`);
      list.append(...object.frames.map((share) => {
        const percent = `${(100 * share.share).toFixed(share.share < 0.1 ? 1 : 0)} %`;
        if (share.frame_index === null) return element("li", { className: "group", textContent: `${GROUPS[share.kind]}: ${percent}` });
        return this.tile(share.frame_index, percent, NAMES[share.kind].toLowerCase(), share.share);
      }));
      if (!object.frames.length) list.append(element("li", { className: "soft", textContent: "not searched for here" }));
      return [element("h4", { textContent: `Object ${object.id}` }), list];
    });
    if (!objects.length) parts.push(element("p", { className: "soft", textContent: "No object is remembered before this frame." }));
    this.from.replaceChildren(head, ...parts);
    this.from.scrollIntoView({ block: "nearest" });
  }

  tile(frame, text, about, share = null) {
    const item = element("li");
    const button = element("button", { type: "button", onclick: () => this.go(frame) });
    button.setAttribute("aria-label", `Frame ${frame}: ${text}, ${about}. Show it`);
    const canvas = element("canvas", { width: 1, height: 1 });
    canvas.setAttribute("aria-hidden", "true");
    button.append(canvas, element("span", { textContent: `${frame} · ${text}` }), element("small", { textContent: about }));
    if (share !== null) {
      const bar = element("meter", { min: 0, max: 1, value: share });
      bar.setAttribute("aria-hidden", "true");  // the button's name has the number
      button.append(bar);
    }
    item.append(button);
    this.picture(frame).then((image) => {
      [canvas.width, canvas.height] = [image.width, image.height];
      canvas.getContext("2d").drawImage(image, 0, 0);
    }).catch(() => {});
    return item;
  }

  // Thumbnails are kept: the same few frames are shown again and again.
  picture(frame) {
    if (!this.pictures.has(frame)) {
      if (this.pictures.size > 200) this.pictures.clear();
      this.pictures.set(frame, thumbnail(frame));
    }
    return this.pictures.get(frame);
  }
}
