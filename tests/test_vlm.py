"""A vision-language model as a judge: what it answers becomes a reward only if it is an answer to the question."""

import base64
import contextlib
import gzip
import io
import json
import math
import socket
import struct
import threading
import time

import numpy as np
import pytest
import torch
from helpers import Listener
from PIL import Image

from neighbor_grpo.cli import main
from neighbor_grpo.rewards.judges import absolute_rewards, make_rewards, parse_rewards, reward_files, reward_names
from neighbor_grpo.rewards.vlm import VLM

TOKEN = "NEIGHBOR_GRPO_VLM_TOKEN"
PICTURES = [Image.new("L", (4, 4), shade) for shade in (51, 204, 102, 153, 255, 51)]


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)


class Server(Listener):
    "Reads a request from each connection, and writes what `act(number, question)` returns."

    def __init__(self, act):
        super().__init__()
        self.act, self.heads, self.asked, self.lock = act, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def serve(self, connection):
        with contextlib.suppress(OSError), connection:
            file = connection.makefile("rwb")
            head, body = self.read(file)
            question = json.loads(body)
            with self.lock:
                self.heads.append(head)
                self.asked.append(question)
                number = len(self.asked)
            answer = self.act(number, question)
            if answer is None:  # a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                file.close()
                return
            file.write(answer)
            file.flush()


