// Requests to the service. The token stays in this tab and goes into headers only; what the browser opens
// without headers (the live picture, the WebSocket) gets a ticket that ends after a minute.

const TOKEN = "xmem-token";
const REJECTED = "This token was not accepted. It may be mistyped or cut off when it was copied, or it is no longer "
  + "valid. Copy the whole token again, or ask for a new one.";

export class SignedOut extends Error {}

// Set by the page: called with the text to show when the service wants another token, and when it is content.
export const login = { wanted: () => {}, accepted: () => {} };

export function token() { return sessionStorage.getItem(TOKEN); }
export function keepToken(text) { sessionStorage.setItem(TOKEN, text); }
export function forgetToken() { sessionStorage.removeItem(TOKEN); }

function askForToken(used) {
  if (token() !== used) return;  // another one was entered while this request was under way
  if (used) forgetToken();
  login.wanted(used ? REJECTED : "");
}

async function request(path, { method = "GET", body } = {}) {
  const used = token();
  const headers = used ? { Authorization: `Bearer ${used}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body === undefined ? body : JSON.stringify(body) });
  } catch {
    throw new Error("The service does not answer. This page keeps trying.");
  }
  if (answer.status === 401) {
    askForToken(used);
    throw new SignedOut();
  }
  if (!answer.ok) {
    const problem = await answer.json().catch(() => null);
    throw new Error(problem?.message ?? `the service answered ${answer.status}`);
  }
  login.accepted();
  return answer;
}

export async function ask(path, options) {
  const answer = await request(path, options);
  return answer.status === 204 ? null : answer.json();
}

export async function picture(path) {
  return createImageBitmap(await (await request(path)).blob());
}

export function streamPath(id) { return `v1/streams/${encodeURIComponent(id)}`; }
