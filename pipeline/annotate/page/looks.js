// How masks are shown. The server draws them, as `xmem render` does, and keeps the choice with the project.

import { ask, upload } from "./server.js";

const PAUSE = 300;  // ms without a change before a choice is sent
const OWN = { davis: 0.5, fade: 0.5, light: 0.1, popup: 1, layered: 1 };  // opacity that an overlay begins with
const MARKED = ["davis", "fade", "light"];
const part = (id) => document.getElementById(id);

let look = { overlay: "davis", opacity: 0.5, outlines: true, ids: true, layer: null, layer_place: "behind" };
let sending = 0;

// The look as the query of a picture's address; "" for the picture as it is.
export function query() {
  if (!look.overlay) return "";
  const { layer, layer_place, ...shown } = look;
  return `?${new URLSearchParams(look.overlay === "layered" ? { ...shown, layer, layer_place } : shown)}`;
}

export function opacity() { return look.overlay ? Math.max(0.2, look.opacity) : 0.5; }

export function nextLook() {
  part("overlay").selectedIndex = (part("overlay").selectedIndex + 1) % part("overlay").length;
  part("overlay").dispatchEvent(new Event("change"));
}

// The picture alone, or again with the masks as they were shown before.
export let flipMasks = () => {};

export function flip(id) { if (!part(id).disabled) part(id).click(); }

function keep(failed) {
  clearTimeout(sending);
  sending = setTimeout(() => ask("v1/look", { method: "PUT", body: { ...look, overlay: look.overlay || null } }).catch(failed), PAUSE);
}

// Begin with the look chosen last. changed: called when masks are to be shown otherwise. failed: called with an error.
export async function beginLooks(changed, failed) {
  const set = (values) => {
    look = { ...look, ...values };
    keep(failed);
    show();
    changed();
  };
  part("overlay").addEventListener("change", () => {
    const overlay = part("overlay").value;
    if (overlay === "layered" && !look.layer) {
      show();
      part("layer").click();
      return;
    }
    const marked = MARKED.includes(overlay);
    set({ overlay, opacity: OWN[overlay] ?? look.opacity, outlines: marked, ids: marked });
  });
  let before = null;
  flipMasks = () => {
    const now = { overlay: look.overlay, opacity: look.opacity, outlines: look.outlines, ids: look.ids };
    if (look.overlay) set({ overlay: "" });
    else set(before ?? { overlay: "davis" });
    before = now.overlay ? now : null;
  };
  part("opacity").addEventListener("input", () => set({ opacity: Number(part("opacity").value) }));
  for (const id of ["outlines", "ids"]) part(id).addEventListener("change", () => set({ [id]: part(id).checked }));
  part("layer-place").addEventListener("change", () => set({ layer_place: part("layer-place").value }));
  part("choose-layer").addEventListener("click", () => part("layer").click());
  part("layer").addEventListener("change", async () => {
    const [file] = part("layer").files;
    part("layer").value = "";
    if (!file) return;
    try {
      const { layer } = await upload("v1/layers", file, "image/png");
      set({ overlay: "layered", layer, opacity: OWN.layered, outlines: false, ids: false });
    } catch (error) {
      failed(error);
    }
  });
  const { look: kept } = await ask("v1/look");
  if (kept) look = { ...look, ...kept, overlay: kept.overlay ?? "" };
  show();
}

function show() {
  part("overlay").value = look.overlay;
  part("opacity").value = String(look.opacity);
  part("outlines").checked = look.outlines;
  part("ids").checked = look.ids;
  part("layer-place").value = look.layer_place;
  for (const id of ["opacity", "outlines", "ids"]) part(id).disabled = !look.overlay;
  part("layered").hidden = look.overlay !== "layered";
}
