#!/usr/bin/env bash
# Installs what the tests of live streams need from the system: GStreamer's RTSP server and its Python bindings,
# and the MQTT broker Mosquitto.
# Does nothing where it is installed, and only says so where it may not install; those tests skip then.
set -uo pipefail
needed='import gi; [gi.require_version(n, "1.0") for n in ("Gst", "GstApp", "GstRtsp", "GstRtspServer")]'
/usr/bin/python3 -c "$needed" 2>/dev/null && command -v mosquitto >/dev/null && exit 0

packages=(
    python3-gi gir1.2-gst-rtsp-server-1.0 gir1.2-gst-plugins-base-1.0
    gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-plugins-ugly
    mosquitto
)
as_root=()
if [[ $(id -u) != 0 ]]; then
    as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || { [[ $(id -u) != 0 ]] && ! sudo -n true 2>/dev/null; }; then
    echo "tests of live streams will be skipped: install ${packages[*]}" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1; then
    echo "tests of live streams will be skipped: apt-get could not install ${packages[*]}" >&2
fi
