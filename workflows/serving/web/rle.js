// Masks in COCO's compressed run-length encoding: runs down the columns, as differences in 5-bit groups.

/** {size: [height, width], counts} -> Uint8Array of height * width, row by row, 1 inside. */
export function decodeMask({ size: [height, width], counts }) {
  const mask = new Uint8Array(height * width);
  const runs = [];
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, more = true;
    while (more) {
      const group = counts.charCodeAt(at++) - 48;
      value |= (group & 31) << shift;
      more = (group & 32) !== 0;
      shift += 5;
      if (!more && (group & 16)) value |= -1 << shift;
    }
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  let place = 0, inside = 0;
  for (const run of runs) {
    if (inside) {
      for (let i = place; i < place + run; i++) mask[(i % height) * width + Math.floor(i / height)] = 1;
    }
    place += run;
    inside = 1 - inside;
  }
  return mask;
}
