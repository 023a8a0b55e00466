// The annotator: keeps the page in step with the server. What is shown as saved is stored there durably.

import { NoAnswer, SignedOut, ask, download, picture, signIn } from "./server.js";
import { counts, decode, deepest } from "./masks.js";
import { Stage } from "./stage.js";
import { MemoryPanel } from "./memory.js";
import { bodyOf } from "./importing.js";
import { drawObjects } from "./objects.js";
import { beginLooks, flip, flipMasks, nextLook, opacity, query } from "./looks.js";
import { keyName } from "./keys.js";
import { drawTimeline, frameAt, jumps } from "./timeline.js";

const part = (id) => document.getElementById(id);
const TOOLS = ["select", "click", "scribble", "box", "polygon", "brush", "eraser", "read"];
const BUSY = ["loading", "running", "publishing"];
const FINDING = "Finding the outline …";
const USER = decodeURIComponent(location.pathname.split("/")[1]);  // of several on a server; else ""
const READ_MS = 10000;  // that an error stays to be read

let state = null;
let frame = 0;
let selected = null;
let clicks = [];        // of the selected object on this frame
let strokes = [];       // scribbles, of the same
let base = null;        // mask that they correct, as counts
let timeline = { objects: [] };
let timed = "";         // what the timeline was made from
let playing = false;
let wanted = null;      // frame that is asked for while another one is on its way
let loading = false;
let shown = null;       // resolves when what is loading is shown
let asked = 0;          // times that the picture was to be drawn again
let seen = "";          // what the masks on the stage were made from
let following = false;  // the frame that was tracked last is shown
let adding = null;      // resolves when the object that is being added is there
let finds = [];         // outlines that are on their way, oldest first; key: frame and object, once that is known
let said = 0;           // time of the newest error
const stage = new Stage(part("canvas"), { box, polygon, mask, click, scribble, read, pick: (id) => { if (id !== null) select(id); } });
const memory = new MemoryPanel(part("memory"), { now: () => ({ state, frame, selected }), change, fail, go });

// --- the server --------------------------------------------------------------------------------

let working = 0;
let changed = 0;     // changes that were asked for so far
let due = Promise.resolve();  // the newest of them is answered
let silent = false;  // the server did not answer

// Ask for a change, once those before it are answered: the server takes them in the order of the hand. The notice
// says "Saved" only when none is on its way.
async function change(path, method, body) {
  working++;
  changed++;
  stage.settled = false;
  say("Saving …");
  let answer = null;
  const turn = due.then(() => ask(path, { method, body }));
  due = turn.catch(() => {});
  try {
    answer = await turn;
    take(answer.state ?? answer);
    readTimeline().catch(fail);
  } catch (error) {
    fail(error);
  }
  working--;
  await showFrame(frame, true);
  if (answer && !working && !part("notice").classList.contains("bad")) say(finds.length ? FINDING : "Saved");
  return answer;
}

function say(text, bad = false) {
  part("notice").textContent = text;
  part("main").dataset.waiting = String(text.endsWith("…"));
  part("notice").classList.toggle("bad", bad);
  said = bad ? performance.now() : 0;
}

function fail(error) {
  if (error instanceof SignedOut) {
    part("signed-out").hidden = false;
    part("main").hidden = true;
    part("why").textContent = error.message;
  }
  say(error.message, true);
  silent = error instanceof NoAnswer;
}

function take(next) {
  state = next;
  if (selected !== null && !state.objects.some((object) => object.id === selected)) selected = null;
  if (selected === null && state.objects.length) selected = state.objects[0].id;
  draw();
}

// Where objects are seen; asked for again when rows or prompts have changed.
async function readTimeline() {
  const key = `${state.edits} ${state.tracked} ${state.available}`;
  if (key === timed) return;
  timed = key;
  timeline = await ask("v1/timeline");
  draw();
}

