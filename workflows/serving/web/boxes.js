const SAME_OBJECT = 0.5;

/** The best name of each object: detections, best first, without those that overlap a better one. */
export function distinct(detections) {
  const kept = [];
  for (const entry of detections) {
    if (kept.every((better) => overlap(better.box, entry.box) <= SAME_OBJECT)) kept.push(entry);
  }
  return kept;
}

/** Intersection over union of two boxes [x0, y0, x1, y1]. */
function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]), height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  const shared = Math.max(0, width) * Math.max(0, height);
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return shared / (area(a) + area(b) - shared || 1);
}
