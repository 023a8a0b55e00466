// The form that adds a stream.

import { ask, SignedOut } from "./server.js";
import { element } from "./words.js";

const part = (id) => document.getElementById(id);
const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;

// What is wrong with a form in plain words, before it is sent; the service checks it again.
function mistake(form) {
  const url = form.url.value.trim();
  if (!/^rtsps?:\/\/[^\s]+$/i.test(url)) {
    return "The address must begin with rtsp:// or rtsps:// and have no spaces, for example rtsp://10.20.0.31:554/stream.";
  }
  const name = form.name.value.trim();
  if (name && !NAME.test(name)) {
    return "The name may have letters, digits, dots, hyphens and underscores, and begins with a letter or digit.";
  }
  if (form.fps.value && !(Number(form.fps.value) > 0)) return "Frames per second must be a number above 0.";
  return "";
}

function content(form) {
  const given = { url: form.url.value.trim(), detector: form.detector.value || null, settings: {} };
  if (form.name.value.trim()) given.id = form.name.value.trim();
  if (form.fps.value) given.settings.fps = Number(form.fps.value);
  if (form.most.value) given.settings.max_objects = Number(form.most.value);
  if (form.transport.value) given.settings.transport = form.transport.value;
  if (form.classes.value.trim() && given.detector) given.settings.detect_classes = form.classes.value.trim();
  return given;
}

// added(stream) is called with each stream that was added.
export function setUpAdding(added) {
  const [dialog, form] = [part("adding"), part("add-form").elements];

  part("add").addEventListener("click", async () => {
    part("add-problem").textContent = "";
    dialog.showModal();
    try {
      const options = await ask("v1/options");
      const [filled, before] = [form.detector.length > 0, form.detector.value];
      form.detector.replaceChildren(
        ...options.detectors.map((name) => element("option", name, { value: name })),
        element("option", "nothing: I point at objects myself", { value: "" }),
      );
      // What was chosen while the answer was on its way stays.
      if (filled && ["", ...options.detectors].includes(before)) form.detector.value = before;
      form.most.placeholder = options.streams.max_objects ?? "";
      part("allowed").textContent = options.networks.length
        ? `Cameras may be in ${options.networks.join(", ")}, on ${options.ports.length > 1 ? "ports" : "port"} ${options.ports.join(", ")}.`
        : "This service takes no cameras yet: the person who runs it names their network with --allow-network.";
    } catch (error) {
      if (error instanceof SignedOut) dialog.close();
      else part("add-problem").textContent = error.message;
    }
  });
  part("add-cancel").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => part("add-form").reset());  // a password is not left in the form
  part("add-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const wrong = mistake(form);
    part("add-problem").textContent = wrong;
    if (wrong) return;
    part("add-send").disabled = true;
    try {
      const stream = await ask("v1/streams", { method: "POST", body: content(form) });
      dialog.close();
      added(stream);
    } catch (error) {
      if (error instanceof SignedOut) dialog.close();
      else part("add-problem").textContent = `It was not added: ${error.message}.`;
    } finally {
      part("add-send").disabled = false;
    }
  });
}
