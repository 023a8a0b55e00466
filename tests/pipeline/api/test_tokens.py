from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest

from pipeline.api.tokens import TicketOffice, TokenSet
from pipeline.base.errors import UsageError

ONE = "a-first-token-of-24-chars"
TWO = "another/token+with=signs~"


def test_each_of_several_tokens_is_let_in_and_nothing_else() -> None:
    tokens = TokenSet([ONE, TWO])
    assert tokens.allows(ONE)
    assert tokens.allows(TWO)
    for other in ("", ONE[:-1], ONE + "x", ONE.upper(), TWO + " ", "\ud800", "x" * 100_000):
        assert not tokens.allows(other), other[:20]


@pytest.mark.parametrize("header", [f"Bearer {ONE}", f"bearer {ONE}", f"BEARER   {ONE} "])
def test_header(header: str) -> None:
    assert TokenSet([ONE]).allows_header(header)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", ONE, f"Basic {ONE}", f"Bearer {ONE} {ONE}", f"Bearer\t{ONE}", "\0"],
)
def test_other_headers(header: str | None) -> None:
    assert not TokenSet([ONE]).allows_header(header)


@pytest.mark.parametrize("bad", ["short", "x" * 15, "x" * 513, "with a space in it", "tökens-of-16-chars"])
def test_unfit_tokens_are_refused_and_not_repeated(bad: str) -> None:
    with pytest.raises(UsageError) as caught:
        TokenSet([ONE, bad])
    assert "token number 2" in str(caught.value)
    assert bad not in str(caught.value)


def test_none_at_all() -> None:
    with pytest.raises(UsageError, match="no token is given"):
        TokenSet.from_text("# nothing\n\n")


def test_nothing_of_a_token_is_kept_or_shown() -> None:
    tokens = TokenSet([ONE])
    assert ONE not in repr(tokens)
    assert ONE.encode() not in pickle.dumps(tokens)
    sent = pickle.loads(pickle.dumps(tokens))
    assert sent.allows(ONE)
    assert not sent.allows(TWO)


def test_equal_tokens_have_other_digests_in_another_set() -> None:
    assert vars(TokenSet([ONE]))["_digests"] != vars(TokenSet([ONE]))["_digests"]


def test_from_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# for the dashboard\n{ONE}\n\n  {TWO}\n")
    file.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        tokens = TokenSet.from_file(str(file))
    assert len(tokens) == 2
    assert tokens.allows(TWO)
    assert caplog.text == ""
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        TokenSet.from_file(str(file))
    assert "every user" in caplog.text
    with pytest.raises(UsageError, match="No such file"):
        TokenSet.from_file(str(tmp_path / "none"))


def test_ticket_is_good_for_its_stream_and_time() -> None:
    office = TicketOffice(seconds=60)
    ticket = office.issue("gate", now=1000.0)
    assert office.allows(ticket, "gate", now=1000.0)
    assert office.allows(ticket, "gate", now=1060.0)
    assert not office.allows(ticket, "gate", now=1061.0)
    assert not office.allows(ticket, "door", now=1000.0)
    assert not office.allows(ticket, "gate", now=900.0)  # of a clock that was set back
    assert not TicketOffice().allows(ticket, "gate", now=1000.0)
    assert TicketOffice(key=office.key).allows(ticket, "gate", now=1000.0)


def test_ticket_cannot_be_made_longer() -> None:
    office = TicketOffice(seconds=60)
    until, _, signature = office.issue("gate", now=1000.0).partition(".")
    assert until == "1060"
    for forged in (
        f"1070.{signature}",
        f"1060.{'A' * 43}",
        f"01060.{signature}",
        signature,
        "",
        f"1060.{signature}\n",
    ):
        assert not office.allows(forged, "gate", now=1010.0), forged


def test_the_key_is_not_shown() -> None:
    office = TicketOffice(key=b"k" * 32)
    assert "kkk" not in repr(office)
