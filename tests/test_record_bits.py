"""The record of bits repeats itself, and notices what has changed."""

import json
from collections import Counter

import record_bits


def test_the_tool_repeats_itself_and_notices_a_learning_rate(tmp_path, capsys):
    "The check runs what the record says: the same, then with another rate in one case."
    record, only = tmp_path / "bits.json", ["--only", "^toy (neighbor|op|nft)$"]
    assert record_bits.main([*only, "--record", str(record)]) == 0
    content = json.loads(record.read_text())
    assert list(content["cases"]) == ["toy neighbor", "toy op", "toy nft"]
    assert list(content["cases"]["toy op"]["weights"]) == ["base", "memory", "policy"]
    assert record_bits.main(["--check", "--record", str(record)]) == 0
    assert capsys.readouterr().out == "0 of 3 cases differ.\n"

    content["cases"]["toy op"]["arguments"] += " --lr 0.00101"
    record.write_text(json.dumps(content))
    assert record_bits.main(["--check", "--record", str(record)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("toy op: rewards, metrics, weights differ, by up to ")
    assert last == "1 of 3 cases differ."


def test_each_case_has_a_name_of_its_own():
    "And no setting of an algorithm is left out: one without a value to try is a KeyError."
    names = Counter(map(record_bits.name_of, record_bits.command_lines()))
    assert max(names.values()) == 1
    for algorithm, settings in record_bits.ALGORITHMS.items():
        tried = {name for name, _ in record_bits.values(settings)}
        assert tried == settings.__dataclass_fields__.keys(), algorithm


def result(**changed):
    "Of a case, with columns of one number."
    same = dict(rewards={"reward_mean": ["0x1p+0"]}, metrics={"entropy": [None]}, weights={"policy": "ab"})
    return {kind: same[kind] | changed.get(kind, {}) for kind in same}


def test_what_differs_is_named():
    "Each kind by itself; a figure that is missing differs without bound, and so does one that is new."
    assert record_bits.difference(result(), result()) == ""
    assert record_bits.difference(result(), result(weights={"policy": "cd"})) == "weights differ"
    other = result(rewards={"reward_mean": ["0x1p+1"]})
    assert record_bits.difference(result(), other) == "rewards differ, by up to 0.5: reward_mean"
    known = result(metrics={"entropy": ["0x1p+0"]})
    assert record_bits.difference(result(), known) == "metrics differ, by up to inf: entropy"
    assert record_bits.difference(result(), dict(refused="no")) == "refused: no"
    assert record_bits.difference(dict(refused="no"), result()) == "refused: no longer"
    assert record_bits.difference(dict(refused="no"), dict(refused="never")) == ""


def test_a_number_comes_back_to_the_bit():
    "Whatever its last digits are."
    for value in (0.0, -0.0, 1.0, 16.0, 0.1, -1 / 3, 5e-324, 1.5e300):
        assert record_bits.number(record_bits.exact(value)).hex() == value.hex()


def test_renamed_options_are_said_as_today(monkeypatch):
    "Whole words only."
    monkeypatch.setattr(record_bits, "RENAMED", {"--guard true": "--with guard", "--p": "--power"})
    words = "toy --guard true --p 2 --pretrain_steps 3".split()
    assert record_bits.today(words) == "toy --with guard --power 2 --pretrain_steps 3".split()
