"""An RTSP server on GStreamer that loops H.264 clips as a camera would. A script for the system's python3.

    /usr/bin/python3 rtsp_server.py --port 8554 /live=clip.mp4 /other=clip2.mp4

GStreamer's Python bindings belong to the system's interpreter, so tests run this as a child process (see
`rtsp_camera.py`) and exchange lines with it: it prints `ready PORT`, and reads from standard input

    clip N      continue with the N-th clip of the path (`/live=a.mp4,b.mp4`), in the same connection
    jump S      add S seconds to all timestamps from now on
    pause       send nothing more, but keep the connections;   resume
    rate F      play F times as fast, timestamps included

Timestamps keep increasing when a clip starts over. Each client starts at the clip's first picture.
"""

# Run by an interpreter that has neither this project nor its packages: only the standard library and gi.
from __future__ import annotations

import argparse
import sys
import threading
import time
import warnings
from typing import Any

warnings.simplefilter("ignore")
import gi  # type: ignore[import-not-found,unused-ignore]  # noqa: E402

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstApp, GstRtsp, GstRtspServer  # type: ignore[import-not-found,unused-ignore]  # noqa: E402, F401

LAUNCH = (  # parameter sets once per keyframe, from the parser: the payloader puts them before every slice
    "( appsrc name=source is-live=true format=time block=false max-bytes=0 stream-type=stream "
    "caps=video/x-h264,stream-format=byte-stream,alignment=au "
    "! h264parse config-interval=-1 ! rtph264pay name=pay0 pt=96 config-interval={repeat} )"
)


class Controls:
    """Values set by lines on standard input; read by every feeder."""

    clip = 0
    jump = 0.0
    rate = 1.0
    paused = False


class Feeder(threading.Thread):
    """Pushes one client's access units into its pipeline, paced by the clock."""

    def __init__(self, source: Any, clips: list[list[tuple[bytes, int, int, bool]]]) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._clips = clips
        self.running = True

    def stop(self) -> None:
        self.running = False

    def run(self) -> None:
        shown = Controls.clip
        at = 0
        reached = 0  # nanoseconds of timestamps
        due = time.monotonic()
        while self.running:
            if Controls.paused:
                time.sleep(0.02)
                due = time.monotonic()
                continue
            if Controls.clip != shown:
                shown, at = Controls.clip, 0
            clip = self._clips[shown % len(self._clips)]
            data, pts, duration, key = clip[at]
            buffer = Gst.Buffer.new_wrapped(data)
            step = round(duration / Controls.rate)
            ahead = round((pts - at * duration) / Controls.rate)  # decoded before it is shown
            buffer.pts = reached + ahead + round(Controls.jump * Gst.SECOND)
            buffer.duration = step
            if not key:
                buffer.set_flags(Gst.BufferFlags.DELTA_UNIT)
            if self._source.emit("push-buffer", buffer) != Gst.FlowReturn.OK:
                return
            at = (at + 1) % len(clip)
            reached += step
            due += step / Gst.SECOND
            time.sleep(max(0.0, due - time.monotonic()))


class Factory(GstRtspServer.RTSPMediaFactory):  # type: ignore[misc,unused-ignore]
    """A path that serves clips."""

    def __init__(
        self, clips: list[list[tuple[bytes, int, int, bool]]], repeat: bool, transport: str | None
    ) -> None:
        super().__init__()
        self._transport = transport
        self._clips = clips
        self.set_launch(LAUNCH.format(repeat=-1 if repeat else 0))
        self.set_shared(False)

    def do_configure(self, media: Any) -> None:
        if self._transport:
            kinds = GstRtsp.RTSPLowerTrans
            media.set_protocols(kinds.UDP if self._transport == "udp" else kinds.TCP)
        source = media.get_element().get_child_by_name("source")
        # Before it plays: the pipeline must have seen a picture to describe the stream.
        feeder = Feeder(source, self._clips)
        feeder.start()
        media.connect("unprepared", lambda _media: feeder.stop())


def read_clip(path: str) -> list[tuple[bytes, int, int, bool]]:
    """Read a clip's access units in decode order.

    Bytes, pts from 0 and duration in ns, whether a keyframe.
    """
    pipeline = Gst.parse_launch(
        f'filesrc location="{path}" ! qtdemux ! h264parse config-interval=-1 '
        "! video/x-h264,stream-format=byte-stream,alignment=au ! appsink name=sink sync=false"
    )
    sink = pipeline.get_child_by_name("sink")
    pipeline.set_state(Gst.State.PLAYING)
    units = []
    while (sample := sink.emit("pull-sample")) is not None:
        buffer = sample.get_buffer()
        key = not buffer.has_flags(Gst.BufferFlags.DELTA_UNIT)
        units.append((buffer.extract_dup(0, buffer.get_size()), buffer.pts, key))
    pipeline.set_state(Gst.State.NULL)
    if not units:
        raise SystemExit(f"{path}: no H.264 stream")
    times = sorted(pts for _, pts, _ in units)
    step = (times[-1] - times[0]) // max(1, len(times) - 1) or Gst.SECOND // 25
    return [(data, pts - times[0], step, key) for data, pts, key in units]


def listen_to_lines(loop: Any) -> None:
    for line in sys.stdin:
        name, _, value = line.strip().partition(" ")
        if name == "clip":
            Controls.clip = int(value)
        elif name == "jump":
            Controls.jump += float(value)
        elif name == "rate":
            Controls.rate = float(value)
        elif name in ("pause", "resume"):
            Controls.paused = name == "pause"
    loop.quit()  # whoever started this is gone


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--user", help="name:password, asked for by digest")
    parser.add_argument(
        "--repeat", action="store_true", help="parameter sets before every slice of keyframes"
    )
    parser.add_argument("--transport", choices=["tcp", "udp"], help="offer only this one")
    parser.add_argument("mounts", nargs="+", help="/path=clip.mp4[,clip.mp4...]")
    options = parser.parse_args()
    Gst.init(None)
    loop = GLib.MainLoop()
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(str(options.port))
    mounts = server.get_mount_points()
    factories = []
    for mount in options.mounts:
        path, _, clips = mount.partition("=")
        factory = Factory([read_clip(clip) for clip in clips.split(",")], options.repeat, options.transport)
        mounts.add_factory(path, factory)
        factories.append(factory)
    if options.user:
        protect(server, factories, *options.user.split(":", 1))
    if not server.attach(None):
        raise SystemExit(f"port {options.port} is taken")
    threading.Thread(target=listen_to_lines, args=(loop,), daemon=True).start()
    print(f"ready {server.get_bound_port()}", flush=True)  # noqa: T201
    loop.run()


def protect(server: Any, factories: list[Any], user: str, password: str) -> None:
    """Require the password."""
    auth = GstRtspServer.RTSPAuth()
    auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "user")
    auth.add_digest(user, password, token)
    server.set_auth(auth)
    for factory in factories:
        role = Gst.Structure.new_empty("user")
        role.set_value("media.factory.access", True)
        role.set_value("media.factory.construct", True)
        factory.add_role_from_structure(role)


if __name__ == "__main__":
    main()
