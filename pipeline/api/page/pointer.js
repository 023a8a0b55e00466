// The cross that keys move over a picture.

// pixel: size of a pixel of the screen in pixels of the video
export function drawPointer(context, pixel, [x, y]) {
  for (const [ink, width] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = ink;
    context.lineWidth = width * pixel;
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 4 * dx * pixel, y + 4 * dy * pixel);
      context.lineTo(x + 14 * dx * pixel, y + 14 * dy * pixel);
    }
    context.stroke();
  }
}
