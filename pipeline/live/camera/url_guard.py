"""Guard for camera URLs: allowed schemes, ports and networks, checked at the connected address.

Otherwise anybody who may add a stream could make this machine connect to whatever it can reach. Allowed are
only `rtsp` and `rtsps`, only addresses in networks that the operator names (none by default), and only ports
on which cameras serve. A URL is parsed strictly and once; anything that two parsers could read differently
is refused. A name is resolved once and all its addresses are checked; the connection is then made to a
checked address, not to the name, so a later change of the name's addresses has no effect.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.base.errors import UsageError

log = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322}
CAMERA_PORTS = frozenset({322, 554, 8322, 8554})
MAX_URL = 2048
MAX_ADDRESSES = 16

_URL = re.compile(
    r"""
    (?P<scheme>[A-Za-z][A-Za-z0-9+.-]*) ://
    (?: (?P<user>[^@:/?\#\[\]]*) (?: : (?P<password>[^@:/?\#\[\]]*) )? @ )?
    (?P<host> \[[^\[\]@/?\#]*\] | [^@:/?\#\[\]]* )
    (?: : (?P<port>[^@:/?\#\[\]]*) )?
    (?P<rest> (?: /[^?\#@]* )? (?: \?[^\#@]* )? )
    """,
    re.VERBOSE,
)
_ALLOWED = re.compile(r"[A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%#|-]*")
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PERCENT_CONTROL = re.compile(r"%(?:[01][0-9A-Fa-f]|7[Ff])")
_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?!$)|$)){4}", re.ASCII)
_NUMBER = re.compile(r"\d+|0[xX][0-9A-Fa-f]*", re.ASCII)
_PORT = re.compile(r"[1-9]\d{0,4}", re.ASCII)

_NEVER = tuple(
    ipaddress.ip_network(n) for n in ("0.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32", "::/128", "ff00::/8")
)
_ONLY_IF_NAMED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "127.0.0.0/8",  # this machine
        "::1/128",
        "169.254.0.0/16",  # link-local; cloud metadata services with credentials
        "fe80::/10",
        "fec0::/10",
        "100.100.100.200/32",  # metadata services outside link-local
        "168.63.129.16/32",
        "192.0.0.192/32",
        "fd00:ec2::254/128",
        "fd20:ce::254/128",
        "240.0.0.0/4",  # reserved
        "192.0.0.0/24",
    )
)
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_COMPATIBLE = ipaddress.IPv6Network("::/96")


class UrlRefusedError(UsageError):
    """The URL of a camera is malformed, or its address is not allowed."""


Resolver = Callable[[str, int], Iterable[str]]
"""Returns the addresses of a host name as text; raises OSError if it has none."""


@dataclass(frozen=True, slots=True)
class CheckedUrl:
    """An accepted URL, in parts, with the addresses at which it may be reached.

    Args:
        addresses: the only addresses to connect to.
        userinfo: `user:password` as written, "" if absent; hidden in the repr.
        rest: path and query; may hold secrets, so it is hidden in the repr, too.
    """

    scheme: str
    host: str
    port: int
    addresses: tuple[Address, ...]
    userinfo: str = field(default="", repr=False)
    rest: str = field(default="", repr=False)

    @property
    def encrypted(self) -> bool:
        return self.scheme == "rtsps"


def system_resolver(host: str, port: int) -> list[str]:
    """The operating system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(entry[4][0]) for entry in found]


class UrlGuard:
    """Checks the URLs of cameras.

    Args:
        networks: allowed networks, as CIDR ("10.20.0.0/16") or single addresses. None by default, so nothing
            is allowed. Loopback, link-local and the clouds' metadata addresses are allowed only by a network
            that lies wholly within them: "0.0.0.0/0" does not include them.
        ports: allowed ports.
        resolver: turns names into addresses.

    Raises ValueError for an invalid network or port.
    """

    def __init__(
        self,
        networks: Iterable[str] = (),
        *,
        ports: Iterable[int] = CAMERA_PORTS,
        resolver: Resolver = system_resolver,
    ) -> None:
        self.networks = tuple(_network(text) for text in networks)
        self.ports = frozenset(ports)
        self._resolver = resolver
        for port in self.ports:
            if not 0 < port < 65536:
                raise ValueError(f"port {port}: must be between 1 and 65535")

    def check(self, url: str) -> CheckedUrl:
        """Parse a URL, resolve its host and check every address. Raises UrlRefusedError with the reason.

        The system's resolver may take seconds. Call this for every connection, since addresses change.
        """
        parsed = self.parse(url)
        literal = _literal(parsed.host)
        addresses = self._resolve(parsed.host, parsed.port) if literal is None else [literal]
        for address in addresses:
            self._check_address(parsed.host, address)
        unique = tuple(dict.fromkeys(unwrapped(a) if _mapped(a) else a for a in addresses))
        return CheckedUrl(
            parsed.scheme, parsed.host, parsed.port, unique, userinfo=parsed.userinfo, rest=parsed.rest
        )

    def parse(self, url: str) -> CheckedUrl:
        """Parse a URL without resolving its host; `addresses` is empty."""
        if len(url) > MAX_URL:
            raise UrlRefusedError(f"the URL has {len(url)} characters: at most {MAX_URL} are allowed")
        if not url.isascii():
            raise UrlRefusedError(
                "the URL has characters beyond ASCII: write a host name in its xn-- form, "
                "and the rest percent-encoded"
            )
        if not _ALLOWED.fullmatch(url) or _PERCENT.search(url) or _PERCENT_CONTROL.search(url):
            raise UrlRefusedError(
                "the URL has spaces, control characters, quotes, backslashes or a lone %: "
                "write them percent-encoded (control characters are not allowed at all)"
            )
        match = _URL.fullmatch(url)
        if match is None:
            raise UrlRefusedError(
                "the URL is not of the form rtsp://[user[:password]@]host[:port][/path][?query]: "
                "write @ : / ? # percent-encoded where they belong to a name or password, and no fragment (#)"
            )
        scheme = match["scheme"].lower()
        if scheme not in DEFAULT_PORTS:
            raise UrlRefusedError(f"scheme {scheme[:20]!r} is not allowed: use rtsp or rtsps")
        port = self._port(match["port"], scheme)
        userinfo = match["user"] or ""
        if match["password"] is not None:
            userinfo += ":" + match["password"]
        host = _host(match["host"])
        return CheckedUrl(scheme, host, port, (), userinfo=userinfo, rest=match["rest"])

    def allows(self, address: Address) -> bool:
        """Return whether streams may come from an address.

        An address that embeds another is checked as both.
        """
        inner = unwrapped(address)
        return self._allows(inner) and (inner == address or _mapped(address) or self._allows(address))

    def _allows(self, address: Address) -> bool:
        if any(address in network for network in _NEVER):
            return False
        special = [network for network in _ONLY_IF_NAMED if address in network]
        for network in self.networks:
            if address in network and all(_within(network, narrow) for narrow in special):
                return True
        return False

    def _check_address(self, host: str, address: Address) -> None:
        if not self.allows(address):
            # What names mean in this network is not revealed to the caller.
            log.info("refused: %s is %s", host, address)
            named = ", ".join(map(str, self.networks)) or "none"
            raise UrlRefusedError(
                f"{host} is not in a network that streams may come from: allowed are {named}; "
                "the operator names them when the service is started"
            )

    def _port(self, text: str | None, scheme: str) -> int:
        if text is None:
            return DEFAULT_PORTS[scheme]
        if not _PORT.fullmatch(text) or int(text) not in self.ports:
            allowed = ", ".join(map(str, sorted(self.ports)))
            raise UrlRefusedError(f"port {text!r} is not allowed: allowed are {allowed}")
        return int(text)

    def _resolve(self, host: str, port: int) -> list[Address]:
        try:
            found = list(dict.fromkeys(self._resolver(host, port)))
        except (OSError, UnicodeError) as error:
            raise UrlRefusedError(f"{host} cannot be resolved: check the name, or give an address") from error
        if not found or len(found) > MAX_ADDRESSES:
            raise UrlRefusedError(f"{host} has {len(found)} addresses: 1 to {MAX_ADDRESSES} are allowed")
        try:
            return [ipaddress.ip_address(text) for text in found]
        except ValueError as error:
            raise UrlRefusedError(f"{host} resolves to something that is not an address") from error


def unwrapped(address: Address) -> Address:
    """Return the IPv4 address inside an IPv6 one (mapped, compatible, NAT64, 6to4, Teredo), or itself."""
    if not isinstance(address, ipaddress.IPv6Address):
        return address
    if address.scope_id:
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    low = int(address) & 0xFFFFFFFF
    if any(address in network for network in _NAT64) or (address in _COMPATIBLE and low > 1):
        return ipaddress.IPv4Address(low)
    return address


def _mapped(address: Address) -> bool:
    return isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None


def _host(text: str) -> str:
    """Return the host in canonical form, in lower case; UrlRefusedError if it is ambiguous."""
    if text.startswith("["):
        inner = text[1:-1]
        if "%" in inner:
            raise UrlRefusedError(f"host {text!r}: addresses with a zone are not allowed")
        try:
            return str(ipaddress.IPv6Address(inner))
        except ValueError as error:
            raise UrlRefusedError(f"host {text!r} is not an IPv6 address") from error
    name = text.lower()
    if _IPV4.fullmatch(name):
        return name
    labels = name.removesuffix(".").split(".")
    if _NUMBER.fullmatch(labels[-1]):
        raise UrlRefusedError(
            f"host {text!r} is not a plain IPv4 address: write four decimal numbers without leading zeros"
        )
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise UrlRefusedError(f"host {text!r} is not a host name: use letters, digits, - and _ between dots")
    return name


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(
            f"network {text!r}: must be an address or a CIDR without host bits, such as 10.20.0.0/16"
        ) from error
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError(f"network {text!r}: write the IPv4 network that it embeds")
    return network


def _within(network: Network, outer: Network) -> bool:
    if isinstance(network, ipaddress.IPv4Network) and isinstance(outer, ipaddress.IPv4Network):
        return network.subnet_of(outer)
    if isinstance(network, ipaddress.IPv6Network) and isinstance(outer, ipaddress.IPv6Network):
        return network.subnet_of(outer)
    return False