async function poll() {
  if (!document.hidden && !working) {
    try {
      const before = changed;
      const next = await ask("v1/state");
      if (before === changed) take(next);  // else a change has been answered with a newer one
      if (said && (silent || performance.now() - said > READ_MS)) say("");
      if (following && state.propagation.state !== "loading" && state.tracked) await showFrame(state.tracked - 1);
      else if (!loading) await showFrame(frame);  // what is on its way is newer
      if (!BUSY.includes(state.propagation.state)) following = false;
      await readTimeline();
    } catch (error) {
      fail(error);
      if (error instanceof SignedOut) return;
    }
  }
  setTimeout(poll, BUSY.includes(state?.propagation.state) ? 300 : 1200);
}

// --- pictures ----------------------------------------------------------------------------------

function last() { return Math.max(1, state?.video.frames ?? 1) - 1; }

// The newest wish wins: while one picture is on its way, those in between are left out. Resolves when it is shown.
function showFrame(index, again = false) {
  wanted = Math.min(last(), Math.max(0, index));
  if (again) asked++;
  const key = () => `${wanted} ${state.edits} ${state.tracked} ${state.available} ${asked}`;
  if (wanted === frame && stage.image && key() === seen) return;
  if (!loading) shown = show(key);
  return shown;
}

async function show(key) {
  loading = true;
  try {
    do {
      const target = wanted;
      const made = key();
      const [image, found] = await Promise.all([picture(target, query()), ask(`v1/frames/${target}/masks`)]);
      if (target !== frame) {
        forgetClicks();
        stage.plain = stage.painted = null;
      }
      frame = target;
      seen = made;
      const known = new Map(state.objects.map((object) => [object.id, object]));
      stage.opacity = opacity();
      stage.show(image, found.masks.filter((m) => known.has(m.id)).map((m) => ({ ...m, ...look(known.get(m.id)) })),
        !working && key() === made);
      draw();
    } while (wanted !== frame || key() !== seen);
    readPlain();
  } catch (error) {
    wanted = frame;
    playing = false;
    fail(error);
  } finally {
    loading = false;
  }
}

// A mask that is not saved yet is drawn here, over the picture without masks.
async function readPlain() {
  const at = frame;
  if (!["click", "scribble", "brush", "eraser"].includes(stage.tool) || stage.plain || playing || following) return;
  try {
    const image = await picture(at);
    if (at === frame) stage.plain = image;
    stage.draw();
  } catch (error) {
    fail(error);
  }
}

function look(object) { return { colour: object.colour, hidden: object.hidden }; }

function forgetClicks() {
  [clicks, strokes, base] = [[], [], null];
  Object.assign(stage, { clicks, strokes, asked: null });
}

// Plays at speed: frames that come too late are left out.
async function play() {
  following = false;
  playing = !playing;
  draw();
  const rate = (state.video.rate ?? 25) * Number(part("speed").value);
  if (frame >= last()) await showFrame(0);
  const from = frame;
  const begun = performance.now();
  while (playing && frame < last()) {
    const passed = (performance.now() - begun) / 1000;
    const due = Math.min(last(), from + Math.floor(passed * rate));
    if (due > frame && !loading) await showFrame(due);
    else await new Promise((done) => setTimeout(done, Math.max(4, 1000 * ((frame + 1 - from) / rate - passed))));
  }
  playing = false;
  draw();
}

function go(index) {
  playing = following = false;
  showFrame(index);
}

function jump(direction) {
  const frames = jumps(part("jump").value, state, timeline);
  const next = direction > 0 ? frames.find((f) => f > frame) : frames.findLast((f) => f < frame);
  if (next !== undefined) go(next);
}

function nextKind() {
  part("jump").selectedIndex = (part("jump").selectedIndex + 1) % part("jump").length;
}

// --- pointing ----------------------------------------------------------------------------------

