// Clicks and scribbles: lines drawn over an object, or over what does not belong to it.

const MOST_POINTS = 500;
const INK = { true: "#1faa4a", false: "#d0312d" };

// Lengthen a line by a point, unless it is within a pixel of the last one.
export function longer(points, point) {
  const last = points[points.length - 1];
  if (Math.hypot(point[0] - last[0], point[1] - last[1]) >= 1) points.push(point);
}

// A line of at most MOST_POINTS points, with both ends.
export function shortened(points) {
  const step = Math.max(1, (points.length - 1) / (MOST_POINTS - 1));
  const kept = [];
  for (let at = 0; at < points.length - 1; at += step) kept.push(points[Math.floor(at)]);
  kept.push(points[points.length - 1]);
  return kept.map((point) => point.map((value) => Math.round(value * 10) / 10));
}

// pixel: size of a pixel of the screen in pixels of the video
export function drawPoints(context, pixel, clicks, strokes) {
  context.save();
  context.lineCap = context.lineJoin = "round";
  for (const { points, positive } of strokes) {
    context.beginPath();
    points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
    if (points.length === 1) context.lineTo(...points[0]);
    for (const [ink, width] of [["#fff", 6], [INK[positive], 4]]) {
      context.strokeStyle = ink;
      context.lineWidth = width * pixel;
      context.stroke();
    }
  }
  for (const { x, y, positive } of clicks) {
    context.beginPath();
    context.arc(x + 0.5, y + 0.5, 5 * pixel, 0, 2 * Math.PI);
    context.fillStyle = INK[positive];
    context.fill();
    context.strokeStyle = "#fff";
    context.lineWidth = 1.5 * pixel;
    context.stroke();
  }
  context.restore();
}

// A ring around the pixel that was asked about.
export function drawAsked(context, pixel, { x, y }) {
  for (const [ink, width] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = ink;
    context.lineWidth = width * pixel;
    context.beginPath();
    context.arc(x + 0.5, y + 0.5, 7 * pixel, 0, 2 * Math.PI);
    context.stroke();
  }
}
