"""The server of a judge says whose fault it was, holds little, answers others meanwhile, and ends when told to."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from neighbor_grpo.rewards import remote as library
from neighbor_grpo.rewards.remote import RemoteReward, RewardServer, pack_request

PICTURES = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in range(3)]
GOOD = pack_request(PICTURES, ["a", "b", "c"], "7")


@pytest.fixture(autouse=True)
def without_token(monkeypatch):
    monkeypatch.delenv(library.TOKEN, raising=False)


class Judge:
    "Counts its calls; each picture's red."

    def __init__(self, seconds=0.0):
        self.calls, self.seconds, self.started = 0, seconds, threading.Event()

    def __call__(self, pictures, prompts):
        self.calls += 1
        self.started.set()
        time.sleep(self.seconds)
        return [picture.getpixel((0, 0))[0] for picture in pictures]


def post(server, body=GOOD, method="POST", path="/", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx2.Client(trust_env=False, timeout=30) as client:
        return client.request(method, server.url + path, content=body, headers=named)


def sent(server, data):
    "A connection on which bytes were sent."
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=20)
    connection.sendall(data)
    return connection


def status_of(connection):
    with connection:
        return int(connection.recv(100).split()[1])


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def tensors(prompts='["a"]', shape=(4, 4, 3), dtype=torch.uint8, name="0"):
    return save({name: torch.zeros(shape, dtype=dtype)}, dict(prompts=prompts, request="1"))


BAD = {
    "empty": b"",
    "hello": b"hello",
    "zeros": bytes(300),
    "a header beyond the end": b"\xff" * 100,
    "a header that is no JSON": (3).to_bytes(8, "little") + b"abc",
    "deep prompts": tensors("[" * 10**5),
    "a prompt too many": pack_request(PICTURES, ["a"] * 4, "1"),
    "no pictures": pack_request([], [], "1"),
    "a prompt as text": tensors('"a"'),
    "a number as prompt": tensors("[1]"),
    "half a surrogate": tensors('["\\ud800"]'),
    "another name": tensors(name="../../x"),
    "floats": tensors(dtype=torch.float32),
    "no side": tensors(shape=(0, 1, 3)),
    "too wide": tensors(shape=(1, 16385, 3)),
    "four channels": tensors(shape=(4, 4, 4)),
    "two axes": tensors(shape=(4, 3)),
    "no metadata": save({"0": torch.zeros(4, 4, 3, dtype=torch.uint8)}),
}


def test_what_is_the_clients_fault_never_reaches_the_judge():
    with RewardServer(judge := Judge(), limit=10**6, pictures=3) as server:
        for name, body in BAD.items():
            answer = post(server, body)
            assert answer.status_code == 400 and list(answer.json()) == ["error"], name
            assert server.answer(body)[0] == 400, name
        assert post(server, bytes(10**6 + 1)).status_code == 413
        assert post(server, pack_request(PICTURES + PICTURES[:1], ["a"] * 4, "1")).status_code == 413
        assert post(server, content_type="text/plain").status_code == 415
        assert post(server, content_encoding="gzip").status_code == 415
        assert post(server, iter([GOOD])).status_code == 411
        assert post(server, method="PUT").status_code == 405
        assert post(server, b"", "GET", "/%2e%2e/passwd").status_code == 501
        assert judge.calls == 0 and post(server).json() == dict(rewards=[0.0, 1.0, 2.0], request="7")
        assert post(server, content_type="application/octet-stream", path="/any").status_code == 200
        assert server.held == 0


def test_texts_and_sizes_have_a_limit_of_their_own():
    with RewardServer(judge := Judge()) as server:
        answer = post(server, tensors(json.dumps(["a" * 2**23])))
        assert answer.status_code == 413 and "8 MiB" in answer.json()["error"] and judge.calls == 0


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: abc\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n",
        b"POST /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x01\x02\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_answered_too(data):
    with RewardServer(Judge()) as server:
        assert 400 <= status_of(sent(server, data)) <= 501
        assert post(server).status_code == 200


def test_what_is_refused_is_refused_before_it_is_sent_where_that_is_asked_for():
    with RewardServer(Judge()) as server:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999\r\nExpect: 100-continue\r\n\r\n"
        assert status_of(sent(server, head)) == 413


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, SystemExit])
def test_what_is_the_judges_fault_is_traced_here_and_told_there(error, capfd):
    def judge(pictures, prompts):
        if prompts[0] == "a":
            raise error("on\nthis one")
        return [1.0] * len(pictures)

    with RewardServer(judge) as server:
        answer = post(server)
        assert answer.status_code == 500 and answer.json() == dict(error=f"{error.__name__}: on this one")
        assert post(server, pack_request(PICTURES, ["b"] * 3, "2")).json()["rewards"] == [1.0] * 3
    traced = capfd.readouterr().err
    assert traced.startswith("Traceback") and "in judge" in traced


def test_all_requests_together_have_a_limit():
    "What was sent counts, not what was announced; who is refused is told when to come again."
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
    with RewardServer(Judge(), total=len(GOOD) + 500) as server, contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(sent(server, head % 10**8))
        assert post(server).status_code == 200
        half = sent(server, head % 1000 + bytes(501))
        wait_for(lambda: server.held == 501)
        answer = post(server)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
        half.close()
        wait_for(lambda: server.held == 0)
        assert post(server).status_code == 200


def test_a_request_has_to_arrive_in_time(monkeypatch):
    monkeypatch.setattr(library.Hurried, "patience", 0.2)
    with RewardServer(Judge(), seconds=0.2) as server:
        body = sent(server, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab")
        head, nothing = sent(server, b"POST / HTTP/1.1\r\nHo"), sent(server, b"")
        assert status_of(body) == 408
        for connection in (head, nothing):
            with connection:
                assert connection.recv(10) == b""
        wait_for(lambda: not server.server.server_state.connections)
        assert post(server).status_code == 200


def test_others_are_read_while_the_judge_works():
    with RewardServer(judge := Judge(0.5)) as server:
        first = threading.Thread(target=post, args=(server,))
        first.start()
        assert judge.started.wait(20)
        assert post(server, b"hello").status_code == 400 and post(server, b"", "GET").status_code == 200
        assert first.is_alive()
        first.join()


def test_the_last_answers_are_known_and_older_ones_forgotten():
    server = RewardServer(judge := Judge())
    bodies = [pack_request(PICTURES, ["a"] * 3, str(k)) for k in range(70)]
    for k in [*range(70), 69, 0]:
        assert server.answer(bodies[k])[0] == 200
    assert judge.calls == 71 and len(server.known) == 64
    server.close()


def test_the_front_page_says_what_is_served(monkeypatch):
    monkeypatch.setenv(library.TOKEN, "HIDDEN")
    with RewardServer(Judge(), names=["hps", "clip"], limit=1234, pictures=56) as server:
        answer = post(server, b"", "GET")
        page = answer.json()
        assert answer.status_code == 200 and page["rewards"] == ["hps", "clip"] and page["token"] is True
        assert page["limits"]["bytes"] == 1234 and page["limits"]["pictures"] == 56 and page["neighbor_grpo"]
        assert "HIDDEN" not in answer.text and post(server, b"", "HEAD").status_code == 200


def test_a_token_is_asked_for(monkeypatch):
    monkeypatch.setenv(library.TOKEN, "HIDDEN")
    with RewardServer(judge := Judge()) as server:
        for given in (
            {},
            dict(authorization="HIDDEN"),
            dict(authorization="Bearer HIDDE"),
            dict(authorization="Basic HIDDEN"),
        ):
            answer = post(server, **given)
            assert answer.status_code == 401 and "HIDDEN" not in answer.text
        assert judge.calls == 0
        assert RemoteReward(server.url)(PICTURES, ["a", "b", "c"]).tolist() == [0, 1, 2]
        monkeypatch.setenv(library.TOKEN, "another")
        with pytest.raises(RuntimeError, match="status 401: a token is needed: set NEIGHBOR_GRPO_TOKEN") as error:
            RemoteReward(server.url)(PICTURES, ["a", "b", "c"])
        assert "another" not in str(error.value)


@pytest.mark.parametrize("host", ["::1", "::", "localhost", "0.0.0.0"])
def test_every_kind_of_address_can_be_listened_to(host):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        server = RewardServer(Judge(), host)
    except ValueError:
        pytest.skip(f"{host} cannot be listened to here")
    with server:
        assert RemoteReward(server.url, patience=1)(PICTURES, ["a", "b", "c"]).tolist() == [0, 1, 2]


def test_an_address_that_is_not_free_is_named():
    with RewardServer(Judge()) as server:
        with pytest.raises(
            ValueError, match=f"host and port must be free on this machine, .* and {server.server_port}"
        ):
            RewardServer(Judge(), port=server.server_port)


# --- the end ---

SERVE = """
import signal, sys, time
from neighbor_grpo.rewards.remote import RewardServer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore it
def judge(pictures, prompts):
    print("begun", flush=True)
    time.sleep(float(sys.argv[1]))
    return [1.0] * len(pictures)