async function subject() {
  if (selected !== null && state.objects.some((object) => object.id === selected)) return selected;
  // Two quick clicks are of one object.
  adding ??= change("v1/objects", "POST", { category: null }).finally(() => { adding = null; });
  return (await adding)?.id ?? null;  // the first object is selected by itself
}

async function prompt(body) {
  const at = frame;
  following = false;
  const id = await subject();
  return id === null ? null : putPrompt(at, id, body);
}

function putPrompt(at, id, body) { return change(`v1/prompts/${at}/${id}`, "PUT", body); }

function box(given) {
  forgetClicks();
  prompt({ box: given });
}

function polygon(points) {
  forgetClicks();
  prompt({ polygons: [points] });
}

function mask(given, any) {
  forgetClicks();
  if (any) prompt({ counts: given });
  else if (selected !== null) {
    takePrompt();
    showFrame(frame, true);
  }
}

function click(point) { point.positive || begun() ? pointOut(point, null) : refuse("click"); }

function scribble(stroke) { stroke.positive || begun() ? pointOut(null, stroke) : refuse("scribble"); }

// Whether there is something to take away from.
function begun() { return clicks.length > 0 || strokes.length > 0 || stage.mine() !== null; }

function refuse(what) {
  say(`The first ${what} goes onto the object; those beside it (right button) take away.`, true);
  stage.draw();
}

// The mask of all clicks and scribbles of the selected object on this frame becomes its prompt; also if another
// object or frame is chosen before it is found.
async function pointOut(point, stroke) {
  const at = frame;
  playing = following = false;
  if (!clicks.length && !strokes.length) base = stage.mine() ? counts(stage.mine(), stage.height, stage.width) : null;
  if (point) clicks = [...clicks, point];
  if (stroke) strokes = [...strokes, stroke];
  // A mask that is corrected by negative ones only has no point on the object yet.
  const onto = [...clicks, ...strokes].some((each) => each.positive);
  const given = { clicks: onto ? clicks : [onObject(), ...clicks], strokes, previous: base };
  Object.assign(stage, { clicks, strokes });
  stage.draw();
  const find = { key: null, dropped: false };
  finds.push(find);
  say(FINDING);
  const id = await subject();
  find.key = `${at} ${id}`;
  const isShown = () => at === frame && id === selected;
  let found = null;
  try {
    if (id !== null) found = await ask(`v1/frames/${at}/clicks`, { method: "POST", body: given });
  } catch (error) {
    if (isShown()) forgetClicks();
    fail(error);
  }
  const place = finds.indexOf(find);
  const alike = (other) => other.key === find.key && !other.dropped;
  // The answer of a later click has this one in it, whichever comes first.
  const overtaken = find.dropped || finds.slice(place + 1).some(alike);
  if (found && !overtaken) for (const older of finds.slice(0, place).filter(alike)) older.dropped = true;
  finds = finds.filter((other) => other !== find);
  if (overtaken) return;
  if (found) {
    const pixels = decode(found.rle, ...found.size);
    if (isShown()) stage.painted = pixels;  // seen at once, saved thereafter
    stage.draw();
    if (await putPrompt(at, id, { counts: counts(pixels, ...found.size) })) return;
  }
  if (id !== null && !isShown()) return;
  forgetClicks();  // refused: what is shown is what is stored
  stage.painted = null;
  stage.draw();
}

// A click or scribble whose outline is on its way is what was done last.
function undo() {
  const last = finds.findLast((find) => !find.dropped);
  forgetClicks();
  if (!last) return change("v1/undo", "POST");
  last.dropped = true;
  stage.painted = null;
  stage.draw();
  say("The click was taken back");
}

// A point on the object for those who only take away from it: deep in its mask, far from what is taken away.
function onObject() {
  const away = [...clicks.map((click) => [click.x, click.y]), ...strokes.flatMap((stroke) => stroke.points)];
  const [x, y] = deepest(stage.mine(), stage.height, stage.width, away);
  return { x, y, positive: true };
}

