"""What the library computes, to the bit: every algorithm, every option of it, on small tasks.

`python tools/record_bits.py` writes the record, `tests/bits.json`. `--check` runs what the record holds and says what
differs. `--add` runs what the record does not hold yet and leaves the rest as it is. Bits are the same only on one
processor with one version of PyTorch, so this is no test: make the record, change the code, check it on the same
machine. Everything goes through the command line, in one process.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
import matplotlib.pyplot  # noqa: F401  looks at savefig, which is patched below
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from neighbor_grpo.cli import brought_along
from neighbor_grpo.cli import main as neighbor_grpo
from neighbor_grpo.rivals.catalogue import ALGORITHMS, MODIFIERS, own_fields

RECORD = Path(__file__).resolve().parent.parent / "tests" / "bits.json"

# The tasks, so small that a case takes a fraction of a second, or a few seconds on images.
TOY = "toy --iterations 5 --groups 2 --group_size 6 --pretrain_steps 20 --eval_samples 64 --eval_every 5"
DIGITS = "digits --iterations 2 --groups 2 --group_size 4 --pretrain_steps 20 --eval_samples 64"
SCENES = "scenes --iterations 1 --groups 2 --group_size 4 --eval_images 48 --eval_steps 1"
LARGE = (
    "sd3 --source miniature --height 32 --width 32 --max_sequence_length 10 --lora_rank 4 --device cpu"
    " --iterations 1 --groups 2 --group_size 4 --eval_images 4 --eval_steps 2"
)

# Values of each setting of an algorithm or a modifier that is a number, besides its default. A setting that is missing
# here stops the tool.
NUMBERS = {
    "group_size": "5",
    "steps": "27",
    "shift": "1 3",
    "trained_steps": "2",
    "clip_range": "0.05",
    "kl_threshold": "0.001",
    "advantage_power": "0",
    "chunk": "0 1",
    "scouts": "8",
    "scout_steps": "3",
    "sigma": "0.6",
    "anchors": "2",
    "temperature": "0.5",
    "p": "2",
    "noise_level": "0.5",
    "advantage_clip": "1",
    "window_every": "1",
    "split_every": "1",
    "split_scale": "1",
    "window_stride": "2",
    "tail_ratio": "0.5",
    "replay": "1",
    "memory_size": "2",
    "memory_age": "1",
    "beta": "0.5",
    "soft_clip": "1",
    "least_time": "0.4",
    "time_power": "2",
    "error_power": "1",
    "weight_power": "0",
    "multiplier": "10",
}
# What a setting or a modifier needs beside it, to be allowed or to have an effect.
BESIDE = {
    "previews": "--scouts 12 --shared_noise false",
    "scouts": "--shared_noise false",
    "scout_steps": "--scouts 8 --shared_noise false",
    "window_moves": "--window_every 1",
    "window_stride": "--window_every 1",
}
# Modifiers that refuse a second update.
ONCE = {"lean"}
# Options that act on one another, by algorithm.
TOGETHER = {
    "neighbor": (
        "--leap_from rollout --method euler",
        "--leap_from rollout --method ab2",
        "--with weights --leap_from rollout",
        "--with guard --leap_from stored",
        "--with guard chunks",
        "--hold_weight 0.1 --kl_weight 0.1 --train_where last --micro_batch 5",
        "--with previews slas --scouts 8 --scout_steps 3",
        "--grid scheduler --shift 3",
    ),
    "flow": (
        "--with guard chunks weights --chunk 3 --time_weight noise",
        "--hold_weight 0.1 --train_where last --micro_batch 5",
    ),
    "dance": ("--with chunks weights --chunk 7", "--grid scheduler --shift 3"),
    "mix": (
        "--with weights --window_every 1 --tail_ratio 0.5 --tail_method dpm++2m",
        "--with chunks --window_moves random",
    ),
    "tempflow": ("--micro_batch 1", "--with guard --kl_weight 0.1"),
    "branch": ("--split_every 1 --trained_steps 4 --train_where last", "--with guard --kl_weight 0.1 --micro_batch 5"),
    "op": ("--with chunks guard replay --chunk 1", "--hold_weight 0.1 --kl_weight 0.1 --micro_batch 15"),
    "nft": ("--group_noise true --kl_weight 0.1 --ema 0.5 --collector average",),
    "vgrpo": ("--one_ratio false --micro_batch 8", "--group_noise false --method heun"),
    "tmpo": ("--match cross --standardise false", "--match cross --beta 15"),
    "awm": ("--group_noise true --kl_weight 0.1 --ema 0.5 --collector average",),
    "dgpo": ("--micro_batch 24", "--frozen_reference false --kl_weight 0.1"),
    "ram": ("--kl_weight 0.1 --micro_batch 8",),
    "fdfo": ("--hold_weight 0.1 --train_where first --trained_steps 4", "--with previews slas --scouts 8"),
    "dppo": ("--with chunks mask --chunk 3", "--norm_weight 0.1 --kl_weight 0.1 --micro_batch 12"),
}
# The loop's own, for every algorithm.
LOOP = (
    "--updates 3",
    "--updates 2 --kl_weight 0.1",
    "--updates 2 --hold_weight 0.1",
    "--updates 2 --hold_weight 0.1 --train_where first",
    "--updates 2 --norm_weight 0.1",
    "--updates 2 --micro_batch 12",
    "--updates 2 --micro_batch 30",
    "--ema 0.5",
    "--ema 0.5 --collector average --updates 2",
    "--shuffle true",
    "--lr_decay 10",
    "--weight_decay 0.1",
    "--max_grad_norm 0.1",
    "--seed 1",
)
SEVERAL = "--rewards compressibility,0.5*compressibility"
HELD = "--train_where first --trained_steps 4 --hold_weight 0.03"  # as the scenes have it for Neighbor GRPO
IMAGES = (
    f"{DIGITS} --reward ink",
    *(f"{SCENES} --algorithm {name}" for name in ALGORITHMS),
    f"{SCENES} --algorithm neighbor --hold_weight 0",
    *(f"{SCENES} --algorithm {name} {HELD}" for name in ("flow", "dance")),
    f"{LARGE} --updates 2",
    f"{LARGE} --updates 2 --precision float32",
    f"{LARGE} --updates 2 --lora_rank 0 --lora_alpha 0",
    f"{LARGE} {SEVERAL}",
    f"{LARGE} {SEVERAL} --combine rewards --with slas --advantage_power 0",
    f"{LARGE} {SEVERAL} --algorithm flow",
)

# How the words of a case without a mark are said today: it was made when these settings were the algorithms' own.
MODIFIER = {
    "advantage_power": "slas",
    "advantage_scale": "slas",
    "chunk": "chunks",
    "guard": "guard",
    "time_weight": "weights",
    "scouts": "previews",
    "scout_steps": "previews",
}
RENAMED = {"train_step rollout": "leap_from rollout", "old_anchor stored": "leap_from stored"}


def written(value):
    "A value as it stands on the command line."
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"{value:g}"


def values(settings):
    "Each setting of an algorithm or a modifier with each value that is not its default."
    hints = get_type_hints(settings)
    for field in own_fields(settings):
        hint, name = hints[field.name], field.name
        choices = get_args(hint) if get_origin(hint) is Literal else ("false", "true") if hint is bool else None
        for value in choices or NUMBERS[name].split():
            if value != written(field.default):
                yield name, value


def beside(name, *settings):
    "What has to be said beside a setting, so far as an algorithm and its modifiers know it."
    words = BESIDE.get(name, "").split()
    known = {field.name for cls in settings for field in own_fields(cls)}
    return "".join(f" {word} {value}" for word, value in zip(words[::2], words[1::2]) if word[2:] in known)


def modified(name, algorithm):
    "What the command line says of each modifier around an algorithm, the settings one by one; some do not fit."
    along = brought_along(name)
    for other, modifier in MODIFIERS.items():
        around = f"--with {' '.join(sorted({*along, other}))}"
        if other not in along:
            yield around + beside(other, algorithm, modifier)
        for setting, value in values(modifier):
            yield f"{around} --{setting} {value}{beside(setting, algorithm, modifier)}"


def command_lines():
    "All cases. With a second update the ratio leaves 1, so that all that an option does to it is seen."
    for name, algorithm in ALGORITHMS.items():
        toy = f"{TOY} --algorithm {name}"
        yield from (toy, f"{DIGITS} --algorithm {name}", *(f"{toy} {words}" for words in LOOP))
        for setting, value in values(algorithm):
            yield f"{toy} --updates 2 --{setting} {value}{beside(setting, algorithm)}"
        for words in modified(name, algorithm):
            yield f"{toy} {words}" if ONCE & set(words.split()) else f"{toy} --updates 2 {words}"
        yield from (f"{toy} --updates 2 {words}" for words in TOGETHER.get(name, ()))
    yield from IMAGES


def name_of(line):
    "What a command line says beyond its task's."
    task = next(task for task in (TOY, DIGITS, SCENES, LARGE) if line.startswith(task))
    return f"{task.split()[0]}{line[len(task) :]}".replace(" --algorithm", "")


# Which differences from the record are meant: of which cases, which, and why.
MEANT = [
    (
        r"digits (flow|dance|mix|tempflow|op|tmpo)|toy (flow|dance|mix|tempflow|op|tmpo).*--kl_weight",
        r".*differ, by up to .*e-0",
        "a divergence is a distance of velocities",
    ),
    (r".*--hold_weight", r"metrics differ, by up to \S+e-1\d: nfe_theta", "added up in another order"),
    (
        r".*--micro_batch",
        r"metrics differ, by up to \S+: (clip_fraction|entropy)(, entropy)?(, nfe_theta)?$",
        "a state counts once, also in a micro-batch shorter than the others",
    ),
    (
        r"toy fdfo --updates 2 --with gdpo$",
        r"rewards, metrics, weights differ",
        "each reward is standardized, as around the others",
    ),
    (
        r"(digits|toy) tmpo",
        r".*metrics.* differ, by up to inf: entropy",
        "an algorithm without a ratio reports no entropy",
    ),
    (r".*--rescale", r"refused", "no longer a setting: a factor of the loss"),
    (r"toy nft .*--clip_range", r"refused", "no longer a setting: there is nothing to clip"),
    (r"toy vgrpo .*--chunk 2", r".*", "no longer a setting: one ratio for all times, or one for each"),
    (
        r"sd3|scenes",
        r"rewards differ, by up to inf: (held-out (kilobytes|saturation|sharpness|velocity_norm)(, )?){4}$",
        "evaluations of images show signs of hacking as well",
    ),
]


def meant(name, what):
    "Why a case is meant to differ in this way; empty: it is not."
    return next((why for case, kind, why in MEANT if re.match(case, name) and re.match(kind, what)), "")


def today(arguments):
    "The words of the record as they are said today."
    first, *pairs = " ".join(arguments).split("--")
    given = {}
    for pair in pairs:
        name, _, value = RENAMED.get(pair.strip(), pair.strip()).partition(" ")
        given[name] = value
    algorithm = given.get("algorithm")
    if algorithm == "vgrpo" and given.pop("chunk", "0") == "1":
        given["one_ratio"] = "false"
    if algorithm == "tempflow" and given.get("time_weight"):
        given["weigh_noise"] = "false"
    if given.get("time_weight") == "none":
        del given["time_weight"]
    modifiers = {MODIFIER[name] for name in given if name in MODIFIER} | (
        {"chunks", "replay"} if algorithm == "op" else set()
    )
    if "slas" in modifiers:
        given = {"advantage_power": "0", "advantage_scale": "group"} | given
    given.pop("guard", None)
    words = [*first.split(), *(["--with", *sorted(modifiers)] if modifiers else [])]
    for name, value in given.items():
        words += [f"--{name}", *value.split()]
    return words


def exact(value):
    "A number without rounding, as JSON takes it: hexadecimal, without the zeros at its end."
    return re.sub(r"\.?0+p", "p", value.hex()) if isinstance(value, float) else value


def columns(path):
    "The rows of a file by name: all that a row has but the time that it took."
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: [exact(row[name]) for row in rows] for name in rows[0] if name not in ("seconds", "iteration")}


def digest(path):
    "SHA-256 of the tensors in a file: names, types, shapes, bytes."
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_folder(folder):
    "What a run has left: rewards, other metrics, weights of the newest checkpoint and of networks beside it."
    metrics, held_out = columns(folder / "metrics.jsonl"), columns(folder / "eval.jsonl")
    rewards = {name: metrics.pop(name) for name in ("reward_mean", "reward_std")}
    rewards |= {f"held-out {name}": column for name, column in held_out.items()}
    newest = max((folder / "checkpoints").glob("[0-9]*"))
    files = {path.stem: path for path in [*folder.glob("*.safetensors"), *newest.glob("*.safetensors")]}
    files.pop("optimizer")
    return dict(rewards=rewards, metrics=metrics, weights={name: digest(files[name]) for name in sorted(files)})


def run_case(arguments, networks):
    "Train as the arguments say, and read what is left; `refused` if they are not allowed, at once or on the way."
    with tempfile.TemporaryDirectory() as parent, contextlib.redirect_stdout(io.StringIO()):
        folder, said = Path(parent) / "run", io.StringIO()
        if networks.is_dir():
            shutil.copytree(networks, folder)
        torch.manual_seed(0)
        with contextlib.redirect_stderr(said):
            status = neighbor_grpo(["train", *arguments, "--quiet", "--out", str(folder)])
        if status and (not (folder / "metrics.jsonl").exists() or " must be " in said.getvalue()):
            return dict(refused=said.getvalue().strip())
        if status:
            raise RuntimeError(f"{' '.join(arguments)}: {said.getvalue().strip()}")
        if arguments[0] == "digits" and not networks.exists():  # pretraining them takes longer than a case
            networks.mkdir()
            for path in folder.glob("*.safetensors"):
                shutil.copy(path, networks)
        return read_folder(folder)


def run_cases(cases, progress=True):
    "The results by name. Nothing is drawn, and nobody waits for the disk."
    torch.set_num_threads(1)
    results, show = {}, progress and sys.stderr.isatty()
    with tempfile.TemporaryDirectory() as kept, patch.object(Figure, "savefig"), patch("os.fsync"):
        for number, (name, arguments) in enumerate(cases.items(), 1):
            if show:
                print(f"\r\033[K{number}/{len(cases)} {name}"[:100], end="", file=sys.stderr, flush=True)
            results[name] = run_case(arguments, Path(kept) / arguments[0])
    print("\r\033[K" * show, end="", file=sys.stderr)
    return results


def number(value):
    "The inverse of `exact`."
    return float.fromhex(value) if isinstance(value, str) else value


def apart(old, new):
    "The relative difference of two numbers; infinite where one is none."
    if old is None or new is None:
        return 0.0 if old is new else math.inf
    return abs(old - new) / max(abs(old), abs(new)) if old != new else 0.0


def relative(old, new):
    "The largest relative difference of two columns; infinite where one is missing or longer."
    if old is None or new is None or len(old) != len(new):
        return math.inf
    return max(apart(number(a), number(b)) for a, b in zip(old, new))


def difference(old, new):
    "What differs between two results of a case, in one line; empty: nothing."
    if "refused" in old or "refused" in new:
        return "" if "refused" in old and "refused" in new else "refused: " + new.get("refused", "no longer")
    kinds = [kind for kind in ("rewards", "metrics", "weights") if old[kind] != new[kind]]
    found = {}
    for kind in ("rewards", "metrics"):
        names = old[kind].keys() | new[kind].keys()
        found |= {name: relative(old[kind].get(name), new[kind].get(name)) for name in sorted(names)}
    changed = sorted(name for name in found if found[name])
    largest = f", by up to {max(found.values()):.2g}: {', '.join(changed)}" if changed else ""
    return ", ".join(kinds) + " differ" + largest if kinds else ""


def maker():
    "Whose bits these are."
    about = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    processor = f"{model[1] if model else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
    return dict(processor=processor, torch=torch.__version__, python=platform.python_version(), threads=1)


def write(path, cases, results, older=None):
    "One line a case, those of an older record first, as they are."
    said = {name: dict(arguments=" ".join(words), words="modifiers", **results[name]) for name, words in cases.items()}
    said = (older["cases"] if older else {}) | said
    lines = (f"{json.dumps(name)}: {json.dumps(case, separators=(',', ':'))}" for name, case in said.items())
    body = ",\n".join(lines)
    path.write_text(f'{{"made": {json.dumps(maker())},\n"cases": {{\n{body}\n}}}}\n', encoding="utf-8")


def read(path):
    "A record, with its cases said as today; a mark says that a case, or a whole record, is said so already."
    record = json.loads(path.read_text(encoding="utf-8"))
    marked = {name: "words" in record | case for name, case in record["cases"].items()}
    cases = {name: case["arguments"].split() for name, case in record["cases"].items()}
    return record, {name: words if marked[name] else today(words) for name, words in cases.items()}


def unrecorded(held):
    "The cases of today that are not held, under the same name or as the same words in another order."
    options = {frozenset(" ".join(words).split(" --")) for words in held.values()}
    cases = {name_of(line): line.split() for line in command_lines()}
    new = {name for name, words in cases.items() if frozenset(" ".join(words).split(" --")) not in options}
    return {name: words for name, words in cases.items() if name in new - held.keys()}


def check(record, cases):
    "Run the cases again; print what differs; how many do."
    if record["made"] != maker():
        print(f"The record is of {record['made']}, this is {maker()}: bits may differ for that reason alone.")
    results = run_cases(cases)
    found = {name: difference(record["cases"][name], results[name]) for name in cases}
    different = {name: what for name, what in found.items() if what}
    for name, what in different.items():
        print(f"{name}: {what}" + (f" (meant: {why})" if (why := meant(name, what)) else ""))
    known = sum(bool(meant(name, what)) for name, what in different.items())
    print(f"{len(different)} of {len(found)} cases differ, {known} of them as meant.")
    return len(different) - known


def main(argv=None):
    "Write the record, or check it; the exit status."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the record, instead of writing it")
    mode.add_argument("--add", action="store_true", help="write only what the record does not hold")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name has a match")
    parser.add_argument("--record", type=Path, default=RECORD, help="another file")
    options = parser.parse_args(argv)
    record, cases = read(options.record) if options.check or options.add else (None, {})
    if options.add and record["made"] != maker():
        parser.error(f"the record is of {record['made']}, this is {maker()}: write the whole record anew")
    if not options.check:
        cases = unrecorded(cases)
    cases = {name: words for name, words in cases.items() if re.search(options.only, name)}
    if not options.check:
        write(options.record, cases, run_cases(cases), record)
        return 0
    return int(check(record, cases) > 0)


if __name__ == "__main__":
    sys.exit(main())
