// The list of objects: select, name, colour, hide, lock, delete, split and merge.

let drawn = "";

// did: { select, edit, drop, split, merge }, called with ids.
export function drawObjects(list, { state, timeline, selected, frame, masks, did }) {
  const key = JSON.stringify([state.objects, timeline, selected, frame, masks.map((m) => [m.id, m.area, m.source])]);
  const inside = list.contains(document.activeElement) && ["INPUT", "SELECT"].includes(document.activeElement.tagName);
  if (key === drawn || inside) return;
  drawn = key;
  const categories = [...new Set(state.objects.map((object) => object.category).filter(Boolean))].sort();
  document.getElementById("categories").replaceChildren(...categories.map((category) => new Option(category)));
  const focused = document.activeElement?.dataset?.key;
  list.replaceChildren(...state.objects.map((object) => item(object, { state, timeline, selected, masks, did })));
  if (focused) list.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

function item(object, { state, timeline, selected, masks, did }) {
  const own = object.id === selected;
  const found = element("li", { className: own ? "selected" : "" });
  const button = element("button", { type: "button", className: "name", onclick: () => did.select(object.id) });
  button.dataset.key = `name ${object.id}`;
  button.setAttribute("aria-pressed", String(own));
  button.append(element("b", { textContent: String(object.id) }), ` ${object.category ?? "no category"}`);
  const shown = masks.find((each) => each.id === object.id);
  button.append(element("small", { textContent: `${here(shown)}${summary(object.id, timeline)}` }));
  const colour = element("input", { type: "color", value: object.colour, onchange: (event) => did.edit(object.id, { colour: event.target.value }) });
  colour.setAttribute("aria-label", `Colour of object ${object.id}`);
  const rename = element("input", { type: "text", value: object.category ?? "", maxLength: 200, placeholder: "category" });
  rename.setAttribute("list", "categories");
  rename.setAttribute("aria-label", `Category of object ${object.id}`);
  rename.onchange = () => { did.edit(object.id, { category: rename.value || null }); rename.blur(); };
  const line = element("div", { className: "line" });
  line.append(colour, rename,
    tiny(object.hidden ? "Show" : "Hide", `object ${object.id}`, () => did.edit(object.id, { hidden: !object.hidden })),
    tiny(object.locked ? "Unlock" : "Lock", `object ${object.id}`, () => did.edit(object.id, { locked: !object.locked })),
    tiny("Delete", `object ${object.id} with all its prompts`, () => did.drop(object.id)));
  found.append(button, line);
  if (own) found.append(regrouping(object, state, did));
  return found;
}

function regrouping(object, state, did) {
  const line = element("div", { className: "line" });
  const split = tiny("Split here", `object ${object.id}: a new id from this frame on`, () => did.split(object.id));
  split.title = "S";
  split.disabled = object.locked;
  line.append(split);
  const others = state.objects.filter((each) => each.id !== object.id);
  if (others.length) {
    const merge = element("select", { className: "merge", disabled: object.locked });
    merge.setAttribute("aria-label", `Merge another object into object ${object.id}`);
    merge.append(new Option("Merge with …", ""));
    merge.append(...others.map((each) => new Option(`${each.id} ${each.category ?? ""}`, String(each.id))));
    merge.onchange = () => { const other = Number(merge.value); merge.blur(); did.merge(object.id, other); };
    line.append(merge);
  }
  return line;
}

function here(shown) {
  const what = { prompt: "prompt here", tracked: shown?.area ? "tracked" : "out of sight", stale: "outdated" }[shown?.source];
  const sure = shown?.presence ?? shown?.score;
  const doubt = shown?.area && typeof sure === "number" ? ` · ${Math.round(100 * sure)} %` : "";
  return `${what ?? "not on this frame"}${shown?.area ? ` · ${shown.area} px` : ""}${doubt}`;
}

// How often it is seen, for those who cannot see the strip.
function summary(id, timeline) {
  const runs = timeline.objects.find((each) => each.id === id)?.runs ?? [];
  const count = (kind) => runs.filter((run) => run[2] === kind).reduce((sum, [first, last]) => sum + last - first + 1, 0);
  const parts = [["seen", "seen"], ["doubtful", "doubtful"], ["out", "out of sight"]]
    .filter(([kind]) => count(kind)).map(([kind, word]) => `${word} ${count(kind)}`);
  return parts.length ? ` · ${parts.join(", ")}` : "";
}

export function element(name, values) { return Object.assign(document.createElement(name), values); }

export function tiny(text, about, onclick) {
  const button = element("button", { type: "button", textContent: text, onclick });
  button.setAttribute("aria-label", `${text} ${about}`);
  return button;
}