function read(point) {
  playing = following = false;
  stage.asked = point;
  memory.readAt(point);
}

function takePrompt() {
  forgetClicks();
  if (state.objects.find((object) => object.id === selected)?.prompts.includes(frame)) {
    change(`v1/prompts/${frame}/${selected}`, "DELETE");
  }
}

function removeHere() {
  const object = state.objects.find((each) => each.id === selected);
  if (!object) return;
  change(`v1/removals/${frame}/${object.id}`, object.removals.includes(frame) ? "DELETE" : "PUT");
}

function choose(tool) {
  stage.tool = tool;
  stage.cancel();
  forgetClicks();
  readPlain();
  draw();
}

function select(id) {
  if (id !== selected) {
    forgetClicks();
    stage.painted = null;
  }
  selected = id;
  draw();
}

// --- propagation and export --------------------------------------------------------------------

function propagate(until = null) {
  if (BUSY.includes(state.propagation.state)) change("v1/pause", "POST");
  else {
    following = part("follow").checked;
    change("v1/propagate", "POST", { until });
  }
}

function toNext() {
  const from = state.tracked;
  const frames = state.objects.flatMap((object) => object.prompts).filter((f) => f > from);
  propagate(frames.length ? Math.min(...frames) : null);
}

async function importMasks() {
  const files = [...part("masks").files];
  part("masks").value = "";
  if (!files.length) return;
  forgetClicks();
  try {
    await change("v1/import", "POST", await bodyOf(files, frame));
  } catch (error) {
    fail(error);
  }
}

async function save(format) {
  try {
    say("Writing the file …");
    say(`Downloading ${await download(`v1/export/${format}`)}`);
  } catch (error) {
    fail(error);
  }
}

// --- drawing -----------------------------------------------------------------------------------

function draw() {
  if (!state) return;
  part("main").dataset.edits = String(state.edits);
  const named = USER ? `${state.video.name} · ${USER}` : state.video.name;
  document.title = `${named} – xmem annotate`;
  part("video").textContent = named;
  part("scrub").max = String(last());
  if (document.activeElement !== part("scrub") || !loading) part("scrub").value = String(frame);
  part("scrub").setAttribute("aria-valuetext", `frame ${frame} of ${last()}`);
  part("frame").textContent = `${frame} / ${last()}`;
  part("goto").max = String(last());
  part("time").textContent = state.video.rate ? `${(frame / state.video.rate).toFixed(2)} s` : "";
  part("play").textContent = playing ? "Pause" : "Play";
  part("undo").disabled = !state.can_undo;
  part("redo").disabled = !state.can_redo;
  for (const tool of TOOLS) part(`tool-${tool}`).setAttribute("aria-pressed", String(stage.tool === tool));
  part("negative").setAttribute("aria-pressed", String(stage.negative));
  part("negative").disabled = !["click", "scribble"].includes(stage.tool);
  part("canvas").dataset.tool = stage.tool;
  const own = state.objects.find((object) => object.id === selected);
  stage.selected = selected;
  stage.colour = own?.colour ?? "#ffffff";
  part("take").disabled = !own?.prompts.includes(frame);
  part("remove").disabled = !own;
  part("remove").textContent = own?.removals.includes(frame) ? "Keep from here" : "End here";
  drawProgress();
  drawObjects(part("objects"), { state, timeline, selected, frame, masks: stage.masks, did });
  part("hint").hidden = state.objects.length > 0;
  memory.draw();
  drawTimeline(part("timeline"), state, timeline, frame, selected);
}

