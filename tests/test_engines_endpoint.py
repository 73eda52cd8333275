"""The client of chat completions against a real server: what is kept, tried again, limited, and never written down."""

import json
import time

import pytest
from chat_server import serving, slow

from align_loop.engines.endpoint import Endpoint
from align_loop.engines.replies import Account, CapReached, most_tokens
from align_loop.errors import UserError

KEY = "sk-very-secret-0123456789abcdef"


def texts(count=6):
    return [[{"role": "user", "content": f"question {i}"}] for i in range(count)]


def endpoint(chat, tmp_path, **fields):
    return Endpoint(**{"url": chat.url, "model": "m", "cache_dir": str(tmp_path / "cache"), "backoff": 0.01} | fields)


def echo(request, _number):
    return request["messages"][-1]["content"].upper()


def test_replies_come_in_order_and_are_asked_once(tmp_path):
    with serving(echo) as chat:
        there, done = endpoint(chat, tmp_path), []
        asked = there.ask([*texts(), *texts(2)], done.append)
        assert [r.text for r in asked.replies] == [f"QUESTION {i}" for i in (0, 1, 2, 3, 4, 5, 0, 1)]
        assert (asked.sent, asked.known, asked.tokens, sum(done)) == (6, 0, 660, 8)
        again = there.ask(texts(7))
        assert (again.sent, again.known) == (1, 6) and len(chat.requests) == 7
        assert set(chat.paths) == {"/v1/chat/completions"} and set(chat.keys) == {None}
        assert chat.requests[0].keys() == {"model", "messages", "temperature", "max_tokens"}


def test_what_is_asked_is_what_is_kept(tmp_path):
    with serving(echo) as chat:
        endpoint(chat, tmp_path).ask(texts(1))
        for fields in ({"model": "n"}, {"temperature": 1.0}, {"max_tokens": 7}, {"extra": {"top_p": 0.5}}):
            assert endpoint(chat, tmp_path, **fields).ask(texts(1)).sent == 1
        assert endpoint(chat, tmp_path, cache_dir=str(tmp_path / "other")).ask(texts(1)).sent == 1
        assert endpoint(chat, tmp_path, extra={"max_tokens": None}).request(texts(1)[0]).keys() == {
            "model",
            "messages",
            "temperature",
        }
        for fields in ({"concurrency": 1}, {"timeout": 9.0}, {"retries": 1}, {"price_in": 3.0}):
            assert endpoint(chat, tmp_path, **fields).ask(texts(1)).known == 1
    with serving(echo) as chat:  # another endpoint is another model, whatever its name
        assert endpoint(chat, tmp_path).ask(texts(1)).sent == 1


def test_a_broken_file_of_the_cache_is_asked_again(tmp_path):
    with serving(echo) as chat:
        endpoint(chat, tmp_path).ask(texts(2))
        files = sorted((tmp_path / "cache").rglob("*.json"))
        files[0].write_text('{"half')
        files[1].write_text(json.dumps(json.loads(files[1].read_text()) | {"request": {}}))
        asked = endpoint(chat, tmp_path).ask(texts(2))
        assert asked.sent == 2 and endpoint(chat, tmp_path).ask(texts(2)).known == 2


@pytest.mark.parametrize("trouble", [(429, "slow down", {}), (503, "busy", {}), (0, "", {}), (200, "no json", {})])
def test_trouble_that_passes_is_tried_again(tmp_path, trouble):
    with serving(lambda request, number: trouble if number <= 2 else "fine") as chat:
        asked = endpoint(chat, tmp_path, retries=2).ask(texts(1))
        assert asked.replies[0].text == "fine" and len(chat.requests) == 3
    with serving(lambda request, number: trouble if number <= 2 else "fine") as chat:
        with pytest.raises(UserError, match="no reply after 2 attempts; the last: "):
            endpoint(chat, tmp_path, retries=1).ask(texts(1))
        assert len(chat.requests) == 2


