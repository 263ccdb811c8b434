"""Prompt files: what a standard allows is read to the letter, and what has two meanings is refused with its line."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from neighbor_grpo.tasks.prompts import FORMATS, read_prompts

# Every character of Unicode but the halves of surrogate pairs and NUL, and those that readers trip over more often.
LETTERS = st.characters(blacklist_categories=("Cs",), blacklist_characters="\0")
LETTERS |= st.sampled_from(list("\"',;\t\\{}[]#:\u2028\u2029\x85\x0b\x0c\x1c\x1e\ufeff\u200b\u00a0é日𝄞") + ['""', ", "])
TEXTS = st.lists(st.lists(LETTERS, max_size=12).map("".join), min_size=1, max_size=6)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def spaced(text):
    "White space as one space."
    return " ".join(text.split())


def wanted(texts):
    "What a reader finds in texts: none twice, none empty."
    return [text for text in dict.fromkeys(map(spaced, texts)) if text]


def rfc4180(rows, end):
    "A table as the standard library writes it; before Python 3.13 it quotes no line breaks but its own by itself."
    broken = any(set("\r\n") & set(field) for row in rows for field in row if isinstance(field, str))
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_NONNUMERIC if broken else csv.QUOTE_MINIMAL
    csv.writer(file, lineterminator=end, quoting=quoting).writerows(rows)
    return file.getvalue()


WRITERS = {
    ".txt": lambda texts, end: end.join(texts),
    ".json": lambda texts, end: f"[{end}" + f",{end}".join(json.dumps(t, ensure_ascii=False) for t in texts) + "]",
    ".jsonl": lambda texts, end: end.join(json.dumps(dict(n=1, Prompt=t), ensure_ascii=False) for t in texts),
    ".csv": lambda texts, end: rfc4180([["n", "PROMPT"], *([i, text] for i, text in enumerate(texts))], end),
    ".tsv": lambda texts, end: end.join(["Caption\tn", *(f"{text}\t{i}" for i, text in enumerate(texts))]),
}


def test_there_is_a_writer_for_each_format():
    assert WRITERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("kind", WRITERS)
@QUICK
@given(texts=TEXTS, end=ENDS, last=st.booleans(), mark=st.booleans())
@example(texts=["\n0", "one\rmore"], end="\r", last=False, mark=False)
def test_what_is_written_is_read(kind, texts, end, last, mark, tmp_path):
    if kind in (".txt", ".tsv"):  # what these forms cannot hold
        texts = [text.replace("\t", " ").replace("\r", " ").replace("\n", " ").lstrip("\ufeff") for text in texts]
    path = tmp_path / f"prompts{kind}"
    text = "\ufeff" * mark + WRITERS[kind](texts, end) + end * last
    path.write_bytes(text.encode("utf-8"))
    if not text.startswith("\ufeff") or mark:
        if wanted(texts):
            assert read_prompts(path) == wanted(texts)
        else:
            with pytest.raises(ValueError, match="at least one prompt"):
                read_prompts(path)


@pytest.mark.parametrize("kind", WRITERS)
@QUICK
@given(data=st.binary(max_size=60) | TEXTS.map(lambda texts: "\n".join(texts).encode("utf-8")))
def test_anything_else_ends_in_a_message_with_the_file(kind, data, tmp_path):
    path = tmp_path / f"prompts{kind}"
    path.write_bytes(data)
    try:
        assert all(text == spaced(text) != "" for text in read_prompts(path))
    except ValueError as e:
        assert str(path) in str(e) and "\n" not in str(e).replace(str(path), "")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.csv",
            b"prompt\na cat\na red car, on a hill\n",
            "line 3 has 2 fields, the header 1; put a prompt with a comma",
        ),
        ("a.csv", b"n,prompt\n1,a cat\n\n2\n", "line 4 has 1 field, the header 2"),
        ("a.csv", b'prompt\r\n"a\r\ncat"\r\na 15" screen\r\n', "line 4: a quote inside a field"),
        (
            "a.csv",
            b'prompt\na cat\n"a dog\na bird\n',
            "line 3: a quote inside a field without quotes, or one that never",
        ),
        ("a.csv", b'prompt\n"a cat" and a dog\n', "line 2: a quote"),
        ("a.csv", b'n, prompt\n1, "a cat"\n', "line 2: a quote"),
        ("a.csv", b"prompt,Prompt\na cat,a dog\n", "line 2: not one text, alone or under prompt, caption, text"),
        ("a.tsv", b"prompt\ta\na cat\tb\na\tdog\tb\n", "line 3 has 3 fields, the header 2; a prompt cannot hold a tab"),
        ("a.txt", "a cat\r\na dog\ra café".encode("latin-1"), "line 3: byte 0xe9 is not UTF-8"),
        ("a.txt", "a cat".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        ("a.txt", b"a cat\na\0dog\n", "line 2: a NUL byte"),
        ("a.txt", b"a cat\n\xed\xa0\xbd\n", "line 2: byte 0xed is not UTF-8"),
        ("a.jsonl", b'"a cat"\n\n"\\ud83d"\n', r"line 3: '\\ud83d', which is not a character"),
        ("a.jsonl", b'"a cat"\n{"prompt": "a\\u0000"}\n', r"line 2: '\\x00', which is not a character"),
        ("a.jsonl", b'"a cat"\n{"prompt": \n', "line 2: Expecting value at column"),
        ("a.jsonl", b'{"prompt": "a cat", "prompt": "a dog"}\n', "line 1: not one text"),
        ("a.json", b'[\n"a cat",\n{"caption":\n 7}]\n', "line 3: not one text"),
        ("a.json", b'["a cat",\r\n"a dog",\r\n"\\udc00"]', r"line 3: '\\udc00', which is not a character"),
        ("a.json", b'["a cat"\n"a dog"]', "line 2 column 1"),
        ("a.json", b'{"prompt": "a cat"}', "a file with a list"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.json", b'[{"prompt": ' + b'{"a": [' * 50_000 + b"]}" * 50_000 + b"}]", "nested too deeply"),
        ("a.jsonl", b"[" * 200_000, "nested too deeply"),
    ],
)
def test_what_has_no_meaning_or_two_is_refused(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and len(str(caught.value)) < 600


def test_quotes_mean_nothing_without_quoting(tmp_path):
    rows = ["a cat", '"STOP" on a sign', '"unclosed words on a wall', "a dog"]
    (tmp_path / "a.tsv").write_text("Prompt\tCategory\n" + "".join(f"{row}\tx\n" for row in rows), encoding="utf-8")
    assert read_prompts(tmp_path / "a.tsv") == rows


@pytest.mark.parametrize("kind", WRITERS)
def test_fields_may_be_long(kind, tmp_path):
    long = ['say "yes", ' + "a" * 200_000, "a cat"]
    (tmp_path / f"A{kind.upper()}").write_text(WRITERS[kind](long, "\n"), encoding="utf-8", newline="")
    assert read_prompts(tmp_path / f"A{kind.upper()}") == long


def test_the_locale_of_the_machine_does_not_matter(tmp_path):
    (tmp_path / "a.txt").write_bytes("ein Käse\n日本\n".encode())
    script = f"import neighbor_grpo.tasks.prompts as p; print(ascii(p.read_prompts({str(tmp_path / 'a.txt')!r})))"
    environment = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == ascii(["ein Käse", "日本"]), done.stderr
