// The timeline: for each object where it is prompted, removed, seen, doubtful and out of sight; the playhead; scrubbing.

const ROW = 16, TOP = 6, LEFT = 26, RIGHT = 8;

export function drawTimeline(canvas, state, timeline, frame, selected) {
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
  const ink = style.getPropertyValue("--ink");
  const at = (index) => LEFT + index / Math.max(1, frames - 1) * (width - LEFT - RIGHT);
  const runs = new Map(timeline.objects.map((object) => [object.id, object.runs]));
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "right";
  context.textBaseline = "middle";
  state.objects.forEach((object, row) => {
    const y = TOP + row * ROW;
    const middle = y + ROW / 2;
    context.fillStyle = style.getPropertyValue("--line");
    context.fillRect(LEFT, middle - 0.5, width - LEFT - RIGHT, 1);
    context.fillStyle = ink;
    context.font = `${object.id === selected ? "bold " : ""}11px system-ui, sans-serif`;
    context.fillText(String(object.id), LEFT - 8, middle);
    for (const [first, last, kind] of runs.get(object.id) ?? []) {
      for (const [from, to, stale] of [[first, Math.min(last, timeline.tracked - 1), false], [Math.max(first, timeline.tracked), last, true]]) {
        if (from <= to) drawRun(context, object.colour, kind, at(from), at(Math.min(frames - 1, to + 1)), middle, stale);
      }
    }
    for (const index of object.prompts) {
      context.beginPath();
      context.arc(at(index), middle, object.id === selected ? 5 : 4, 0, 2 * Math.PI);
      context.fillStyle = object.colour;
      context.fill();
      context.strokeStyle = ink;
      context.lineWidth = 1.5;
      context.stroke();
    }
    context.fillStyle = ink;
    for (const index of object.removals) context.fillRect(at(index) - 1, y + 1, 2, ROW - 2);
  });
  context.fillStyle = style.getPropertyValue("--accent");
  context.fillRect(at(frame) - 1, 0, 2, height);
}

// Seen: a full bar. Doubtful: a hatched one. Out of sight: a dotted line. Of changed prompts: faint.
function drawRun(context, colour, kind, from, to, middle, stale) {
  const length = Math.max(1, to - from);
  context.save();
  context.globalAlpha = stale ? 0.3 : 1;
  context.fillStyle = context.strokeStyle = colour;
  if (kind === "seen") context.fillRect(from, middle - 4, length, 8);
  else if (kind === "out") {
    context.setLineDash([2, 3]);
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(from, middle);
    context.lineTo(from + length, middle);
    context.stroke();
  } else {
    context.beginPath();
    context.rect(from, middle - 4, length, 8);
    context.clip();
    context.lineWidth = 1.5;
    context.strokeRect(from, middle - 4, length, 8);
    for (let x = from - 8; x < from + length; x += 4) {
      context.beginPath();
      context.moveTo(x, middle + 4);
      context.lineTo(x + 8, middle - 4);
      context.stroke();
    }
  }
  context.restore();
}

// Frames to jump to, ascending. prompts: prompts and ends; low: where an object becomes doubtful; events: where
// one starts, ends, is lost from sight or seen again.
export function jumps(kind, state, timeline) {
  const found = new Set();
  if (kind === "prompts") {
    for (const object of state.objects) for (const index of [...object.prompts, ...object.removals]) found.add(index);
  } else {
    for (const { runs } of timeline.objects) {
      runs.forEach(([first, , now], i) => {
        const before = i && runs[i - 1][1] === first - 1 ? runs[i - 1][2] : null;
        if (kind === "low" ? now === "doubtful" : before === null || (before === "out") !== (now === "out")) found.add(first);
      });
    }
    if (kind === "events") for (const object of state.objects) for (const index of object.removals) found.add(index);
  }
  return [...found].sort((a, b) => a - b);
}

export function frameAt(canvas, state, event) {
  const box = canvas.getBoundingClientRect();
  const share = (event.clientX - box.left - LEFT) / Math.max(1, box.width - LEFT - RIGHT);
  return Math.round(Math.min(1, Math.max(0, share)) * (Math.max(1, state.video.frames ?? 1) - 1));
}
