// Masks as bytes, row by row (1: inside), from and to the run lengths of COCO, which go down the columns.

export function decode(text, height, width) {
  const mask = new Uint8Array(height * width);
  const runs = [];
  for (let at = 0; at < text.length;) {
    let value = 0, shift = 0, code;
    do {
      code = text.charCodeAt(at++) - 48;
      value += (code & 31) * 2 ** shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value -= 2 ** shift;
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  let position = 0;
  runs.forEach((length, index) => {
    if (index % 2) {
      for (let i = position; i < position + length; i++) mask[(i % height) * width + Math.floor(i / height)] = 1;
    }
    position += length;
  });
  return mask;
}

export function counts(mask, height, width) {
  const runs = [];
  let value = 0, length = 0;
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      if (mask[y * width + x] !== value) {
        runs.push(length);
        value = 1 - value;
        length = 0;
      }
      length++;
    }
  }
  runs.push(length);
  return runs;
}

// The box around a mask: [left, top, width, height]; null without a pixel.
export function bounds(mask, height, width) {
  let [left, right, top, bottom] = [width, -1, height, -1];
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!mask[i]) continue;
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = y;
    }
  }
  return right < 0 ? null : [left, top, right - left + 1, bottom - top + 1];
}

export function disc(mask, height, width, x, y, radius, value) {
  const reach = Math.ceil(radius);
  for (let row = Math.max(0, Math.floor(y) - reach); row <= Math.min(height - 1, Math.floor(y) + reach); row++) {
    for (let column = Math.max(0, Math.floor(x) - reach); column <= Math.min(width - 1, Math.floor(x) + reach); column++) {
      if ((column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2 <= radius * radius) mask[row * width + column] = value;
    }
  }
}

export function line(mask, height, width, from, to, radius, value) {
  const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / Math.max(1, radius / 2)));
  for (let i = 0; i <= steps; i++) {
    const share = i / steps;
    disc(mask, height, width, from[0] + share * (to[0] - from[0]), from[1] + share * (to[1] - from[1]), radius, value);
  }
}

// The pixel of a mask that is farthest from its border and from other pixels, which need not be in it: [x, y].
export function deepest(mask, height, width, away) {
  const wide = width + 2;  // with a border that belongs to no mask
  const depth = new Int32Array(wide * (height + 2));
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) depth[(y + 1) * wide + x + 1] = mask[y * width + x] ? 1 << 28 : 0;
  for (const [x, y] of away) depth[(Math.floor(y) + 1) * wide + Math.floor(x) + 1] = 0;
  // Distances in thirds of a pixel: 3 to the sides, 4 across a corner; from above, then from below.
  let [best, most] = [0, 0];
  for (const way of [1, -1]) {
    for (let n = wide; n < depth.length - wide; n++) {
      const i = way > 0 ? n : depth.length - 1 - n;
      if (depth[i]) depth[i] = Math.min(depth[i], 3 + depth[i - way], 4 + depth[i - way * (wide + 1)], 3 + depth[i - way * wide], 4 + depth[i - way * (wide - 1)]);
      if (way < 0 && depth[i] > most) [best, most] = [i, depth[i]];
    }
  }
  return [best % wide - 1, Math.floor(best / wide) - 1];
}

export function rgb(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

// Tint of a mask with its outline, as an image of the video's size.
export function paint(image, mask, height, width, colour, opacity, faint) {
  const ink = (alpha) => new Uint32Array(new Uint8Array([...rgb(colour), alpha]).buffer)[0];
  const [inside, outline] = [ink(Math.round(255 * opacity * (faint ? 0.4 : 1))), ink(faint ? 120 : 255)];
  const pixels = new Uint32Array(image.data.buffer);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!mask[i]) continue;
      const edge = x === 0 || y === 0 || x === width - 1 || y === height - 1
        || !mask[i - 1] || !mask[i + 1] || !mask[i - width] || !mask[i + width];
      pixels[i] = edge ? outline : inside;
    }
  }
}