def http(content, status=200, kind="application/json", **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", f"Content-Type: {kind}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def first(*pairs, text="Yes", **more):
    "An answer with the likeliest first tokens and their probabilities."
    top = [dict(token=token, logprob=value if isinstance(value, str) else math.log(value)) for token, value in pairs]
    content = [dict(token="Yes", logprob=0.0, top_logprobs=top)]
    return dict(choices=[dict(message=dict(content=text), logprobs=dict(content=content), **more)])


def whole(text, end="stop"):
    return dict(choices=[dict(message=dict(content=text), finish_reason=end)])


GOOD = first(("Yes", 0.6), (" no", 0.2), ("I", 0.2))
BOMB = gzip.compress(b" " * 10**7)
# What a server does, and what is said of it; the last is whether it is asked for a number.
ODD = {
    "not JSON": (http(b"yes"), "nonsense: JSONDecodeError", False),
    "cut JSON": (http(json.dumps(GOOD)[:-9].encode()), "nonsense: JSONDecodeError", False),
    "cut connection": (http(GOOD)[:-9], "RemoteProtocolError", False),
    "huge": (http(b" " * 10**5), "at most 65536 bytes", False),
    "deep": (http(b"[" * 60000), "RecursionError", False),
    "slow": ("slow", "no complete answer in 0.3 s", False),
    "500": (http(dict(error="out of memory"), 500), "failed with status 500: out of memory", False),
    "429": (http(dict(error="busy"), 429, Retry_After="99"), "status 429: busy", False),
    "404": (http(dict(error="no such model"), 404), "refuses the request with status 404: no such model", False),
    "redirect": (http(b"", 307, Location="http://127.0.0.1/"), "status 307", False),
    "moved": (http(b"", 301, Location="http://127.0.0.1/"), "refuses the request with status 301", False),
    "wrong content type": (http(GOOD, kind="text/html"), "type must be application/json, got 'text/html'", False),
    "gzip bomb": (http(BOMB[:5000], Content_Encoding="gzip"), "encoding must be none, got 'gzip'", False),
    "connection reset": (None, "(Reset|reset|disconnected|ReadError)", False),
    "no choices": (http(dict(choices=[])), "choices must be one, got 0", False),
    "two choices": (http(dict(choices=[*GOOD["choices"]] * 2)), "choices must be one, got 2", False),
    "an error as an answer": (http(dict(error="x")), "answer must be one with `choices`", False),
    "no logprobs": (http(whole("Yes")), "logprobs must be of a first token; .* asked for a number", False),
    "NaN": (http(json.dumps(GOOD).replace("-0.5108256237659907", "NaN").encode()), "not above 0, got .*nan", False),
    "a text as logprob": (http(first(("Yes", "-0.1"))), "numbers that are not above 0", False),
    "above 0": (http(first(("Yes", 1.5))), "numbers that are not above 0", False),
    "more than 1": (http(first(("Yes", 0.7), ("no", 0.7))), "at most 1 in all, got 'a sum of 1.400'", False),
    "a token twice": (http(first(("Yes", 0.3), ("Yes", 0.3))), "tokens must be different", False),
    "neither yes nor no": (
        http(first(("The", 0.9), ("Yes", 0.05), text="The")),
        "'The', with 0.05 for yes and no",
        False,
    ),
    "refusal": (http(dict(choices=[dict(message=dict(refusal="I cannot"))])), "no refusal, got 'I cannot'", False),
    "refusal as text": (http(whole("I cannot judge this.")), "nothing else, got 'I cannot judge this.'", True),
    "out of range": (http(whole("11")), r"one number in \[0, 10\] and nothing else, got '11'", True),
    "two numbers": (http(whole("7 8")), "nothing else, got '7 8'", True),
    "text around": (http(whole("7 of 10")), "nothing else, got '7 of 10'", True),
    "a number cut short": (http(whole("1", "length")), "which ended by length", True),
    "a number as NaN": (http(whole("NaN")), "nothing else, got 'NaN'", True),
    "no text": (http(whole(None)), "answer is needed: one number", True),
    "digits of another script": (http(whole("\u0667")), "nothing else", True),
}


def judge_of(tmp_path, url, **more):
    values = dict(url=url, model="some/model", timeout=5.0, patience=0.05) | more
    (tmp_path / "judge.yaml").write_text(json.dumps(values))  # JSON is YAML
    return make_rewards(f"vlm@{tmp_path / 'judge.yaml'}")[0][0]


@pytest.mark.parametrize("kind", ODD)
def test_no_misbehaviour_becomes_a_reward(kind, tmp_path):
    answer, message, number = ODD[kind]
    more = dict(timeout=0.3) if answer == "slow" else {}
    done = threading.Event()

    def act(*_):
        if answer == "slow":
            done.wait(5)
        return answer if answer != "slow" else b""

    with Server(act) as server:
        judge = judge_of(tmp_path, server.url, answer="number" if number else "probability", **more)
        with pytest.raises(RuntimeError, match=message) as error:
            judge(PICTURES[:1], ["a cat"])
        done.set()
    assert server.url in str(error.value) and not judge.known and len(server.asked) <= 3


def test_nonsense_is_asked_for_three_times(tmp_path):
    with Server(lambda number, _: http(first(("The", 0.9)) if number < 3 else GOOD)) as server:
        assert judge_of(tmp_path, server.url, patience=9.0)(PICTURES[:1], ["a"]).item() == pytest.approx(0.75)
    with Server(lambda *_: http(first(("The", 0.9)))) as server:
        with pytest.raises(RuntimeError, match="no reward from .* in 3 attempts: nonsense"):
            judge_of(tmp_path, server.url, patience=9.0)(PICTURES[:1], ["a"])
        assert len(server.asked) == 3


def bright(number, question):
    "The brightness of the picture as the probability of yes; the first question is answered last."
    data = base64.b64decode(question["messages"][0]["content"][0]["image_url"]["url"].split(",")[1])
    value = np.asarray(Image.open(io.BytesIO(data))).mean() / 255
    time.sleep(0.2 * (number == 1))
    return http(first((" YES.", 0.5 * value + 1e-9), ("yes", 0.4 * value + 1e-9), ("No", 0.9 - 0.9 * value + 1e-9)))


def test_each_picture_gets_its_own_answer_and_is_asked_about_once(tmp_path):
    busy = threading.Semaphore(2)

    def act(number, question):
        assert busy.acquire(blocking=False), "more than two at once"
        try:
            return bright(number, question)
        finally:
            busy.release()

    with Server(act) as server:
        judge = judge_of(tmp_path, server.url, question='{prompt}: {n}? {{"yes"}}', at_once=2)
        facts = [dict(n=1)] * len(PICTURES)
        expected = torch.tensor([51, 204, 102, 153, 255, 51]) / 255
        for _ in range(2):
            torch.testing.assert_close(judge(PICTURES, ["a"] * 6, facts), expected, atol=1e-6, rtol=0)
    texts = {question["messages"][0]["content"][1]["text"] for question in server.asked}
    assert len(server.asked) == 5 and texts == {'a: 1? {"yes"}'}
    assert {(q["model"], q["temperature"], q["top_logprobs"]) for q in server.asked} == {("some/model", 0, 20)}


def test_numbers_come_as_they_are_and_missing_fields_are_named(tmp_path):
    with Server(lambda *_: http(whole(" 7.5\n"))) as server:
        judge = judge_of(tmp_path, server.url, answer="number", question="{prompt} {count}")
        assert judge(PICTURES[:1], ["a"], [dict(count=2)]).tolist() == [7.5]
        with pytest.raises(ValueError, match="question must be of fields that 'b' has, got 'count'"):
            judge(PICTURES[:1], ["b"])


def test_the_token_is_sent_to_the_judge_and_written_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(TOKEN, "HIDDEN")
    monkeypatch.setenv("NEIGHBOR_GRPO_TOKEN", "OTHER")
    answers = [http(dict(error="busy, HIDDEN"), 503), http(dict(error="wrong key HIDDEN"), 401)]
    with Server(lambda number, _: answers[number - 1]) as server:
        judge = judge_of(tmp_path, server.url, patience=5.0)
        with pytest.raises(RuntimeError, match="wrong key ...") as error:
            judge(PICTURES[:1], ["a"])
    assert ["Bearer HIDDEN" in head and "OTHER" not in head for head in server.heads] == [True, True]
    assert "HIDDEN" not in str(error.value) + capsys.readouterr().err + json.dumps(server.asked) + repr(vars(judge))


def test_a_judge_is_named_by_its_address_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "http://127.0.0.1/v1"
    assert parse_rewards(f"0.5*vlm@{url}#a/b") == [(0.5, "vlm", f"{url}#a/b")]
    (tmp_path / "j.yaml").write_text(f"url: {url}\nmodel: a/b\nanswer: number\nhigh: 5\n")
    assert absolute_rewards("vlm@j.yaml") == f"vlm@{tmp_path / 'j.yaml'}"
    assert [str(path) for path in reward_files("vlm@j.yaml")] == ["j.yaml"]
    assert reward_names(f"vlm@{url}#a/b,vlm@{url}#a/c") == ["vlm@b", "vlm@c"]
    assert VLM("j.yaml").settings.high == 5
    wrong = {
        f"vlm@{url}": "vlm@ADDRESS#MODEL",
        "vlm@none.yaml": "FILE.yaml",
        "vlm@http://me:HIDDEN@host/v1#m": "url must be without user",
        "url: x": "a file with url, model",
        f"url: {url}\nmodel: m\nhihg: 3": "a file with url, model",
        f"url: {url}\nmodel: m\nhigh: -1": "low must be below -1",
        f"url: {url}\nmodel: m\nquestion: '{{prompt'": "with names of fields in braces",
        f"url: {url}\nmodel: m\nanswer: maybe": "answer must be",
        "url: [": "is not YAML",
    }
    for text, message in wrong.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            parse_rewards(text if text.startswith("vlm@") else "vlm@bad.yaml")
        assert "HIDDEN" not in str(error.value)


@pytest.mark.slow
def test_a_run_trains_on_a_judge_and_refuses_another_question(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Server(bright) as server:
        judge_of(tmp_path, server.url)
        settings = (
            "train sd3 --source miniature --height 32 --width 32 --max_sequence_length 32 --rewards vlm@judge.yaml "
            "--train_prompts 2 --lora_rank 2 --group_size 2 --steps 2 --anchors 1 --trained_steps 1 --groups 1 "
            "--eval_images 2 --eval_steps 1 --iterations 1 --device cpu --quiet --out run"
        )
        assert main(settings.split()) == 0, capsys.readouterr().err
        judge_of(tmp_path, server.url, question="Is it bright?")
        assert main(["evaluate", "run"]) == 1
    assert "judge.yaml" in (found := capsys.readouterr().err) and "changed since" in found
