// Numbers, counts and events in words.

export function number(value, digits = 1) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

export function total(counts) { return Object.values(counts).reduce((sum, count) => sum + count, 0); }

export function reasons(counts) {
  const named = Object.entries(counts).map(([reason, count]) => `${count} ${reason}`);
  return named.length ? `${total(counts)} (${named.join(", ")})` : "0";
}

// "2 person, 1 bag": the objects in sight by category.
export function byCategory(objects) {
  const counts = new Map();
  for (const object of objects) {
    if (object.area) counts.set(object.category ?? "unnamed", (counts.get(object.category ?? "unnamed") ?? 0) + 1);
  }
  const named = [...counts].sort((a, b) => b[1] - a[1]).map(([name, count]) => `${count} ${name}`);
  return named.join(", ") || "nothing in sight";
}

// The colour in which the service draws an object.
export function colour(id) {
  const hue = (id * 0.61803398875) % 1;
  const band = Math.floor(id / 12) % 3;
  const [saturation, value] = [[0.85, 0.6, 1][band], [1, 0.95, 0.75][band]];
  const part = (n) => {
    const k = (n + hue * 6) % 6;
    return Math.round(255 * value * (1 - saturation * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return `rgb(${part(5)}, ${part(3)}, ${part(1)})`;
}

const KINDS = {
  object_added: "started", object_removed: "removed", corrected: "corrected", zone_entered: "entered",
  zone_left: "left", line_crossed: "crossed", near_began: "came near another", near_ended: "left another",
  gap: "Gap in the picture", reconnect: "Camera connected again", restart: "Tracking restarted",
  resized: "Size of the picture changed", clock: "Camera's clock changed", zones_changed: "Zones changed",
};
const DIRECTIONS = { left_to_right: " to the right", right_to_left: " to the left" };
const OF_ZONES = new Set(["zone_entered", "zone_left", "line_crossed"]);

export function eventText(event) {
  const kind = event.kind === "corrected" && event.name === "renamed"
    ? `named ${event.detail.category}` : KINDS[event.kind] ?? event.kind;
  if (event.object_id === null || event.object_id === undefined) return event.name ? `${kind} (${event.name})` : kind;
  const category = event.detail?.category && event.kind === "object_added" ? ` ${event.detail.category}` : "";
  if (OF_ZONES.has(event.kind)) {
    return `Object ${event.object_id} ${kind} ${event.name}${DIRECTIONS[event.detail?.direction] ?? ""}`;
  }
  return `Object ${event.object_id}${category} ${kind}${event.name && event.name !== "renamed" ? ` (${event.name.replaceAll("_", " ")})` : ""}`;
}

export function eventTime(event) {
  const when = event.wall_time ? new Date(event.wall_time) : null;
  return when && !Number.isNaN(when.getTime()) ? when.toLocaleTimeString() : `frame ${event.frame_index}`;
}

export function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
