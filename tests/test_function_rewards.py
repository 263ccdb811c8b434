"""A Python function as a reward: it sees each prompt's record, its file belongs to the run, its faults are named."""

import json
import re
import sys

import pytest
import torch

from neighbor_grpo.cli import main
from neighbor_grpo.rewards.judges import Rewards, absolute_rewards, make_rewards, parse_rewards, reward_names
from neighbor_grpo.rewards.programs import Reward
from neighbor_grpo.rewards.remote import RemoteReward, RewardServer
from neighbor_grpo.runs.folder import read_sealed, seal
from neighbor_grpo.runs.plugins import LOADED
from neighbor_grpo.tasks.prompts import read_records

PICTURES, PROMPTS = torch.rand(2, 3, 8, 8), ["a", "b"]
FACTS = [{"want": 0.25, "objects": [{"class": "cat", "count": 2}]}, {"want": 0.75}]
FUNCTIONS = """
NUMBER = 3
def red(pictures, prompts, records):
    return [-abs(picture.getpixel((0, 0))[0] / 255 - record["want"])
            for picture, record in zip(pictures, records)]
def short(pictures, prompts, records): return [1.0]
def words(pictures, prompts, records): return ["good"] * len(pictures)
def none(pictures, prompts, records): return None
def imaginary(pictures, prompts, records): return [1j] * len(pictures)
def infinite(pictures, prompts, records): return [1.0, 1e39]
def broken(pictures, prompts, records): return [1 / 0 for _ in pictures]
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path / "mine.py"


def test_a_function_is_named_weighted_and_listed(file):
    assert parse_rewards("-2 * mine.py:red, function@mine.py:short,compressibility") == [
        (-2.0, "function", "mine.py:red"),
        (1.0, "function", "mine.py:short"),
        (1.0, "compressibility", None),
    ]
    assert reward_names("mine.py:red,mine.py:red,mine.py:short") == ["red", "red#2", "short"]
    assert absolute_rewards("2*mine.py:red,os.path:join,clip") == f"2*function@{file}:red,function@os.path:join,clip"
    (reward,), weights = make_rewards("2*mine.py:red")
    expected = [-abs(image[0, 0, 0] - fact["want"]) for image, fact in zip(PICTURES, FACTS)]
    torch.testing.assert_close(reward(PICTURES, PROMPTS, FACTS), torch.stack(expected), atol=0.002, rtol=0)
    assert weights == [2.0]


def test_records_reach_every_reward_also_a_remote_one(file):
    seen = []

    class Watching(Reward):
        def score_records(self, pictures, prompts, records):
            seen.append(records)
            records[0].clear()
            return [0.0] * len(pictures)

    rewards = Rewards([Watching(), *make_rewards("mine.py:red")[0], lambda pictures, prompts: [1.0, 2.0]])
    found = rewards(PICTURES, PROMPTS, FACTS)
    assert found.shape == (2, 3) and seen == [[{}, FACTS[1]]] and FACTS[0]["want"] == 0.25
    with RewardServer(Rewards(rewards.rewards[1:], [1.0, 0.5], total=True)) as server:
        remote = RemoteReward(server.url)(PICTURES, PROMPTS, FACTS)
    assert torch.equal(remote, found[:, 1] + 0.5 * found[:, 2])
    with pytest.raises(ValueError, match="records must be one for each of 2 prompts"):
        rewards(PICTURES, PROMPTS, FACTS[:1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other.py:red", "with a file that exists, got 'other.py:red'"),
        ("mine.py:blue", "a function that mine.py defines, got 'mine.py:blue'"),
        ("mine.py:NUMBER", "a function, got 'mine.py:NUMBER, a int'"),
        ("mine.py:", "FILE.py:FUNCTION"),
        ("nowhere.at.all:red", "nowhere.at.all, .* cannot be imported: ModuleNotFoundError"),
        ("mine.py:short", r"mine.py:short: rewards must be of shape \(2,\), one a picture, got 'shape \(1,\)'"),
        ("mine.py:words", r"mine.py:words: rewards must be real numbers, .* got .*good"),
        ("mine.py:none", "mine.py:none: rewards must be real numbers"),
        ("mine.py:imaginary", "mine.py:imaginary: rewards must be real numbers"),
        ("mine.py:infinite", "mine.py:infinite: rewards must be finite"),
        ("mine.py:broken", "mine.py:broken failed: ZeroDivisionError: division by zero"),
        ("mine.py:red", "mine.py:red failed: KeyError: 'want'"),
    ],
)
def test_what_is_wrong_is_said(name, message, file):
    with pytest.raises((ValueError, RuntimeError), match=message):
        make_rewards(name)[0][0](PICTURES, PROMPTS)


def test_a_prompt_that_comes_again_keeps_what_its_entries_agree_on(tmp_path):
    lines = [dict(prompt=" a  sign", ocr="STOP", id=1, in_it=[{"a": []}, {}]), "a cat"]
    lines += [dict(prompt="a sign", ocr="STOP", id=2, in_it=[{"a": []}, {}])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_records(tmp_path / "a.jsonl") == {"a sign": dict(ocr="STOP", in_it=[{"a": []}, {}]), "a cat": {}}
    (tmp_path / "a.csv").write_text('prompt,ocr\na sign,"A ""B"""\n')
    assert read_records(tmp_path / "a.csv") == {"a sign": dict(prompt="a sign", ocr='A "B"')}
    for text, reason in (('{"prompt": "a", "x": NaN}', "line 1: NaN"), ('{"prompt": "a", "x": 1, "x": 2}', "x twice")):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_records(tmp_path / "a.jsonl")


