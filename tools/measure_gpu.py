r"""Measure a GPU with random weights, in nine minutes: one table, with JSON beside it.

    python tools/measure_gpu.py --out nbs/results/gpu

The parts, the most valuable first; `--list` prints them with their limits:

- a tiny SD3 learns and resumes bit for bit on this device;
- SD3.5 Medium at 512 and 1024 px, rank 32, bfloat16, guidance 4.5: five algorithms at their papers' settings, plain,
  and with gradient checkpointing;
- Neighbor GRPO with fewer evaluations (six steps, two anchors, two trained steps): SD3.5 Medium, also
  compiled, and FLUX.2 klein, SANA, Z-Image, Wan and Qwen-Image at their full size;
- the recipe for 24 GB, its judges' memory included, while PyTorch gets no more than a card of 24 GB has;
- the recipe for FLUX.1-dev at 720 px;
- the largest micro-batch, with and without checkpointing.

Each part runs in a process of its own, with a time limit: what runs out of memory, crashes or hangs takes no other part
along. What does not fit into `--minutes` is skipped. Every result is written as it comes; the same command goes on with
what is missing. `--device cpu --tiny` runs all parts at a tiny size, to try the command out.

Nothing is downloaded: no weights, no tokenizers. A machine without a network needs PyTorch with CUDA and what the
library imports: diffusers, transformers, peft, accelerate, safetensors, scikit-learn, scipy, matplotlib, numpy, pillow,
requests, tenacity, pyyaml, tqdm, filelock. What it lacks can be brought along as wheels, without an installation:

    pip download --no-deps -d wheels diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 \
        importlib-metadata==8.7.0 tenacity
    pip install --no-index --no-deps --target site wheels/*.whl         # on the machine
    PYTHONPATH=site python tools/measure_gpu.py --out nbs/results/gpu
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 2.0  # seconds before its limit at which a part should be ready


# --- what the parts do; each runs in a process of its own, and only there are large libraries imported ---


def judged_latents(latents):
    "`(N, C, h, w) -> (N,)`: minus the kilobytes of each one's first three channels as a JPEG."
    from neighbor_grpo.rewards.programs import Compressibility

    return Compressibility()((latents[:, :3] / 6 + 0.5).clamp(0, 1), [""] * len(latents))


def fixed_scores(task, velocity, count=16):
    "`(count,)` scores of samples from the same noise, whatever the velocity."
    import torch

    from neighbor_grpo.flow import randn, seeded, time_grid
    from neighbor_grpo.solvers import solve

    noise, cond = randn((count, *task.shape), seeded(0, 9), task.device), task.conditions(torch.zeros(count))
    with torch.no_grad():
        return judged_latents(solve(velocity, noise, time_grid(4, task.shift), cond).x[-1])


def tiny_trainer(device, iterations, pixels, folder, resume=False):
    "A run of Neighbor GRPO on a tiny SD3 with random weights."
    from neighbor_grpo.lab.cost import RandomTask
    from neighbor_grpo.neighbor import NeighborGRPO
    from neighbor_grpo.runs.trainer import Trainer
    from neighbor_grpo.training import TrainSettings

    algorithm = NeighborGRPO(steps=4, trained_steps=2, anchors=12, sigma=0.6, shift=None)
    settings = TrainSettings(
        iterations=iterations, groups=2, lr=3e-3, eval_every=iterations, checkpoint_every=iterations
    )
    task = RandomTask("tiny", pixels, pixels, device=device, judge=judged_latents)
    return Trainer(task, algorithm, settings, folder, resume)


def everything(trainer):
    "All tensors that a run ends with, and its rows but for the seconds."
    from neighbor_grpo.runs.state import flat_optimizer

    tensors = {**trainer.policy.state_dict(), **flat_optimizer(trainer.optimizer)}
    return tensors, [{key: value for key, value in row.items() if key != "seconds"} for row in trainer.rows]


def same_bits(one, other):
    "Whether two runs ended with the same bits."
    import torch

    (a, rows), (b, other_rows) = everything(one), everything(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and rows == other_rows


def learns(before, after):
    "Mean rise of paired scores, its standard error, and whether it is above three of them."
    rise = after - before
    mean, error = rise.mean().item(), rise.std().item() / len(rise) ** 0.5
    return mean, error, mean > 3 * error


def check(device, seconds, report, known, iterations, pixels):
    "A tiny SD3 learns, and a run that was cut off ends with the bits of one that was not."
    with tempfile.TemporaryDirectory() as name:
        start = lambda run, **more: tiny_trainer(device, iterations, pixels, Path(name) / run, **more)
        whole, cut = start("whole"), start("cut")
        before = fixed_scores(whole.task, whole.policy)
        whole.run(progress=False)
        rise, error, learned = learns(before, fixed_scores(whole.task, whole.policy))
        values = dict(rise=rise, error=error, learned=learned)
        note = f"compressibility rose by {rise:.4f} +- {error:.4f} kB in {iterations} iterations"
        note += ": it learns" if learned else ", which is not clear"
        report(note=note, values=values)
        cut.evaluate()  # as `run` does first
        for _ in range(iterations // 2):  # then it is gone, with what it did after its last checkpoint
            cut.step()
            if cut.iteration == iterations // 3:
                cut.save()
        resumed = start("cut", resume=True).run(progress=False)
        values["identical"] = same_bits(whole, resumed)
        note += f"; cut off after {iterations // 2} and resumed from {iterations // 3}: "
        if not values["identical"]:
            values["repeatable"] = same_bits(whole, start("again").run(progress=False))
        again = {None: "the same bits", True: "other bits", False: "other bits, as the same run twice has them"}
        return dict(note=note + again[values.get("repeatable")], values=values)


def algorithms(small):
    "At their papers' settings, Neighbor GRPO first; or with few candidates and steps."
    from neighbor_grpo.neighbor import NeighborGRPO
    from neighbor_grpo.rivals.forward import DiffusionNFT
    from neighbor_grpo.rivals.gaussian import DanceGRPO, FlowGRPO
    from neighbor_grpo.rivals.mixed import TempFlowGRPO

    kinds = (NeighborGRPO, TempFlowGRPO, FlowGRPO, DiffusionNFT, DanceGRPO)
    if not small:
        return [kind() for kind in kinds]
    return [kind(group_size=4, steps=3, trained_steps=1) for kind in kinds]


def measured(device, seconds, report, known, model, pixels, micro_batch, small=False, iterations=3, **settings):
    "Seconds and memory of an iteration of each algorithm that has no row yet."
    from neighbor_grpo.lab.cost import measure_model
    from neighbor_grpo.models.pipeline import PipelineSettings

    missing = [a for a in algorithms(small) if type(a).__name__ not in known]
    settings = PipelineSettings(guidance_scale=4.5, train_guidance_scale=4.5, batch=24, **settings)
    rows = measure_model(
        model,
        missing,
        pixels,
        pixels,
        settings,
        iterations,
        micro_batch=micro_batch,
        device=device,
        progress=False,
        seconds=seconds,
        decode_batch=4,
        report=lambda rows: report(rows=rows),
    )
    left = len(missing) - len(rows)
    return dict(rows=rows) | (dict(status="partly done", note=f"no time left for {left}") if left else {})


def neighbor(device, seconds, report, known, model, height, width, guidance, micro_batch, decode_batch=0, **settings):
    "Seconds and memory of an iteration of Neighbor GRPO with fewer evaluations, on one model."
    from neighbor_grpo.lab.cost import measure_model
    from neighbor_grpo.models.pipeline import PipelineSettings
    from neighbor_grpo.neighbor import NeighborGRPO

    settings = PipelineSettings(guidance_scale=guidance, train_guidance_scale=guidance, batch=24, **settings)
    rest = dict(micro_batch=micro_batch, decode_batch=decode_batch, device=device, progress=False, seconds=seconds)
    rows = measure_model(model, [NeighborGRPO(**FEWER)], height, width, settings, 2, **rest)
    return dict(rows=rows) | ({} if rows else dict(status="out of time"))


def random_judge(device, tiny):
    "`(N, 3, H, W) -> (N,)`: two CLIP ViT-H/14 with random float32 weights, in place of HPSv2.1 and PickScore."
    import torch
    from torch.nn import functional as F
    from transformers import CLIPConfig, CLIPModel

    from neighbor_grpo.lab.cost import random_network

    text = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    vision = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14)
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1) if tiny else {}
    config = CLIPConfig(text_config=text | small, vision_config=vision | small, projection_dim=1024)
    models = [random_network(CLIPModel, dict(config=config), device, "float32").eval() for _ in range(2)]

    @torch.no_grad()
    def judge(images):
        seen = F.interpolate(images, (224, 224), mode="bilinear").split(32)
        return sum(torch.cat([m.vision_model(part).pooler_output.mean(1) for part in seen]) for m in models)

    return judge


def recipe_values(name):
    "The settings of a recipe by name, with what a run of Neighbor GRPO takes where it says nothing."
    import yaml

    path = ROOT / "neighbor_grpo" / "recipes" / f"{name}.yaml"
    return FEWER | yaml.safe_load(path.read_text(encoding="utf-8"))


def recipe(device, seconds, report, known, name, model, gigabytes=0, tiny=False):
    "An iteration of a recipe, with PyTorch's memory capped if gigabytes are given."
    import torch

    from neighbor_grpo.lab.cost import measure_model
    from neighbor_grpo.models.pipeline import PipelineSettings
    from neighbor_grpo.neighbor import NeighborGRPO

    values = recipe_values(name)
    if tiny:
        values.update(
            height=32, width=32, lora_rank=4, groups=1, group_size=4, steps=2, trained_steps=1, precision="float32"
        )
    pick = lambda kind: kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
    note, cap = "not capped", gigabytes - 1  # the driver, the CUDA context and a screen take up to one
    if gigabytes and device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
        note = f"PyTorch was given {cap} GiB, judges of the real size included"
    rows = measure_model(
        model,
        [pick(NeighborGRPO)],
        values["height"],
        values["width"],
        pick(PipelineSettings),
        2,
        1,
        values["micro_batch"],
        device,
        False,
        seconds,
        values["decode_batch"],
        random_judge(device, tiny),
        values.get("ema", 0.0),
        lambda rows: report(rows=rows),
    )
    return dict(rows=rows, note=f"one group, {note}") | ({} if rows else dict(status="out of time"))


def micro_batches(device, seconds, report, known, model, pixels, most=256, **settings):
    "The largest number of states whose gradient fits, without and with checkpointing."
    from neighbor_grpo.lab.cost import RandomTask, gradient_fits, largest_fit
    from neighbor_grpo.models.pipeline import PipelineSettings

    end, values, shown = time.time() + seconds, {}, {}
    for name, again in (("without", False), ("with", True)):
        more = dict(guidance_scale=4.5, train_guidance_scale=4.5, gradient_checkpointing=again)
        task, took, late = RandomTask(model, pixels, pixels, PipelineSettings(**more, **settings), device), [0.0], []

        def fits(count, task=task, took=took, late=late):  # what there is no time to try counts as too much
            start = time.time()
            if start + 3 * took[-1] > end:
                return bool(late.append(count))
            fitted = gradient_fits(task, count)
            took.append(time.time() - start)
            return fitted

        values[name] = largest_fit(fits, most)
        shown[name] = f"{values[name]}{' or more' * bool(late or values[name] == most)} {name} checkpointing"
        report(note=", ".join(shown.values()), values=values)
        del task, fits
    return dict(note=", ".join(shown.values()), values=values)


# --- which parts there are ---


@dataclass(frozen=True)
class Part:
    "Something to measure."

    name: str
    about: str
    run: object  # (device, seconds, report, known, **settings) -> what to keep of it
    limit: float  # seconds
    least: float  # seconds without which it is not worth starting
    settings: dict


FEWER = dict(steps=6, anchors=2, trained_steps=2)  # in place of 8, 4 and 4: 7 forward-equivalents a sample, not 12


def parts(tiny=False):
    "All parts, the most valuable first, those that compile last."
    medium = dict(model="sd3.5-medium", lora_rank=32, precision="bfloat16")
    again, compiled = dict(gradient_checkpointing=True), dict(compile=True)
    square = medium | dict(height=512, width=512, guidance=4.5, micro_batch=8, decode_batch=4)
    found = [
        Part("check", "a tiny SD3", check, 50, 10, dict(iterations=60, pixels=128)),
        Part("512", "SD3.5 Medium, 8 states at once", measured, 110, 15, medium | dict(pixels=512, micro_batch=8)),
        Part("512-fewer", "the same as 512, fewer evaluations", neighbor, 25, 8, square),
        family("flux2-klein-4b", 30),
        family("sana-1.6b", 30, height=1024, width=1024, guidance=4.5),
        family("z-image", 45, guidance=4.5),
        family("wan-1.3b", 50, height=480, width=832, guidance=5.0),
        family("qwen-image", 80, guidance=4.0),
        Part(
            "24gb",
            "recipe sd3.5-medium-24gb",
            recipe,
            45,
            15,
            dict(name="sd3.5-medium-24gb", model="sd3.5-medium", gigabytes=24),
        ),
        Part("flux", "recipe flux-paper", recipe, 75, 40, dict(name="flux-paper", model="flux-dev")),
        Part("1024", "SD3.5 Medium, 2 states at once", measured, 100, 30, medium | dict(pixels=1024, micro_batch=2)),
        Part(
            "states-512",
            "the largest micro-batch, SD3.5 Medium at 512 px",
            micro_batches,
            30,
            10,
            medium | dict(pixels=512),
        ),
        Part(
            "512-checkpointing",
            "the same as 512, 8 states at once",
            measured,
            50,
            15,
            medium | again | dict(pixels=512, micro_batch=8),
        ),
        Part("512-compiled", "the same as 512-fewer", neighbor, 100, 50, square | compiled),
        Part(
            "1024-checkpointing",
            "the same as 1024, 4 states at once",
            measured,
            100,
            30,
            medium | again | dict(pixels=1024, micro_batch=4),
        ),
        Part(
            "states-1024",
            "the largest micro-batch, SD3.5 Medium at 1024 px",
            micro_batches,
            40,
            15,
            medium | dict(pixels=1024),
        ),
    ]
    return [shrunk(part) for part in found] if tiny else found


def family(model, limit, height=512, width=512, guidance=1.0):
    "An iteration on a model of another family, with checkpointing."
    shape = dict(height=height, width=width, guidance=guidance, micro_batch=4)
    settings = shape | dict(model=model, lora_rank=32, precision="bfloat16", gradient_checkpointing=True)
    return Part(model, f"{width} x {height} px, 4 states at once, fewer evaluations", neighbor, limit, 12, settings)


def shrunk(part):
    "The same part at a size that a processor core can do in a moment."
    tiny = dict(model="tiny", lora_rank=4, pixels=part.settings.get("pixels", 0) // 16, precision="float32")
    small = {
        check: dict(iterations=4, pixels=64),
        measured: tiny | dict(small=True, iterations=1),
        micro_batches: tiny | dict(most=5),
        neighbor: dict(model="tiny", lora_rank=4, height=32, width=32, precision="float32"),
        recipe: dict(model="tiny-flux" if part.name == "flux" else "tiny", tiny=True),
    }
    return replace(part, settings=part.settings | small[part.run], limit=600, least=0)


# --- one process for each part ---


def work(channel, tiny, name, device, end, known):
    "The process of a part: send what it finds, as it comes, and a status last."
    part = next(part for part in parts(tiny) if part.name == name)
    report = lambda **found: channel.send(found)
    try:
        report(**{"status": "done", **part.run(device, end - time.time() - MARGIN, report, known, **part.settings)})
    except BaseException as e:  # whatever it is, it must not be lost
        kind = type(e).__name__
        report(status="out of memory" if kind == "OutOfMemoryError" else "failed", note=f"{kind}: {e}".split("\n")[0])


def look(channel, tiny, device):
    "The process that looks at the machine."
    import torch

    cuda = device.startswith("cuda")
    if cuda and torch.cuda._is_in_bad_fork():  # a library touched the GPU while it was imported
        return channel.send(dict(bad_fork=True))
    from importlib.metadata import version

    card, memory = f"CPU, {platform.machine()}", math.nan
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        card, memory = properties.name, properties.total_memory / 1e9
    names = ("torch", "diffusers", "transformers", "peft")
    versions = dict(python=platform.python_version()) | {name: version(name) for name in names}
    channel.send(
        dict(
            card=card + ", tiny" * tiny,
            memory=memory if cuda else 0.0,
            driver=driver(),
            cuda=torch.version.cuda or "none",
            versions=versions,
        )
    )


def driver():
    "The version of NVIDIA's driver, if there is one."
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "none"


def render(channel, table):
    "The process that makes the Markdown."
    from neighbor_grpo.lab.cost import gpu_markdown

    channel.send(dict(text=gpu_markdown(table)))


def ask(context, target, *arguments, seconds, keep=lambda found: None):
    "Run a function in a process of its own; what it sent, or what became of it."
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *arguments))
    found, end = {}, time.monotonic() + seconds
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            found |= ours.recv()
            keep(found)
        found.setdefault("status", "out of time")
    except EOFError:
        process.join(5)
        found.setdefault("status", f"crashed with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        ours.close()
    return found


def start_processes(tiny):
    "How processes are started, with the large libraries imported once for all of them where that is possible."
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not touch it
    os.environ["HF_HUB_OFFLINE"] = "1"
    if tiny:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than all the rest
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["neighbor_grpo.lab.cost", "neighbor_grpo.rewards.judges", "neighbor_grpo.rivals.mixed"]
    )
    return context


# --- the table ---


def without_nan(value):
    "The same with None in place of what is no number, which JSON does not know."
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path, text):
    "The whole text or the old one, never a half."
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def opened(path, machine):
    "The table at a path, if it was made on such a machine; else an empty one."
    if not path.exists():
        return dict(machine, date=time.strftime("%Y-%m-%d"), parts={})
    table = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in machine if table[name] != machine[name]]
    if changed:
        name = changed[0]
        raise SystemExit(
            f"--out must be a folder without {path.name}: {name} was {table[name]} there, is {machine[name]} now"
        )
    return table


def ordered(table, known):
    "The parts of a table in their own order."
    return dict(table, parts={part.name: table["parts"][part.name] for part in known if part.name in table["parts"]})


def measure(context, part, table, options, left, keep):
    "Run one part in the time that is left and put what it found into the table."
    old = table["parts"].get(part.name, dict(rows=[]))
    result = dict(about=part.about, settings=part.settings, status="running", note="", seconds=0.0, rows=old["rows"])
    if left < part.least:
        return table["parts"].setdefault(part.name, result | dict(status="skipped", note="no time left"))
    start, known = time.monotonic(), {row["algorithm"] for row in old["rows"]}

    def take_over(found):
        table["parts"][part.name] = (
            result | found | dict(rows=old["rows"] + found.get("rows", []), seconds=round(time.monotonic() - start, 1))
        )
        keep(table)

    seconds = min(part.limit, left)
    work_on = (options.tiny, part.name, options.device, time.time() + seconds, known)
    take_over(
        ask(context, work, *work_on, seconds=seconds, keep=lambda found: take_over({**found, "status": "running"}))
    )
    return table["parts"][part.name]


def parse(argv):
    "The command's options."
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="measure_gpu.py", description=__doc__, formatter_class=kind)
    parser.add_argument("--out", type=Path, help="folder of the table; a table of this machine in it is completed")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the command")
    parser.add_argument("--list", action="store_true", help="list the parts and end")
    options = parser.parse_args(argv)
    names = [part.name for part in parts()]
    for name in options.parts or ():
        if name not in names:
            parser.error(f"--parts must be among {', '.join(names)}, got {name!r}")
    if options.out is None and not options.list:
        parser.error("--out must be a folder for the table, got none")
    return options


def main(argv=None):
    "Measure what is missing, and print the table."
    options, start = parse(argv), time.monotonic()
    chosen = [part for part in parts(options.tiny) if not options.parts or part.name in options.parts]
    if options.list:
        return print(*(f"{part.name:20}{part.limit:5.0f} s  {part.about}" for part in chosen), sep="\n")
    left = lambda: 60 * options.minutes - (time.monotonic() - start)
    context = start_processes(options.tiny)
    machine = ask(context, look, options.tiny, options.device, seconds=left())
    if machine.pop("bad_fork", False):
        context = multiprocessing.get_context("spawn")
        machine = ask(context, look, options.tiny, options.device, seconds=left())
    status = machine.pop("status")
    if "card" not in machine:
        raise SystemExit(
            f"--device must be one that PyTorch can use here, got {options.device}: looking at it {status}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{re.sub('[^a-z0-9]+', '-', machine['card'].lower()).strip('-')}.json"
    table = opened(path, machine)
    keep = lambda table: write(path, json.dumps(without_nan(ordered(table, parts())), indent=1) + "\n")
    for part in chosen:
        if table["parts"].get(part.name, {}).get("status") == "done":
            continue
        found = measure(context, part, table, options, left(), keep)
        keep(table)
        print(f"{part.name}: {found['status']}, {found['seconds']:.0f} s {found['note']}", file=sys.stderr, flush=True)
    made = ask(context, render, ordered(table, parts()), seconds=60)
    if "text" not in made:
        raise SystemExit(f"{path} is written, but its Markdown is not: {made['status']}")
    write(path.with_suffix(".md"), made["text"] + "\n")
    print(made["text"])


if __name__ == "__main__":
    main()
