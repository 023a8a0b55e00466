"""Allowed camera URLs: a corpus of hostile URLs, and parsing of valid ones."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.live.camera.url_guard import CheckedUrl, UrlGuard, UrlRefusedError, unwrapped

CAMERAS = "10.20.0.0/16"
NAMES: dict[str, list[str]] = {
    "camera": ["10.20.0.7"],
    "two-homed": ["10.20.0.7", "10.20.0.8"],
    "half": ["10.20.0.7", "192.168.1.1"],
    "inside.example": ["127.0.0.1"],
    "metadata.internal": ["169.254.169.254"],
    "mapped": ["::ffff:10.20.0.7"],
    "mapped-inside": ["::ffff:127.0.0.1"],
    "nothing": [],
    "many": [f"10.20.1.{i}" for i in range(17)],
    "odd": ["camera"],
    "xn--kamera-cua": ["10.20.0.9"],
    "under_score": ["10.20.0.9"],
}


def resolver(host: str, port: int) -> Iterable[str]:
    try:
        return NAMES[host.removesuffix(".")]
    except KeyError:
        raise OSError(f"no such host: {host}") from None


def guard(*networks: str, **more: object) -> UrlGuard:
    return UrlGuard(networks or (CAMERAS,), resolver=resolver, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "addresses", "port", "rest"),
    [
        ("rtsp://10.20.0.7/live", ["10.20.0.7"], 554, "/live"),
        ("RTSP://Camera/live?channel=1&subtype=0", ["10.20.0.7"], 554, "/live?channel=1&subtype=0"),
        ("rtsps://camera:8322/", ["10.20.0.7"], 8322, "/"),
        ("rtsps://camera", ["10.20.0.7"], 322, ""),
        ("rtsp://two-homed:8554/a//b", ["10.20.0.7", "10.20.0.8"], 8554, "/a//b"),
        ("rtsp://camera./x", ["10.20.0.7"], 554, "/x"),
        ("rtsp://[::ffff:10.20.0.7]/x", ["10.20.0.7"], 554, "/x"),
        ("rtsp://mapped/x", ["10.20.0.7"], 554, "/x"),
        ("rtsp://xn--kamera-cua/x", ["10.20.0.9"], 554, "/x"),
        ("rtsp://under_score/user=a_password=b_channel=1.sdp", ["10.20.0.9"], 554, None),
    ],
)
def test_cameras_in_the_named_networks(url: str, addresses: list[str], port: int, rest: str | None) -> None:
    checked = guard().check(url)
    assert [str(a) for a in checked.addresses] == addresses
    assert checked.port == port
    assert checked.encrypted == url.lower().startswith("rtsps")
    if rest is not None:
        assert checked.rest == rest


def test_user_and_password_are_kept_and_shown_to_nobody() -> None:
    checked = guard().check("rtsp://admin:p%40ss%2Fword@camera/live?token=t0ken")
    assert checked.userinfo == "admin:p%40ss%2Fword"
    assert checked.rest == "/live?token=t0ken"
    assert "ss" not in repr(checked).replace("addresses", "").replace("Address", "")
    assert "t0ken" not in repr(checked)


HOSTILE = [
    # schemes that FFmpeg would open
    "http://10.20.0.7/",
    "file:///etc/passwd",
    "concat:/etc/passwd|/etc/shadow",
    "rtmp://10.20.0.7/live",
    "rtspt://10.20.0.7/",
    "rtsp+tcp://10.20.0.7/",
    "tls://10.20.0.7:554",
    "rtsp:10.20.0.7",
    "rtsp:/10.20.0.7/",
    "rtsp:///live",
    "//10.20.0.7/live",
    "10.20.0.7",
    "",
    "rtsp://",
    " rtsp://10.20.0.7/",
    "rtsp ://10.20.0.7/",
    "data:,rtsp://10.20.0.7/",
    "ffrtmphttp://10.20.0.7/",
    "async:rtsp://10.20.0.7/",
    # addresses outside, in every spelling
    "rtsp://127.0.0.1/",
    "rtsp://localhost/",
    "rtsp://192.168.1.1/",
    "rtsp://8.8.8.8/",
    "rtsp://0.0.0.0/",
    "rtsp://0/",
    "rtsp://127.1/",
    "rtsp://2130706433/",
    "rtsp://0x7f000001/",
    "rtsp://0x7f.0.0.1/",
    "rtsp://0177.0.0.1/",
    "rtsp://017700000001/",
    "rtsp://127.0.0.1./",
    "rtsp://10.20.0.07/",
    "rtsp://010.20.0.7/",
    "rtsp://10.20.0.7./",
    "rtsp://10.20.7/",
    "rtsp://169090567/",
    "rtsp://0xa.0x14.0.7/",
    "rtsp://10.20.0.256/",
    "rtsp://10.20.0.7.8/",
    "rtsp://10.20.0.0x7/",
    "rtsp://169.254.169.254/latest/meta-data",
    "rtsp://169.254.170.2/",
    "rtsp://100.100.100.200/",
    "rtsp://224.0.0.1/",
    "rtsp://255.255.255.255/",
    "rtsp://[::]/",
    "rtsp://[::1]/",
    "rtsp://[::127.0.0.1]/",
    "rtsp://[::ffff:127.0.0.1]/",
    "rtsp://[::ffff:7f00:1]/",
    "rtsp://[0:0:0:0:0:ffff:7f00:0001]/",
    "rtsp://[64:ff9b::7f00:1]/",
    "rtsp://[64:ff9b::10.20.0.7]/",
    "rtsp://[2002:7f00:1::]/",
    "rtsp://[2002:0a14:0007::]/",
    "rtsp://[2001:0:7f00:1::]/",
    "rtsp://[fe80::1]/",
    "rtsp://[fe80::1%25eth0]/",
    "rtsp://[fe80::1%eth0]/",
    "rtsp://[fd00:ec2::254]/",
    "rtsp://[ff02::1]/",
    "rtsp://[10.20.0.7]/",
    "rtsp://[::ffff:10.20.0.7/",
    "rtsp://::ffff:10.20.0.7]/",
    "rtsp://[::ffff:10.20.0.7]x/",
    "rtsp://[]/",
    # names that lead elsewhere
    "rtsp://inside.example/",
    "rtsp://metadata.internal/",
    "rtsp://half/",
    "rtsp://mapped-inside/",
    "rtsp://nothing/",
    "rtsp://many/",
    "rtsp://odd/",
    "rtsp://unknown/",
    "rtsp://camera../",
    "rtsp://.camera/",
    "rtsp://cam..era/",
    "rtsp://-camera/",
    "rtsp://" + "a" * 64 + "/",
    "rtsp://" + "a." * 130 + "a/",
    # who is user, who is host?
    "rtsp://10.20.0.7@127.0.0.1/",
    "rtsp://10.20.0.7:554@127.0.0.1/",
    "rtsp://user@10.20.0.7@127.0.0.1/",
    "rtsp://user:pass@127.0.0.1@10.20.0.7/",
    "rtsp://127.0.0.1#@10.20.0.7/",
    "rtsp://127.0.0.1?@10.20.0.7/",
    "rtsp://127.0.0.1/@10.20.0.7/",
    "rtsp://127.0.0.1\\@10.20.0.7/",
    "rtsp://10.20.0.7\\.example/",
    "rtsp://10.20.0.7%00.example/",
    "rtsp://10.20.0.7%2f@127.0.0.1/",
    "rtsp://%31%30.20.0.7/",
    "rtsp://10.20.0.7%09/",
    "rtsp://10.20.0.7/live#fragment",
    "rtsp://user:pa/ss@10.20.0.7/",
    "rtsp://user:pa@ss@10.20.0.7/",
    "rtsp://10.20.0.7/a@b",
    # beyond ASCII
    "rtsp://１０.20.0.7/",
    "rtsp://10。20。0。7/",
    "rtsp://ⓒamera/",
    "rtsp://camera\u200b/",
    "rtsp://kämera/",
    "rtsp://10.20.0.7/straße",
    "rtsp://10.20.0.٧/",
    # requests smuggled in
    "rtsp://10.20.0.7/\r\nTEARDOWN * RTSP/1.0",
    "rtsp://10.20.0.7/%0d%0aTEARDOWN",
    "rtsp://10.20.0.7/a b",
    "rtsp://10.20.0.7/a\tb",
    "rtsp://10.20.0.7/\x00",
    "rtsp://10.20.0.7/%",
    "rtsp://10.20.0.7/%zz",
    'rtsp://10.20.0.7/"',
    "rtsp://10.20.0.7/" + "a" * 2100,
    # ports
    "rtsp://10.20.0.7:22/",
    "rtsp://10.20.0.7:6379/",
    "rtsp://10.20.0.7:0/",
    "rtsp://10.20.0.7:65536/",
    "rtsp://10.20.0.7:66090/",
    "rtsp://10.20.0.7:554554/",
    "rtsp://10.20.0.7:0554/",
    "rtsp://10.20.0.7:+554/",
    "rtsp://10.20.0.7:-554/",
    "rtsp://10.20.0.7:/",
    "rtsp://10.20.0.7:5 54/",
    "rtsp://10.20.0.7:554:22/",
    "rtsp://10.20.0.7:٥٥٤/",
]


@pytest.mark.parametrize("url", HOSTILE)
def test_the_hostile_are_refused(url: str) -> None:
    with pytest.raises(UrlRefusedError) as caught:
        guard().check(url)
    assert len(str(caught.value).splitlines()) == 1


def test_the_corpus_is_not_refused_for_its_spelling_alone() -> None:
    """The same address in plain form is allowed by its network."""
    assert guard("127.0.0.1/32").check("rtsp://127.0.0.1/").addresses
    with pytest.raises(UrlRefusedError):
        guard("127.0.0.1/32").check("rtsp://127.1/")


def test_nothing_is_let_through_by_default() -> None:
    with pytest.raises(UrlRefusedError, match="allowed are none"):
        UrlGuard(resolver=resolver).check("rtsp://10.20.0.7/")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "169.254.169.254", "100.100.100.200", "168.63.129.16", "0.0.0.0", "224.0.0.1",
     "255.255.255.255", "250.1.1.1"],
)  # fmt: skip
def test_the_whole_internet_does_not_include_what_is_special(address: str) -> None:
    with pytest.raises(UrlRefusedError):
        guard("0.0.0.0/0", "::/0").check(f"rtsp://{address}/")
    with pytest.raises(UrlRefusedError):
        guard("0.0.0.0/0", "::/0").check(f"rtsp://[::ffff:{address}]/")


@pytest.mark.parametrize(
    "address",
    ["::1", "fe80::1", "fec0::1", "fd00:ec2::254", "ff02::1", "::", "64:ff9b::7f00:1", "2002:7f00:1::1",
     "64:ff9b::a9fe:a9fe", "::7f00:1"],
)  # fmt: skip
def test_nor_does_ipv6(address: str) -> None:
    with pytest.raises(UrlRefusedError):
        guard("0.0.0.0/0", "::/0").check(f"rtsp://[{address}]/")


def test_special_addresses_can_be_named() -> None:
    assert guard("127.0.0.0/8").allows(ipaddress.ip_address("127.0.0.1"))
    assert guard("::1/128").allows(ipaddress.ip_address("::1"))
    assert guard("169.254.7.0/24").allows(ipaddress.ip_address("169.254.7.1"))
    assert not guard("169.254.7.0/24").allows(ipaddress.ip_address("169.254.169.254"))
    assert not guard("224.0.0.0/4").allows(ipaddress.ip_address("224.0.0.1"))
    assert guard("fd00::/8").allows(ipaddress.ip_address("fd00::7"))


def test_a_network_that_translates_needs_both_named() -> None:
    address = ipaddress.ip_address("64:ff9b::10.20.0.7")
    assert not guard(CAMERAS).allows(address)
    assert not guard("64:ff9b::/96").allows(address)
    both = guard(CAMERAS, "64:ff9b::/96").check("rtsp://[64:ff9b::a14:7]/")
    assert both.addresses == (address,)


def test_a_name_is_looked_up_once_and_only_its_addresses_are_kept() -> None:
    """A name whose addresses change after the check has no effect: it is not resolved again."""
    answers = iter([["10.20.0.7"], ["127.0.0.1"]])
    asked: list[str] = []

    def rebinding(host: str, port: int) -> Iterable[str]:
        asked.append(host)
        return next(answers)

    checked = UrlGuard((CAMERAS,), resolver=rebinding).check("rtsp://camera/")
    assert asked == ["camera"]
    assert checked.addresses == (ipaddress.ip_address("10.20.0.7"),)
    with pytest.raises(UrlRefusedError):
        UrlGuard((CAMERAS,), resolver=rebinding).check("rtsp://camera/")


def test_an_address_is_not_looked_up() -> None:
    def never(host: str, port: int) -> Iterable[str]:
        raise AssertionError(host)

    assert UrlGuard((CAMERAS,), resolver=never).check("rtsp://10.20.0.7/").host == "10.20.0.7"


def test_errors_hold_no_passwords_and_no_addresses() -> None:
    for url in (
        "rtsp://admin:hunter2@half/",
        "rtsp://admin:hunter2@inside.example/live",
        "rtsp://admin:hunter2/x@camera/",
        "rtsp://admin:hunt er2@camera/",
        "http://admin:hunter2@camera/",
        "rtsp://admin:hunter2@camera:22/?token=hunter2",
    ):
        with pytest.raises(UrlRefusedError) as caught:
            guard().check(url)
        assert "hunter2" not in str(caught.value)
        assert "192.168" not in str(caught.value)
        assert "127.0.0.1" not in str(caught.value)


@pytest.mark.parametrize("network", ["10.20.0.1/16", "camera", "10.20", "::ffff:10.0.0.0/104", "10.0.0.0/33"])
def test_networks_are_written_exactly(network: str) -> None:
    with pytest.raises(ValueError, match="network"):
        UrlGuard((network,))


def test_ports_are_the_operators() -> None:
    assert guard(ports=(5544,)).check("rtsp://camera:5544/").port == 5544
    with pytest.raises(UrlRefusedError):
        guard(ports=(5544,)).check("rtsp://camera:554/")
    with pytest.raises(ValueError, match="port"):
        guard(ports=(0,))


@pytest.mark.parametrize(
    ("wrapped", "inner"),
    [
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::10.0.0.1", "10.0.0.1"),
        ("64:ff9b::10.0.0.1", "10.0.0.1"),
        ("2002:a00:1::5", "10.0.0.1"),
        ("2001:0:4136:e378:8000:63bf:f5ff:fffe", "10.0.0.1"),
        ("::1", "::1"),
        ("fd00::1", "fd00::1"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_addresses_within_addresses(wrapped: str, inner: str) -> None:
    assert unwrapped(ipaddress.ip_address(wrapped)) == ipaddress.ip_address(inner)


@given(st.text(max_size=60))
def test_whatever_comes_is_refused_or_in_the_named_networks(text: str) -> None:
    for url in (text, "rtsp://" + text, "rtsp://10.20.0.7" + text):
        try:
            checked = guard().check(url)
        except UrlRefusedError:
            continue
        assert isinstance(checked, CheckedUrl)
        assert checked.addresses
        assert all(address in ipaddress.ip_network(CAMERAS) for address in checked.addresses)


@given(
    st.text(alphabet="rtsp:/@[]%#?.0127x\\ab&=", max_size=40),
    st.text(alphabet=":/@[]%#?.0127x\\ab", max_size=30),
)
def test_two_readers_never_differ(head: str, tail: str) -> None:
    """Accepted URLs are parsed alike by the standard library."""
    from urllib.parse import urlsplit

    for url in (head + tail, f"rtsp://{head}10.20.0.7{tail}"):
        try:
            checked = guard().check(url)
        except UrlRefusedError:
            continue
        read = urlsplit(url)
        assert read.hostname is not None
        host = read.hostname.removesuffix(".")
        assert host in NAMES or ipaddress.ip_address(host) in {
            *checked.addresses,
            *(ipaddress.ip_address(f"::ffff:{a}") for a in checked.addresses if a.version == 4),
        }
        assert (read.port or 554) == checked.port
