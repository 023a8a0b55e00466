// How masks are shown. The server draws them, as `xmem render` does; the choice is kept in this browser.

import { upload } from "./server.js";

const KEPT = "xmem-annotate-look";
const OWN = { davis: 0.5, fade: 0.5, light: 0.1, popup: 1, layered: 1 };  // opacity that an overlay begins with
const MARKED = ["davis", "fade", "light"];
const part = (id) => document.getElementById(id);

let look = { overlay: "davis", opacity: 0.5, outlines: true, ids: true, layer: null, layer_place: "behind" };
try {
  look = { ...look, ...JSON.parse(localStorage.getItem(KEPT) ?? "{}"), layer: null };
} catch { /* whoever forbids storage gets the defaults */ }
if (look.overlay === "layered") look.overlay = "davis";  // its layer is not kept

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

export function flip(id) { if (!part(id).disabled) part(id).click(); }

// changed: called when masks are to be shown otherwise. failed: called with an error.
export function beginLooks(changed, failed) {
  const set = (values) => {
    look = { ...look, ...values };
    try {
      localStorage.setItem(KEPT, JSON.stringify(look));
    } catch { /* it is only not kept */ }
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
