// Requests to the annotator. The link on the terminal holds a code that opens one session; its token stays in
// this tab and goes into headers only.

const TOKEN = `xmem-annotate-token ${location.pathname}`;  // each user of a server has a path

export class SignedOut extends Error {}
export class NoAnswer extends Error {}

export async function signIn() {
  const code = new URLSearchParams(location.hash.slice(1)).get("code");
  if (code) {
    history.replaceState(null, "", location.pathname);
    const answer = await fetch("v1/session", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ code }),
    });
    const body = await answer.json();
    if (answer.ok) sessionStorage.setItem(TOKEN, body.token);
    else if (!sessionStorage.getItem(TOKEN)) throw new SignedOut(body.message);
  }
  if (!sessionStorage.getItem(TOKEN)) throw new SignedOut("This page is opened by the link on the terminal.");
}

async function request(path, { method = "GET", body, signal, file, type } = {}) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(TOKEN)}` };
  if (body !== undefined || file) headers["Content-Type"] = type ?? "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: file ?? (body === undefined ? body : JSON.stringify(body)) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new NoAnswer("The annotator does not answer. Is it still running on the terminal?");
  }
  if (answer.status === 401) {
    sessionStorage.removeItem(TOKEN);
    throw new SignedOut("The session has ended. Open the newest link on the terminal.");
  }
  if (!answer.ok) {
    const problem = await answer.json().catch(() => null);
    throw new Error(problem?.message ?? `the annotator answered ${answer.status}`);
  }
  return answer;
}

export async function ask(path, options) {
  return (await request(path, options)).json();
}

export async function upload(path, file, type) {
  return (await request(path, { method: "POST", file, type })).json();
}

// look: the query of a look; "" for the frame without masks.
export async function picture(frame, look = "") {
  return createImageBitmap(await (await request(`v1/frames/${frame}.jpg${look}`)).blob());
}

export async function thumbnail(frame) {
  return createImageBitmap(await (await request(`v1/thumbnails/${frame}.jpg`)).blob());
}

export async function download(path) {
  const answer = await request(path);
  const name = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition") ?? "")?.[1] ?? "export";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  return name;
}
