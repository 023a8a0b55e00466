"""RTSP messages: parsed strictly and re-serialised so that FFmpeg reads the same.

FFmpeg's parser is lenient: it skips every carriage return, accepts numbers followed by anything, and lets
media frames begin in the middle of a header. So bytes that two parsers could read differently are refused
instead of being passed on. Media ("$" frames) passes unchanged.
"""

from __future__ import annotations

import ipaddress
import re

MAX_LINE = 1000
MAX_HEADERS = 64
MAX_BODY = 1 << 18
_SMALLEST_MEDIA = 8

_STATUS = re.compile(rb"RTSP/[12]\.\d (\d{3})(?: [\x20-\x7e\x80-\xff]*)?")
_REQUEST = re.compile(rb"([A-Z_]{1,24}) (\S+) RTSP/[12]\.\d")
_HEADER = re.compile(rb"([A-Za-z0-9!#%&'*+.^_`|~-]+)[ \t]*:[ \t]*([\x20-\x7e\t\x80-\xff]*)")
_LENGTH = re.compile(rb"\d{1,7}")
_PLACES = ("source", "destination")


class Refusal(Exception):  # noqa: N818 - a signal from this module to the relay
    """These bytes must not reach the other side.

    The message gives the reason in one line, without their content.
    """


class Messages:
    """Splits a byte stream into RTSP messages and media frames.

    `feed` takes received bytes and returns those that may be passed on; Refusal means that the connection
    must be closed.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._through = 0  # remaining bytes of a media frame or a body that passes unchanged

    def feed(self, data: bytes) -> bytes:
        """Take received bytes and return the bytes that may be passed on."""
        held = self._held
        held += data
        out = bytearray()
        while held:
            if self._through:
                part = min(self._through, len(held))
                out += held[:part]
                del held[:part]
                self._through -= part
            elif held[0] == 0x24:
                if len(held) < 4:
                    break
                length = int.from_bytes(held[2:4], "big")
                if length >= _SMALLEST_MEDIA:
                    self._through = 4 + length
                elif len(held) >= 4 + length:  # FFmpeg would read its content as a message
                    del held[: 4 + length]
                else:
                    break
            else:
                lines = self._lines()
                if lines is None:
                    break
                if lines:
                    out += self._message(lines)
        return bytes(out)

    def _lines(self) -> list[bytes] | None:
        """Return the lines of the first message without line ends and without the empty line.

        None if incomplete.
        """
        lines: list[bytes] = []
        start = 0
        while True:
            end = self._held.find(b"\n", start)
            if (end if end >= 0 else len(self._held)) - start > MAX_LINE or len(lines) > MAX_HEADERS:
                raise Refusal("a message has too many lines, or a line that is too long")
            if end < 0:
                return None
            line = bytes(self._held[start:end]).removesuffix(b"\r")
            start = end + 1
            if b"\r" in line or b"\0" in line:
                raise Refusal("a message has stray control characters")
            if not line:
                del self._held[:start]
                return lines
            if line.startswith(b"$"):
                raise Refusal("a media frame begins inside a message")
            lines.append(line)

    def _message(self, lines: list[bytes]) -> bytes:
        headers: list[tuple[bytes, bytes]] = []
        length: int | None = None
        for line in lines[1:]:
            match = _HEADER.fullmatch(line)
            if match is None:
                continue  # what is not a header is not passed on, so no parser can take it for one
            name, value = match[1], match[2].strip()
            if name.lower() == b"content-length":
                if length is not None or not _LENGTH.fullmatch(value) or int(value) > MAX_BODY:
                    raise Refusal(
                        f"a message's body must be announced once and be at most {MAX_BODY} bytes long"
                    )
                length = int(value)
            headers.append((name, value))
        first, headers = self.examined(lines[0], headers)
        self._through = length or 0
        written = [first, *(name + b": " + value for name, value in headers)]
        return b"\r\n".join(written) + b"\r\n\r\n"

    def examined(
        self, first: bytes, headers: list[tuple[bytes, bytes]]
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Return the first line and the headers as they are passed on. Raises Refusal."""
        raise NotImplementedError


class Replies(Messages):
    """Messages from the camera.

    Args:
        camera: the address that the relay is connected to.
        own: the address of the relay's own end.

    Attributes:
        direct: whether the camera has agreed to send media over UDP, past the relay.
    """

    def __init__(self, *, camera: str, own: str) -> None:
        super().__init__()
        self._camera = ipaddress.ip_address(camera.partition("%")[0])
        self._own = ipaddress.ip_address(own.partition("%")[0])
        self.direct = False

    def examined(
        self, first: bytes, headers: list[tuple[bytes, bytes]]
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        status = _STATUS.fullmatch(first)
        request = _REQUEST.fullmatch(first)
        if status is None and request is None:
            raise Refusal("the camera does not speak RTSP")
        if (status is not None and status[1].startswith(b"3")) or (request and request[1] == b"REDIRECT"):
            raise Refusal("the camera redirects to another address: use that address, if it is allowed")
        passed = []
        for name, value in headers:
            if name.lower() == b"location":
                raise Refusal("the camera redirects to another address: use that address, if it is allowed")
            if name.lower() == b"transport":
                value = self._transport(value)
            passed.append((name, value))
        return first, passed

    def _transport(self, value: bytes) -> bytes:
        """Return the media transport, which must lead from this camera to this machine."""
        if b"," in value:
            raise Refusal("the camera answers with several transports at once")
        parts = [part.strip() for part in value.split(b";")]
        if any(part.lower() == b"multicast" for part in parts):
            raise Refusal("the camera sends to a multicast group: configure it for unicast")
        direct = b"/tcp" not in parts[0].lower()
        kept = []
        for part in parts:
            name, _, text = part.partition(b"=")
            if name.strip().lower().decode("latin-1") not in _PLACES:
                kept.append(part)
            elif direct and not self._is_ours(name.strip().lower(), text.strip()):
                place = name.strip().lower().decode("latin-1")
                raise Refusal(f"the camera names another address as its media's {place}")
        if direct:
            self.direct = True
            # FFmpeg would take the relay for the camera, and send its reports there.
            kept.append(b"source=" + str(self._camera).encode())
        return b";".join(kept)

    def _is_ours(self, name: bytes, text: bytes) -> bool:
        try:
            address = ipaddress.ip_address(text.decode("ascii", "replace").strip('"'))
        except ValueError:
            return False
        return address == (self._camera if name == b"source" else self._own)


class Requests(Messages):
    """Messages from FFmpeg.

    Args:
        token: the User-Agent that FFmpeg was told to send. A client without it is another process on this
            machine, which must not reach the camera.
    """

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token.encode()

    def examined(
        self, first: bytes, headers: list[tuple[bytes, bytes]]
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        if _STATUS.fullmatch(first):  # a reply to a request of the camera
            return first, headers
        if not _REQUEST.fullmatch(first):
            raise Refusal("the client does not speak RTSP")
        passed = []
        known = False
        for name, value in headers:
            if name.lower() == b"user-agent":
                known = value == self._token
                value = b"xmem"
            passed.append((name, value))
        if not known:
            raise Refusal("another process on this machine connected to the relay")
        return first, passed