def test_a_late_reply_counts_as_none(tmp_path):
    with serving(lambda request, number: slow(3)(request, number) if number == 1 else "in time") as chat:
        asked = endpoint(chat, tmp_path, timeout=0.7, retries=1).ask(texts(1))
        assert asked.replies[0].text == "in time" and len(chat.requests) == 2
    with serving(slow(0.9)) as chat:
        assert endpoint(chat, tmp_path, timeout=9.0, retries=0).ask(texts(1)).replies[0].text == "A"


def test_waits_grow_and_the_endpoint_may_ask_for_more(tmp_path):
    def took(headers, backoff):
        with serving(lambda request, number: (429, "", headers) if number <= 3 else "fine") as chat:
            start = time.monotonic()
            endpoint(chat, tmp_path, backoff=backoff, retries=3).ask(texts(1))
            return time.monotonic() - start

    assert took({}, 0.1) > 0.1 * (1 + 2 + 4) * 0.75
    assert took({"Retry-After": "0.3"}, 0.001) > 0.9 > took({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.001)


def test_no_more_requests_at_once_than_allowed(tmp_path):
    for limit in (1, 4):
        with serving(slow(0.05)) as chat:
            endpoint(chat, tmp_path, concurrency=limit).ask(texts(12))
            assert chat.most_at_once == limit if limit == 1 else 1 < chat.most_at_once <= limit


def test_an_endpoint_that_is_not_there(tmp_path):
    with serving(echo) as chat:
        pass
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/v1: no reply after 2 attempts.*refused"):
        endpoint(chat, tmp_path, retries=1).ask(texts(1))


def test_refusals_are_told_apart(tmp_path):
    def behave(request, number):
        return (400, '{"error": "too long"}', {}) if "3" in request["messages"][0]["content"] else "fine"

    with serving(behave) as chat:
        asked = endpoint(chat, tmp_path).ask(texts())
        assert [r.text for r in asked.replies] == ["fine"] * 3 + [None] + ["fine"] * 2
        assert "too long" in asked.replies[3].refusal and len(chat.requests) == 6
        with pytest.raises(UserError, match="refuses every request: HTTP 400: .*too long"):
            endpoint(chat, tmp_path).ask([texts()[3]])
    for status in (401, 404):
        with serving(lambda request, number, status=status: (status, "who are you", {})) as chat:
            with pytest.raises(UserError, match=f"HTTP {status}: who are you"):
                endpoint(chat, tmp_path, concurrency=1).ask(texts())
            assert len(chat.requests) == 1  # not tried again, and nobody else tried


# --- money --------------------------------------------------------------------------------------------------------


def test_the_cost_is_what_the_endpoint_counted(tmp_path):
    with serving(echo, usage=(1000, 50)) as chat:
        asked = endpoint(chat, tmp_path, price_in=2.0, price_out=10.0).ask([*texts(2), *texts(1)])
        assert [r.cost for r in asked.replies] == pytest.approx([0.00125, 0.0025, 0.00125])  # shared by the same two
        again = endpoint(chat, tmp_path, price_in=2.0, price_out=10.0).ask(texts(2))
        assert (again.sent, [r.cost for r in again.replies]) == (0, pytest.approx([0.0025, 0.0025]))
        assert endpoint(chat, tmp_path, price_in=4.0).ask(texts(1)).replies[0].cost == pytest.approx(0.004)
    with serving(echo, usage=None) as chat:  # it does not say: the upper bound counts
        there = endpoint(chat, tmp_path, price_out=1.0, max_tokens=200)
        assert there.ask(texts(1)).replies[0].cost == pytest.approx(200 / 1e6)


def test_the_cap_is_never_passed_and_what_was_paid_for_is_kept(tmp_path):
    fields = {"price_in": 0.0, "price_out": 1e6, "max_tokens": 20, "concurrency": 3}  # one a token
    with serving(slow(0.01), usage=(5, 10)) as chat:
        with pytest.raises(UserError, match=r"cost_cap=75: 60 spent.*6 of 30 replies are kept in .*cache, raise"):
            endpoint(chat, tmp_path, cost_cap=75.0, **fields).ask(texts(30))
        assert len(chat.requests) == 6  # a seventh could have cost 20
        with pytest.raises(UserError, match="60 spent"):  # what was paid for counts again
            endpoint(chat, tmp_path, cost_cap=75.0, **fields).ask(texts(30))
        assert len(chat.requests) == 6
        asked = endpoint(chat, tmp_path, cost_cap=310.0, **fields).ask(texts(30))
        assert (asked.sent, asked.known) == (24, 6) and sum(r.cost for r in asked.replies) == 300
        assert len(chat.requests) == 30
    with serving(echo) as chat, pytest.raises(UserError, match="cost_cap=10: 0 spent"):
        endpoint(chat, tmp_path, cost_cap=10.0, **fields).ask(texts(1))
    assert chat.requests == []


def test_the_account_waits_for_what_is_under_way():
    account = Account(cap=10, spent=1)
    account.reserve(4)
    account.reserve(4)
    account.settle(4, 2)
    account.reserve(3)  # 3 spent, 4 and 3 under way
    account.settle(4, 4)
    account.settle(3, 3)
    assert (account.spent, account.reserved) == (10, 0)
    with pytest.raises(CapReached):
        account.reserve(0.1)
    Account(None, 0).reserve(1e9)


def test_the_bound_of_tokens_is_one():
    request = {"messages": [{"role": "user", "content": "é" * 10}], "max_tokens": 5, "max_completion_tokens": 9}
    assert most_tokens(request) == (20 + 128, 9)


# --- the key ------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_is_nowhere_else(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(echo) as chat:
        there = endpoint(chat, tmp_path, key_env="JUDGE_KEY")
        there.ask(texts(2))
        assert set(chat.keys) == {f"Bearer {KEY}"}
    files = [file.read_text() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert len(files) == 2 and KEY not in "".join(files) + repr(there)
    with serving(lambda *_: (401, f"bad key {KEY}", {})) as chat:
        with pytest.raises(UserError) as error:
            endpoint(chat, tmp_path, key_env="JUDGE_KEY").ask(texts(1))
        assert "bad key (the key)" in str(error.value)
    assert KEY not in str(error.value) + "".join(capfd.readouterr())


def test_a_redirect_does_not_carry_the_key_away(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(echo) as thief:
        for status in (302, 307):
            moved = (status, "", {"Location": f"{thief.url}/chat/completions"})
            with serving(lambda *_, moved=moved: moved) as chat, pytest.raises(UserError, match=f"HTTP {status}"):
                endpoint(chat, tmp_path, key_env="JUDGE_KEY").ask(texts(1))
        assert thief.requests == []


def test_a_key_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with serving(echo) as chat:
        with pytest.raises(UserError, match="key_env=JUDGE_KEY: this environment variable is not set"):
            endpoint(chat, tmp_path, key_env="JUDGE_KEY").ask(texts(1))
        assert chat.requests == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"url": "localhost:8000"}, "annotator.endpoint.url must be http"),
        ({"url": "http://me:secret@host/v1"}, "annotator.endpoint.url must be http"),
        ({"key_env": "sk-abc"}, "key_env must be the NAME"),
        ({"key_env": "hf_abcdef"}, "key_env must be the NAME"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"retries": -1}, "retries=-1"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"timeout": 0.0}, "timeout=0.0 must be positive"),
        ({"backoff": 0.0}, "backoff=0.0 must be positive"),
        ({"price_in": -1.0}, "price_in"),
        ({"cost_cap": 1.0}, "cost_cap=1.0 needs"),
        ({"cost_cap": 0.0, "price_in": 1.0}, "cost_cap=0.0 needs"),
    ],
)
def test_wrong_fields_are_named_and_never_shown_where_they_may_be_secret(fields, said):
    with pytest.raises(ValueError, match=said) as error:
        Endpoint(**{"url": "http://h/v1", "model": "m"} | fields)
    assert "secret" not in str(error.value) and "abc" not in str(error.value)
