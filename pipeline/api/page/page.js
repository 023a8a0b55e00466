"use strict";
// Lists the streams and shows one. The token stays in this tab and goes into headers only; what the browser
// opens without headers (pictures, the WebSocket) gets a ticket that ends after a minute.

const TOKEN = "xmem-token";
const part = (id) => document.getElementById(id);
let shown = null;   // id of the stream that is shown
let socket = null;
let turn = 0;       // grows with every stream that is opened: answers for an older one are dropped

function headers() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

class SignedOut extends Error {}

// The service wants a token and got none, or one that it does not know.
function askForToken(used) {
  const current = sessionStorage.getItem(TOKEN);
  if (current !== used) return;  // another one was entered while this request was under way
  if (used) {
    sessionStorage.removeItem(TOKEN);
    part("rejected").textContent = "This token was not accepted. It may be mistyped or cut off when it was copied, "
      + "or it is no longer valid. Copy the whole token again, or ask for a new one.";
  }
  say("");
  showLogin(true);
}

function showLogin(shown) {
  const before = part("login").hidden;
  part("login").hidden = !shown;
  part("main").hidden = shown;
  part("leave").hidden = shown || !sessionStorage.getItem(TOKEN);
  if (shown && before) part("token").focus();
  if (!shown) part("rejected").textContent = "";
}

async function ask(path, options = {}) {
  const used = sessionStorage.getItem(TOKEN);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch {
    throw new Error("The service does not answer. This page keeps trying.");
  }
  if (answer.status === 401) {
    askForToken(used);
    throw new SignedOut();
  }
  const body = answer.headers.get("content-type")?.startsWith("application/json") ? await answer.json() : null;
  if (!answer.ok) throw new Error(body?.message ?? `the service answered ${answer.status}`);
  showLogin(false);
  return body;
}

function say(text) { part("notice").textContent = text; }
function number(value, digits = 1) { return value === null || value === undefined ? "–" : value.toFixed(digits); }
function total(counts) { return Object.values(counts).reduce((sum, count) => sum + count, 0); }

function reasons(counts) {
  const named = Object.entries(counts).map(([reason, count]) => `${count} ${reason}`);
  return named.length ? `${total(counts)} (${named.join(", ")})` : "0";
}

function drawList(streams) {
  const items = streams.map((stream) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = stream.id;
    button.setAttribute("aria-current", String(stream.id === shown));
    button.addEventListener("click", () => { location.hash = encodeURIComponent(stream.id); });
    const small = document.createElement("small");
    small.textContent = `${stream.state} · ${stream.objects.length} objects · `
      + `${number(stream.rates.tracked_fps)} frames/s`;
    button.append(small);
    item.append(button);
    return item;
  });
  // Drawing anew would take the focus from whoever goes through the list with keys.
  const focused = [...part("streams").children].findIndex((item) => item.contains(document.activeElement));
  part("streams").replaceChildren(...items);
  if (focused >= 0) items[focused]?.firstChild.focus();
  part("none").hidden = streams.length > 0;
}

function drawStream(stream) {
  part("name").textContent = stream.id;
  part("state").textContent = stream.state;
  part("state").className = `state ${stream.state}`;
  part("cause").textContent = stream.cause ?? "";
  part("pause").textContent = stream.state === "paused" ? "Go on" : "Pause";
  const numbers = [
    ["Received", stream.ledger.received],
    ["Tracked", stream.ledger.tracked],
    ["Dropped", reasons(stream.ledger.dropped)],
    ["Corrupt", reasons(stream.ledger.corrupt)],
    ["In flight", stream.ledger.in_flight],
    ["Camera", `${number(stream.rates.received_fps)} frames/s`],
    ["Tracker", `${number(stream.rates.tracked_fps)} frames/s`],
    ["Lag p50 / p99", `${number(stream.lag_seconds.p50, 2)} / ${number(stream.lag_seconds.p99, 2)} s`],
    ["Camera's URL", stream.url ?? "–"],
  ];
  part("numbers").replaceChildren(...numbers.map(([name, value]) => {
    const pair = document.createElement("div");
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    pair.append(dt, dd);
    return pair;
  }));
  part("stream").hidden = false;
}

function drawObjects(objects) {
  part("objects").replaceChildren(...objects.map((object) => {
    const row = document.createElement("tr");
    row.className = object.area ? "" : "hidden-now";
    const box = object.bbox ? object.bbox.join(", ") : "out of sight";
    for (const value of [object.id, object.category ?? "", number(object.score, 2), object.area, box]) {
      const cell = document.createElement("td");
      cell.textContent = value;
      row.append(cell);
    }
    return row;
  }));
}

function closeSocket() {
  if (socket) socket.onclose = null;
  socket?.close();
  socket = null;
}

async function open(id) {
  const mine = ++turn;
  shown = id;
  closeSocket();
  part("picture").removeAttribute("src");
  try {
    const path = `v1/streams/${encodeURIComponent(id)}`;
    const stream = await ask(path);
    const { ticket } = await ask(`${path}/ticket`, { method: "POST" });
    if (mine !== turn) return;
    drawStream(stream);
    drawObjects(stream.objects);
    const query = `ticket=${encodeURIComponent(ticket)}`;
    // There may be no picture yet; a browser would not ask for it again by itself.
    part("picture").onerror = () => { if (mine === turn) setTimeout(() => mine === turn && open(id), 2000); };
    part("picture").src = `${path}/preview.mjpeg?${query}`;
    const address = new URL(`${path}/live?${query}`, location.href);
    address.protocol = address.protocol.replace("http", "ws");
    socket = new WebSocket(address);
    socket.onmessage = (event) => {
      const news = JSON.parse(event.data);
      if (mine !== turn || news.type !== "records") return;
      drawObjects(news.records.map((record) => ({ ...record, id: record.object_id })));
    };
    socket.onclose = () => { if (mine === turn) setTimeout(() => mine === turn && open(id), 2000); };
    say("");
  } catch (error) {
    if (mine !== turn || error instanceof SignedOut) return;  // signing in opens it again
    say(error.message);
    setTimeout(() => mine === turn && open(id), 3000);
  }
}

async function refresh() {
  try {
    const { streams } = await ask("v1/streams");
    const current = streams.find((stream) => stream.id === shown);
    if (current) drawStream(current);
    if (shown === null && streams.length > 0) location.hash = encodeURIComponent(streams[0].id);
    drawList(streams);
    if (current || shown === null) say("");
  } catch (error) {
    if (!(error instanceof SignedOut)) say(error.message);
  }
}

async function loop() {
  if (!document.hidden && (part("login").hidden || sessionStorage.getItem(TOKEN))) await refresh();
  setTimeout(loop, 2000);
}

window.addEventListener("hashchange", () => {
  const id = decodeURIComponent(location.hash.slice(1));
  if (id) open(id);
  refresh();
});
part("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, part("token").value.trim());
  part("token").value = "";
  part("rejected").textContent = "";
  refresh();
  if (shown) open(shown);
});
part("leave").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  location.reload();
});
part("pause").addEventListener("click", async () => {
  try {
    const pause = part("state").textContent !== "paused";
    const body = JSON.stringify({ pause });
    const path = `v1/streams/${encodeURIComponent(shown)}`;
    drawStream(await ask(path, { method: "PATCH", body, headers: { "Content-Type": "application/json" } }));
  } catch (error) {
    if (!(error instanceof SignedOut)) say(error.message);
  }
});

if (location.hash.length > 1) open(decodeURIComponent(location.hash.slice(1)));
loop();
