"""The client of a judge ends in time, reads little, asks again only where that may help, and gives no secret away."""

import contextlib
import gzip
import json
import math
import socket
import ssl
import threading
import time
from email.utils import formatdate

import pytest
import torch
from helpers import Listener
from PIL import Image

from neighbor_grpo.rewards import remote as library
from neighbor_grpo.rewards.judges import make_rewards, parse_rewards
from neighbor_grpo.rewards.remote import RemoteReward, RewardServer, portions

CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
NOBODY = f"http://127.0.0.1:{1:d}"  # where no server listens
PICTURES, PROMPTS = torch.zeros(2, 3, 4, 4), ["a", "b"]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*CERTIFICATES, library.TOKEN):
        monkeypatch.delenv(name, raising=False)


class Peer(Listener):
    "Accepts connections, reads a request from each, and does what it was told."

    def __init__(self, *acts, context=None):
        super().__init__()
        self.acts, self.heads, self.closing = list(acts), [], threading.Event()
        self.context = context
        self.url = f"http{'s' * bool(context)}://127.0.0.1:{self.port}"

    def __exit__(self, *_):
        self.closing.set()
        super().__exit__()

    def serve(self, connection):
        with contextlib.suppress(OSError), connection:
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True)
            file = connection.makefile("rwb")
            head, body = self.read(file)
            self.heads.append(head)
            act = self.acts[min(len(self.heads), len(self.acts)) - 1]
            act(self, file, json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]["request"])
            file.flush()

    def forever(self, file, part, pause=0.02):
        while not self.closing.wait(pause):
            file.write(part)
            file.flush()


def good_answer(request):
    return json.dumps(dict(rewards=[1.0, 2.0], request=request)).encode()


def answers(status=200, content=None, **headers):
    "An answer with a status, the right content unless another is given, and headers."

    def act(peer, file, request):
        body = good_answer(request) if content is None else content
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        file.write("\r\n".join([*lines, "", ""]).encode() + body)

    return act


def endless(start, part):
    def act(peer, file, request):
        file.write(start)
        peer.forever(file, part)

    return act


ENDLESS = {
    "silence": endless(b"", b""),
    "dripped headers": endless(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "dripped body": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 600\r\n\r\n", b" "),
    "100 Continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "headers": endless(b"HTTP/1.1 200 OK\r\n", b"A: " + b"b" * 50000 + b"\r\n"),
    "chunks": endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
}


def ask(url, timeout=5.0, patience=10.0):
    return RemoteReward(url, timeout=timeout, patience=patience)(PICTURES, PROMPTS)


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_attempt_ends_whatever_a_server_does(kind):
    with Peer(ENDLESS[kind]) as peer:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="no reward from"):
            ask(peer.url, timeout=0.3, patience=0.2)
        assert time.monotonic() - start < 20  # a bound on hanging, not a measurement


def test_an_attempt_ends_where_a_name_is_not_found_in_time(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="no complete answer in 0.1 s"):
        ask("http://slow.example:1", timeout=0.1, patience=0.1)
    assert time.monotonic() - start < 2.9