function drawProgress() {
  const run = state.propagation;
  const busy = BUSY.includes(run.state);
  const total = last() + 1;
  part("propagate").textContent = busy ? "Pause" : "Propagate";
  part("next").disabled = busy;
  if (document.activeElement !== part("direction")) part("direction").value = state.direction;
  part("progress").max = total;
  part("progress").value = state.tracked;
  const rate = run.rate ? `, ${run.rate.toFixed(1)} frames/s` : "";
  const words = {
    loading: "Loading the network …",
    running: `Tracking frame ${run.position ?? 0} of ${total}${rate}`,
    publishing: "Writing the rows …",
  };
  const rest = state.published && state.tracked >= total ? `All ${total} frames are tracked and written`
    : state.published ? `Tracked backward from frame ${state.tracked - 1}, and written`
    : state.available > state.tracked ? `Changed from frame ${state.tracked} on: propagate again`
    : state.tracked >= total ? `All ${total} frames are tracked: Propagate writes them`
    : state.tracked ? `${state.tracked} of ${total} frames are tracked` : "Nothing is tracked yet";
  const failed = run.state === "failed";
  part("doing").textContent = failed ? `Failed: ${run.message}` : words[run.state] ?? rest;
  part("doing").classList.toggle("bad", failed);
  for (const id of ["coco", "davis", "workspace", "overlay-video"]) part(id).disabled = !state.published;
}

function edit(id, values) { return change(`v1/objects/${id}`, "PATCH", values); }

const did = {
  select, edit,
  drop: (id) => change(`v1/objects/${id}`, "DELETE"),
  merge: (id, other) => { forgetClicks(); change(`v1/objects/${id}/merge`, "POST", { other }); },
  split: async (id) => {
    forgetClicks();
    const answer = await change(`v1/objects/${id}/split`, "POST", { frame });
    if (answer) select(answer.id);
  },
};

// --- controls ----------------------------------------------------------------------------------

const ACTIONS = {
  play, propagate: () => propagate(), next: toNext, take: takePrompt, remove: removeHere,
  undo,
  redo: () => { forgetClicks(); change("v1/redo", "POST"); },
  back: () => go(frame - 1), forward: () => go(frame + 1),
  "prompt-back": () => jump(-1), "prompt-forward": () => jump(1),
  add: async () => { const answer = await change("v1/objects", "POST", { category: null }); if (answer) select(answer.id); },
  help: () => part("keys").showModal(),
  "zoom-in": () => stage.zoom(1.5), "zoom-out": () => stage.zoom(1 / 1.5), "zoom-fit": () => stage.zoom(0),
  negative: () => { stage.negative = !stage.negative; draw(); },
  coco: () => save("coco"), davis: () => save("davis"), workspace: () => save("workspace"),
  import: () => part("masks").click(), prompts: () => save("prompts"),
  "overlay-video": () => save(`video${query()}`),
};
for (const [id, action] of Object.entries(ACTIONS)) part(id).addEventListener("click", () => action());
for (const tool of TOOLS) part(`tool-${tool}`).addEventListener("click", () => choose(tool));
part("direction").addEventListener("change", () => { part("direction").blur(); turn(part("direction").value); });
part("masks").addEventListener("change", importMasks);
part("scrub").addEventListener("input", () => go(Number(part("scrub").value)));
part("size").addEventListener("input", () => { stage.brush = Number(part("size").value); stage.draw(); });
part("timeline").addEventListener("pointerdown", (event) => {
  part("timeline").setPointerCapture(event.pointerId);
  go(frameAt(part("timeline"), state, event));
});
part("timeline").addEventListener("pointermove", (event) => { if (event.buttons) go(frameAt(part("timeline"), state, event)); });
window.addEventListener("resize", () => draw());
part("goto").addEventListener("change", () => {
  if (part("goto").value) go(Number(part("goto").value));
  part("goto").value = "";
});
part("follow").addEventListener("change", () => { following = part("follow").checked; });
stage.view.changed = (zoom) => {
  part("zoom-fit").textContent = `${Math.round(100 * zoom)} %`;
  part("zoom-fit").setAttribute("aria-label", `Show the whole picture; it is shown at ${Math.round(100 * zoom)} % of that`);
  part("zoom-out").disabled = part("zoom-fit").disabled = zoom === 1;
};
stage.view.changed(1);

