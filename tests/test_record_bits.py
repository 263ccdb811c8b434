"""The record of bits repeats itself, and notices what has changed."""

import json
from collections import Counter
from dataclasses import fields

import pytest

import record_bits
from neighbor_grpo.cli import brought_along, read_command
from neighbor_grpo.penalties import PENALTIES


def test_the_tool_repeats_itself_and_notices_a_learning_rate(tmp_path, capsys):
    "The check runs what the record says: the same, then with another rate in one case."
    record, only = tmp_path / "bits.json", ["--only", "^toy (neighbor|op|nft|tempflow --updates 2 --with weights)$"]
    assert record_bits.main([*only, "--record", str(record)]) == 0
    content = json.loads(record.read_text())
    weighed = "toy tempflow --updates 2 --with weights"
    assert list(content["cases"]) == ["toy neighbor", weighed, "toy op", "toy nft"]
    assert not any("refused" in case for case in content["cases"].values())
    assert list(content["cases"]["toy op"]["weights"]) == ["base", "memory", "policy"]
    assert record_bits.main(["--check", "--record", str(record)]) == 0
    assert capsys.readouterr().out == "0 of 4 cases differ, 0 of them as meant.\n"

    content["cases"]["toy op"]["arguments"] += " --lr 0.00101"
    record.write_text(json.dumps(content))
    assert record_bits.main(["--check", "--record", str(record)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("toy op: rewards, metrics, weights differ, by up to ")
    assert last == "1 of 4 cases differ, 0 of them as meant."


def test_each_case_has_a_name_of_its_own():
    "And no setting of an algorithm is left out: one without a value to try is a KeyError."
    names = Counter(map(record_bits.name_of, record_bits.command_lines()))
    assert max(names.values()) == 1
    for name, settings in {**record_bits.ALGORITHMS, **record_bits.MODIFIERS}.items():
        tried = {setting for setting, _ in record_bits.values(settings)}
        assert tried == {field.name for field in fields(settings)} - {"algorithm"}, name


def test_each_modifier_is_tried_around_each_algorithm():
    "Where an algorithm brings some along, they stay."
    for name, algorithm in record_bits.ALGORITHMS.items():
        said = " ".join(record_bits.modified(name, algorithm))
        assert all(modifier in said for modifier in record_bits.MODIFIERS)
    assert "--with chunks guard replay" in record_bits.modified("op", record_bits.ALGORITHMS["op"])


def test_what_is_tried_together_is_allowed():
    "A refusal in the record would guard nothing."
    for name, lines in record_bits.TOGETHER.items():
        for line in lines:
            read_command(f"{record_bits.TOY} --algorithm {name} {line}".split())


def test_the_record_holds_the_catalogue():
    "Algorithms on toy, digits and scenes, modifiers and penalties, not refused: `python tools/record_bits.py --add`."
    record, cases = record_bits.read(record_bits.RECORD)
    held = {"modifiers": set(), "penalties": set()}
    for name, words in cases.items():
        if "refused" in record["cases"][name]:
            continue
        first, *options = " ".join(words).split(" --")
        said = dict(option.split(" ", 1) for option in options)
        algorithm = said.get("algorithm", "neighbor")
        held.setdefault(first.split()[0], set()).add(algorithm)
        held["modifiers"] |= {*said.get("with", "").split(), *brought_along(algorithm)}
        held["penalties"] |= PENALTIES.keys() & said.keys()
    wanted = {"modifiers": record_bits.MODIFIERS, "penalties": PENALTIES}
    wanted |= dict.fromkeys(("toy", "digits", "scenes"), record_bits.ALGORITHMS)
    missing = {kind: sorted(names.keys() - held[kind]) for kind, names in wanted.items()}
    assert not any(missing.values()), missing


def test_what_is_added_leaves_the_rest_as_it_is(tmp_path, capsys):
    "Even a case that is said in older words, or differs by now; nothing is added to another machine's record."
    path, add = tmp_path / "bits.json", ["--add", "--only", "^toy (neighbor|flow --updates 2 --with guard)$"]
    old = {"toy flow --guard true": dict(arguments=f"{record_bits.TOY} --algorithm flow --updates 2 --guard true")}
    path.write_text(json.dumps({"made": record_bits.maker(), "cases": old}))
    assert record_bits.main([*add, "--record", str(path)]) == 0
    cases = json.loads(path.read_text())["cases"]
    assert list(cases) == ["toy flow --guard true", "toy neighbor"] and old.items() <= cases.items()
    assert "rewards" in cases["toy neighbor"]

    path.write_text(json.dumps({"made": {}, "cases": {}}))
    with pytest.raises(SystemExit):
        record_bits.main([*add, "--record", str(path)])
    assert "write the whole record anew" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("words", "now"),
    [
        ("toy --algorithm flow --sigma 3", "toy --algorithm flow --sigma 3"),
        ("toy --algorithm flow --guard true --chunk 3", "toy --with chunks guard --algorithm flow --chunk 3"),
        ("toy --algorithm neighbor --train_step rollout", "toy --algorithm neighbor --leap_from rollout"),
        ("toy --algorithm neighbor --old_anchor stored", "toy --algorithm neighbor --leap_from stored"),
        ("toy --algorithm op --replay 1", "toy --with chunks replay --algorithm op --replay 1"),
        ("toy --algorithm vgrpo --chunk 1", "toy --algorithm vgrpo --one_ratio false"),
        (
            "toy --algorithm mix --advantage_power 0.5",
            "toy --with slas --advantage_power 0.5 --advantage_scale group --algorithm mix",
        ),
        (
            "toy --algorithm tempflow --time_weight equal",
            "toy --with weights --algorithm tempflow --time_weight equal --weigh_noise false",
        ),
        ("toy --algorithm tempflow --time_weight none", "toy --algorithm tempflow --weigh_noise false"),
    ],
)
def test_the_words_of_an_older_record_are_said_as_today(words, now, tmp_path):
    "Only where neither the record nor the case says that its words are of today."
    assert record_bits.today(words.split()) == now.split()
    mark, path = {"words": "modifiers"}, tmp_path / "bits.json"
    for whole, one, expected in (({}, {}, now), (mark, {}, words), ({}, mark, words)):
        path.write_text(json.dumps({"made": {}, **whole, "cases": {"a case": {"arguments": words, **one}}}))
        assert record_bits.read(path)[1] == {"a case": expected.split()}