BOMB = gzip.compress(b" " * 10**7)
REFUSED = {
    "long": (answers(content=b" " * 10**5), "at most 4224 bytes"),
    "compressed": (answers(content=BOMB[:3000], Content_Encoding="gzip"), "encoding must be none, got 'gzip'"),
    "deep": (answers(content=b"[" * 4000), "nonsense: RecursionError"),
    "cut": (answers(content=b'{"rewards": [1.0'), "nonsense: JSONDecodeError"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_answer_is_read_as_it_comes_and_not_far(kind):
    act, reason = REFUSED[kind]
    with Peer(act) as peer:
        with pytest.raises(RuntimeError, match=reason):
            ask(peer.url, patience=0.05)
        assert "accept-encoding: identity" in peer.heads[0].lower()


def test_an_answer_without_an_end_is_left_at_its_limit():
    with Peer(ENDLESS["chunks"]) as peer, pytest.raises(RuntimeError, match="at most 4224 bytes"):
        ask(peer.url, timeout=10, patience=0.05)


# --- whom to ask again ---


@pytest.mark.parametrize("status", [301, 308, 400, 401, 403, 404, 413, 415, 422, 500, 501, 505])
def test_a_status_that_stays_ends_it(status, capsys):
    with Peer(answers(status, b'{"error": "no more\\nmemory\\u001b[31m"}', Location=NOBODY)) as peer:
        with pytest.raises(RuntimeError, match=rf"status {status}: no more memory \[31m$"):
            ask(peer.url)
        assert len(peer.heads) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize("status", [202, 302, 303, 307, 408, 425, 429, 502, 503, 504, 520])
def test_a_status_that_may_pass_is_one_line_and_another_attempt(status, capsys):
    with Peer(answers(status, b"busy", Location=NOBODY), answers()) as peer:
        assert ask(peer.url).tolist() == [1.0, 2.0]
        lines = capsys.readouterr().err.splitlines()
        assert len(peer.heads) == 2 and len(lines) == 1
        assert lines[0].startswith(
            f"attempt 1 at {peer.url} failed (status {status}: busy): again in 0.1 s, giving up in "
        )


def test_the_judges_own_error_ends_it_and_is_traced_at_the_server(capfd):
    def judge(pictures, prompts):
        raise ZeroDivisionError("no such picture")

    with RewardServer(judge) as server, pytest.raises(RuntimeError) as error:
        ask(server.url)
    assert str(error.value) == f"the judge at {server.url} failed with status 500: ZeroDivisionError: no such picture"
    assert capfd.readouterr().err.splitlines()[-1] == "ZeroDivisionError: no such picture"


def test_retry_after_is_waited_for():
    times = []

    def busy(peer, file, request):
        times.append(time.monotonic())
        answers(503, b"", Retry_After="1")(peer, file, request)

    def ready(peer, file, request):
        times.append(time.monotonic())
        answers()(peer, file, request)

    with Peer(busy, ready) as peer:
        assert ask(peer.url).tolist() == [1.0, 2.0] and times[1] - times[0] >= 1


def test_retry_after_is_waited_for_no_longer_than_patience():
    with Peer(answers(503, b"", Retry_After="9" * 400)) as peer:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="no reward"):
            ask(peer.url, patience=0.3)
        assert len(peer.heads) == 2 and time.monotonic() - start < 20


def test_retry_after_is_a_number_or_a_date():
    assert [library.seconds_of(text) for text in ("7", "", "soon", "-3", "1.5", "9" * 400)] == [7, 0, 0, 0, 0, math.inf]
    assert 50 < library.seconds_of(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert library.seconds_of(formatdate(0, usegmt=True)) == 0


# --- certificates, proxies, addresses ---

PEM = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgv4HmcgigZPAyKSY8
efaLdlsyiTs2mXnol91dDhhirUKhRANCAARshCF4jvlTgF4V//CfCb2dxT/dJheb
qrfyicLV4Tn8vJj3MjJWIF7l1OIcdJePyklsP3rXW1GEG9tnhzdpS5Hy
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUOuzrhmKYpAA/Bv3F8ZCIkd8cFAMwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNzE5MTg0NFoYDzIxMjYxMTAz
MTkxODQ0WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAARshCF4jvlTgF4V//CfCb2dxT/dJhebqrfyicLV4Tn8vJj3MjJWIF7l
1OIcdJePyklsP3rXW1GEG9tnhzdpS5Hyo2QwYjAdBgNVHQ4EFgQUOz/37lf/4pjn
cCRv4YSTgnckWNYwHwYDVR0jBBgwFoAUOz/37lf/4pjncCRv4YSTgnckWNYwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
IE9SYHTeKX5qzOivq8SLs3p+d3K70MeSIPe+mSF3Lo8KAiEAiWYr120gm7mf9t1C
k6L9dVE2zPf1ls8OdbaZ2dT0yLk=
-----END CERTIFICATE-----
"""


@pytest.fixture
def trusted_server(tmp_path):
    (tmp_path / "both.pem").write_text(PEM.strip() + "\n")
    (tmp_path / "authority.pem").write_text(PEM[PEM.index("-----BEGIN CERTIFICATE") :])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    with Peer(answers(), context=context) as peer:
        yield peer


def test_a_certificate_nobody_vouches_for_ends_it(trusted_server, capsys):
    with pytest.raises(RuntimeError, match="certificate of https://.* is not trusted .*SSL_CERT_FILE"):
        ask(trusted_server.url)
    assert not trusted_server.heads and not capsys.readouterr().err


@pytest.mark.parametrize("name", CERTIFICATES[:3])
def test_private_authorities_are_taken_from_the_environment(trusted_server, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, str(tmp_path / "authority.pem"))
    assert ask(trusted_server.url).tolist() == [1.0, 2.0]
    monkeypatch.setenv(name, str(tmp_path / "missing.pem"))
    with pytest.raises(ValueError, match=f"{name} must be a file or folder of certificates, got .*missing.pem"):
        ask(trusted_server.url)


def test_proxies_of_the_environment_are_ignored(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, NOBODY)
    with Peer(answers()) as peer:
        assert ask(peer.url).tolist() == [1.0, 2.0]


# --- secrets ---

SECRETS = [
    "http://me:HIDDEN@judge:8000",
    "https://HIDDEN@judge",
    "http://me:HID,DEN@judge",
    "http://judge/score?token=HIDDEN",
    "http://judge/?a=b&api_key=HIDDEN",
    "http://judge/#access-token=HIDDEN",
    "me:HIDDEN@judge",
    "http://me:HIDDEN/x@judge:port",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_secret_in_an_address_is_refused_and_not_repeated(url):
    calls = [
        lambda: ask(url),
        *(lambda t=text: parse_rewards(t) for text in (f"remote@{url}", f"hps,2*remote@{url},clip")),
    ]
    for call in [*calls, lambda: make_rewards(f"compressibility,remote@{url}")]:
        with pytest.raises(ValueError) as error:
            call()
        message = str(error.value)
        assert message.startswith("url must be") and not any(part in message for part in ("HID", "DEN", "me:"))


def test_an_address_without_secrets_is_taken():
    for url in ("http://judge:8000/a@b?monkey=1", "https://judge/path", "http://[::1]:80"):
        assert parse_rewards(f"remote@{url},clip@models/a@b") == [(1.0, "remote", url), (1.0, "clip", "models/a@b")]


def test_the_token_is_sent_where_it_belongs_and_written_nowhere(monkeypatch, capsys):
    monkeypatch.setenv(library.TOKEN, "HIDDEN")
    with Peer(answers()) as elsewhere, Peer(answers(307, b"", Location=elsewhere.url), answers(403, b"no")) as peer:
        with pytest.raises(RuntimeError) as error:
            ask(peer.url)
    assert ["authorization: bearer hidden" in head.lower() for head in peer.heads] == [True, True]
    assert not elsewhere.heads and "HIDDEN" not in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("value", ["HID DEN", "HIDDEN\r\nX: y", "HIDD\u00c9N"])
def test_a_token_that_cannot_travel_is_refused_and_not_repeated(monkeypatch, value):
    monkeypatch.setenv(library.TOKEN, value)
    for call in (lambda: ask(NOBODY), lambda: RewardServer(len)):
        with pytest.raises(ValueError, match="NEIGHBOR_GRPO_TOKEN must be printable ASCII") as error:
            call()
        assert "HID" not in str(error.value)


# --- many pictures ---


def test_many_pictures_are_several_requests():
    pictures = [Image.new("RGB", (k, 10)) for k in (10, 10, 10, 90, 10, 1, 1, 1)]
    assert list(portions(pictures, most=900, count=3)) == [slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 8)]
    sizes = []

    def judge(pictures, prompts):
        sizes.append(len(pictures))
        return [float(prompt) for prompt in prompts]

    with RewardServer(judge) as server:
        found = RemoteReward(server.url)(torch.zeros(600, 3, 1, 1), [str(k) for k in range(600)])
    assert found.tolist() == list(range(600)) and sizes == [256, 256, 88]
