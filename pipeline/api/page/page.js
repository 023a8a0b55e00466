// The dashboard: signing in, the grid of streams, one of them large, and the newest events of all.

import { setUpAdding } from "./adding.js";
import { keyName } from "./keys.js";
import { ask, forgetToken, keepToken, login, SignedOut, token } from "./server.js";
import { Stream } from "./stream.js";
import { Wall } from "./wall.js";
import { byCategory, element, eventText, eventTime, number } from "./words.js";

const part = (id) => document.getElementById(id);
const MOST_EVENTS = 12;

function say(text, good = false) {
  part("notice").textContent = text;
  part("notice").className = good ? "good" : "";
}

function showLogin(shown) {
  const before = part("login").hidden;
  part("login").hidden = !shown;
  part("main").hidden = shown;
  part("leave").hidden = shown || !token();
  part("add").hidden = shown;
  if (shown && before) part("token").focus();
  if (!shown) part("rejected").textContent = "";
}

login.wanted = (why) => {
  if (why) part("rejected").textContent = why;
  say("");
  showLogin(true);
};
login.accepted = () => showLogin(false);

let missing = 0;  // refreshes in a row that did not list the stream that is shown

function leave() {
  history.replaceState(null, "", location.pathname);
  refresh();
}

const stream = new Stream(say, leave);
const wall = new Wall(part("streams"), (id) => {
  say("");  // what was said was of another stream
  location.hash = encodeURIComponent(id);
});

function drawEvents(streams) {
  const events = streams.flatMap((one) => one.recent_events.map((event) => ({ ...event, stream: one.id })));
  events.sort((a, b) => String(b.wall_time ?? "").localeCompare(String(a.wall_time ?? "")));
  part("newest").replaceChildren(...events.slice(0, MOST_EVENTS).map((event) => {
    const item = element("li");
    item.append(element("time", eventTime(event)), " ", element("strong", event.stream), " ", eventText(event));
    return item;
  }));
}

async function refresh() {
  try {
    const { streams } = await ask("v1/streams");
    const current = streams.find((one) => one.id === stream.id);
    if (current) stream.draw(current);
    missing = current || stream.id === null ? 0 : missing + 1;
    if (missing > 1) {
      say(`There is no stream ${stream.id} any more.`, true);
      stream.forget();
      history.replaceState(null, "", location.pathname);
    }
    if (stream.id === null && streams.length > 0) location.hash = encodeURIComponent(streams[0].id);
    wall.draw(streams, stream.id);
    drawEvents(streams);
    part("none").hidden = streams.length > 0;
    const running = streams.filter((one) => one.state === "running").length;
    const seconds = streams.reduce((sum, one) => sum + one.rates.tracked_fps, 0);
    part("totals").textContent = streams.length
      ? `${running} of ${streams.length} running · ${number(seconds)} frames/s · ${byCategory(streams.flatMap((one) => one.objects))}`
      : "";
    if ((current || stream.id === null) && part("notice").className !== "good") say(noticeKept());
  } catch (error) {
    if (!(error instanceof SignedOut)) say(error.message);
  }
}

// What was refused stays to be read; that the service did not answer is over once it does.
function noticeKept() {
  const text = part("notice").textContent;
  return text.startsWith("Not done") ? text : "";
}

async function loop() {
  if (!document.hidden && (part("login").hidden || token())) await refresh();
  setTimeout(loop, 2000);
}

window.addEventListener("hashchange", () => {
  const id = decodeURIComponent(location.hash.slice(1));
  if (id) stream.open(id);
  refresh();
});
const KEYS = {
  "?": () => part("keys").showModal(),
  n: () => part("add").click(),
  p: () => { if (stream.id !== null) part("pause").click(); },
  "[": () => wall.step(stream.id, -1), "]": () => wall.step(stream.id, 1),
};
part("help").addEventListener("click", KEYS["?"]);
window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || part("main").hidden) return;
  if (["INPUT", "SELECT", "BUTTON"].includes(event.target.tagName) && event.key === "Enter") return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const name = keyName(event);
  if (KEYS[name]) KEYS[name]();
  else if (stream.id === null || !stream.key(event)) return;
  event.preventDefault();  // else arrow keys scroll, too, and a key is typed into the form that it opens
});
part("login").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(part("token").value.trim());
  part("token").value = "";
  part("rejected").textContent = "";
  refresh();
  if (stream.id) stream.open(stream.id);
});
part("leave").addEventListener("click", () => {
  forgetToken();
  location.reload();
});
setUpAdding((added) => {
  say(`${added.id} is followed`, true);
  location.hash = encodeURIComponent(added.id);
});

if (location.hash.length > 1) stream.open(decodeURIComponent(location.hash.slice(1)));
loop();