const KEYS = {
  ArrowLeft: () => go(frame - 1), ArrowRight: () => go(frame + 1),
  "Shift+ArrowLeft": () => go(frame - 10), "Shift+ArrowRight": () => go(frame + 10),
  Home: () => go(0), End: () => go(last()), " ": play,
  ",": () => jump(-1), ".": () => jump(1),
  a: () => choose("select"), "+": () => stage.zoom(1.5), "-": () => stage.zoom(1 / 1.5), "0": () => stage.zoom(0),
  c: () => choose("click"), r: () => choose("scribble"), i: () => choose("read"), "Shift+I": () => { if (selected !== null) memory.readAt(null); }, m: () => memory.toggle(), b: () => choose("box"), o: () => choose("polygon"), p: () => choose("brush"), e: () => choose("eraser"),
  f: () => ACTIONS.import(), k: () => flip("negative"), y: () => turn(), w: () => flip("follow"), "#": () => part("goto").focus(), v: nextLook, u: () => flip("outlines"), d: () => flip("ids"),
  "[": () => resize(-2), "]": () => resize(2), n: () => ACTIONS.add(), h: () => toggle("hidden"), l: () => toggle("locked"), x: removeHere, s: () => { if (selected !== null) did.split(selected); }, j: nextKind,
  PageUp: () => step(-1), PageDown: () => step(1), t: () => flipMasks(), z: () => stage.zoomToMine(),
  Delete: takePrompt, Backspace: () => stage.dropPoint() || takePrompt(), Enter: () => stage.finishPolygon(), Escape: () => stage.cancel(),
  g: () => propagate(), "Shift+G": toNext, "Ctrl+z": () => ACTIONS.undo(), "Ctrl+Shift+Z": () => ACTIONS.redo(),
  "Ctrl+y": () => ACTIONS.redo(), "?": () => ACTIONS.help(),
};

function turn(to = null) {
  const all = ["forward", "backward", "both"];
  const direction = to ?? all[(all.indexOf(state.direction) + 1) % all.length];
  change("v1/direction", "PUT", { direction });
}

// The object before or after the selected one; from the last one to the first.
function step(by) {
  const ids = state.objects.map((object) => object.id);
  if (ids.length) select(ids.at((ids.includes(selected) ? ids.indexOf(selected) + by : Math.min(by, 0)) % ids.length));
}

function resize(by) {
  part("size").value = String(Number(part("size").value) + by);
  part("size").dispatchEvent(new Event("input"));
}

function toggle(name) {
  const object = state.objects.find((each) => each.id === selected);
  if (object) edit(object.id, { [name]: !object[name] });
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input[type=text], input[type=number], input[type=color], select, textarea") || part("keys").open;
  if (typing || !state) return;
  if (event.target === part("canvas") && stage.key(event)) return event.preventDefault();
  if (event.target.matches("input[type=range]:not(#scrub)") && /^(Arrow|Home|End|Page)/.test(event.key)) return;
  if ((event.key === " " || event.key === "Enter") && event.target.matches("button, summary")) return;
  const name = keyName(event);
  const number = state.objects.find((object) => String(object.id) === name);
  if (number) select(number.id);
  else if (KEYS[name]) KEYS[name]();
  else return;
  event.preventDefault();
});

// What is not saved yet would be lost with the page: the browser asks.
window.addEventListener("beforeunload", (event) => { if (working || finds.length) event.preventDefault(); });

async function begin() {
  try {
    await signIn();
    await beginLooks(() => { if (state) showFrame(frame, true); }, fail);
    take(await ask("v1/state"));
    part("main").hidden = false;
    stage.setSize(state.video.width, state.video.height);
    await readTimeline();
    await showFrame(0, true);
    poll();
  } catch (error) {
    fail(error);
  }
}

begin();
