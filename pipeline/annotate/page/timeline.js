// The timeline: for each object where it is prompted, removed and tracked; the playhead; scrubbing.

const ROW = 14, TOP = 6;

export function drawTimeline(canvas, state, frame, selected) {
  const frames = Math.max(1, state.video.frames ?? 1);
  const width = canvas.parentElement.clientWidth;
  const height = TOP * 2 + ROW * Math.max(1, state.objects.length);
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const at = (index) => (frames > 1 ? index / (frames - 1) : 0) * (width - 8) + 4;
  context.fillStyle = style.getPropertyValue("--line");
  context.fillRect(4, TOP, width - 8, height - 2 * TOP);
  state.objects.forEach((object, row) => {
    const y = TOP + row * ROW;
    const first = Math.min(...object.prompts);
    if (object.prompts.length) {
      const gone = object.removals.find((index) => index > first) ?? Infinity;
      const until = (limit) => Math.min(limit, gone);
      context.fillStyle = object.colour;
      context.globalAlpha = 0.25;  // of prompts that have changed since
      if (state.available > first) context.fillRect(at(first), y + 3, at(until(state.available)) - at(first), ROW - 6);
      context.globalAlpha = 0.9;
      if (state.tracked > first) context.fillRect(at(first), y + 3, at(until(state.tracked)) - at(first), ROW - 6);
      context.globalAlpha = 1;
    }
    for (const index of object.prompts) {
      context.beginPath();
      context.arc(at(index), y + ROW / 2, object.id === selected ? 5 : 4, 0, 2 * Math.PI);
      context.fillStyle = object.colour;
      context.fill();
      context.strokeStyle = style.getPropertyValue("--ink");
      context.lineWidth = 1.5;
      context.stroke();
    }
    for (const index of object.removals) {
      context.fillStyle = style.getPropertyValue("--ink");
      context.fillRect(at(index) - 1, y + 1, 2, ROW - 2);
    }
  });
  context.fillStyle = style.getPropertyValue("--accent");
  context.fillRect(at(frame) - 1, 0, 2, height);
}

export function frameAt(canvas, state, event) {
  const box = canvas.getBoundingClientRect();
  const share = (event.clientX - box.left - 4) / Math.max(1, box.width - 8);
  return Math.round(Math.min(1, Math.max(0, share)) * (Math.max(1, state.video.frames ?? 1) - 1));
}