SMALL = (
    "train sd3 --source miniature --prompts p.jsonl --held_out p.csv --height 32 --width 32 --max_sequence_length 32 "
    "--rewards mine.py:red --lora_rank 2 --group_size 2 --steps 2 --anchors 1 --trained_steps 1 --groups 1 "
    "--eval_images 2 --eval_steps 1 --iterations 1 --device cpu --quiet --out run"
)


@pytest.mark.slow
def test_a_run_keeps_records_and_knows_its_function(file, tmp_path, monkeypatch, capsys):
    lines = [dict(prompt="a red circle", want=0.5), dict(prompt="a blue square", want=1)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "p.csv").write_text("caption,other\ntwo red circles,1\n")

    def ends(command, message):
        LOADED.clear()  # as in a new process
        sys.modules.pop("neighbor_grpo_plugin_mine", None)
        assert main(command.split()) == (1 if message else 0), capsys.readouterr().err
        found = capsys.readouterr().err
        assert re.search(message, found), found

    assert main([*SMALL.replace("--out run", "--out bad").split(), "--debug"]) == 1  # of the held-out prompt
    found = capsys.readouterr().err
    assert "mine.py:red failed: KeyError: 'want'" in found and f'File "{file}", line ' in found
    (tmp_path / "p.csv").write_text("caption,want\ntwo red circles,0.5\n")
    file.write_text(FUNCTIONS.replace('record["want"]', 'float(record["want"])'))
    ends(SMALL, "")
    kept = read_sealed(tmp_path / "run" / "prompts.json")["records"]
    assert kept["a blue square"]["want"] == 1 and kept["two red circles"] == dict(caption="two red circles", want="0.5")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ends("train --resume --iterations 2 --quiet --out ../run", "used with --plugin .*mine.py")
    ends("train --resume --iterations 2 --quiet --out ../run --plugin ../mine.py", "")
    ends("evaluate ../run --plugin ../mine.py", "")
    good = file.read_text()
    for text in (good + "\n", None):
        file.write_text(text) if text else file.unlink()
        for command in ("train --resume --iterations 3 --quiet --out ../run", "evaluate ../run"):
            ends(f"{command} --plugin ../mine.py", "content has changed" if text else "a Python file")
    file.write_text(good)
    path = tmp_path / "run" / "prompts.json"  # as it was before there were records
    old = {name: value for name, value in read_sealed(path).items() if name != "records"}
    path.write_text(json.dumps(seal(old)))
    ends("evaluate ../run --plugin ../mine.py", "KeyError: 'want'")