server = RewardServer(judge, grace=float(sys.argv[2]))
print(server.url, flush=True)
server.serve_forever()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("end, seconds, grace, status", [("SIGTERM", 0.6, 20, 200), ("SIGINT", 60, 0.3, 503)])
def test_what_is_in_progress_ends_or_is_told(root, monkeypatch, end, seconds, grace, status):
    monkeypatch.setenv("PYTHONPATH", str(root))
    command = [sys.executable, "-c", SERVE, str(seconds), str(grace)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found = []
    try:
        url = process.stdout.readline().strip()
        ask = lambda: found.append(httpx2.post(url, content=GOOD, timeout=60, trust_env=False).status_code)
        asking = threading.Thread(target=ask)
        asking.start()
        assert process.stdout.readline() == "begun\n"
        process.send_signal(getattr(signal, end))
        asking.join()
        assert process.wait(30) in (-getattr(signal, end), 1, 130) and found == [status]
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(url, trust_env=False)
    finally:
        process.kill()
        process.communicate()


def test_many_clients_leave_nothing_behind():
    with RewardServer(Judge()) as server:
        before = threading.active_count()
        remote = RemoteReward(server.url)
        for _ in range(3):
            threads = [threading.Thread(target=remote, args=(PICTURES, ["a", "b", "c"])) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        wait_for(lambda: not server.server.server_state.connections and threading.active_count() <= before)
        assert server.held == 0 and len(server.known) == 24 and server.jobs.empty()
