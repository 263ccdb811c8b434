"""The launch files say what the documentation says, to shells and programs that can read it."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "examples" / "launch"
COMMANDS = {
    "slurm.sh": "sbatch --nodes 2 examples/launch/slurm.sh",
    "sky.yaml": "sky jobs launch examples/launch/sky.yaml",
}


def script(name):
    text = (LAUNCH / name).read_text(encoding="utf-8")
    return yaml.safe_load(text)["run"] if name.endswith(".yaml") else text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_launch_file_is_sound_and_on_the_page(name):
    checked = subprocess.run(["bash", "-n"], input=script(name), text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    page = json.loads((ROOT / "nbs/runs/processes.ipynb").read_text(encoding="utf-8"))
    pages = "".join(line for cell in page["cells"] for line in cell["source"])
    assert COMMANDS[name] in pages and COMMANDS[name] in (LAUNCH / name).read_text(encoding="utf-8")
    assert {path.name for path in LAUNCH.iterdir()} == {*COMMANDS}


def test_slurm_starts_a_run_and_goes_on_with_it(tmp_path):
    "With stand-ins for SLURM's programs, which say what they were asked."
    for name, text in dict(scontrol="echo first; echo second", srun='printf "%s\\n" "$@"').items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = dict(PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_NNODES="2", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]")
    ask = lambda *words: subprocess.run(["bash", LAUNCH / "slurm.sh", *words], env=path, text=True, capture_output=True)
    assert ask("toy").returncode == 2
    out = ["toy", "--out", str(tmp_path / "run")]
    words = ask(*out).stdout.split()
    assert words[-4:] == ["train", *out] and "first:29500" in words and words[words.index("--nnodes") + 1] == "2"
    (tmp_path / "run" / "checkpoints" / "000000").mkdir(parents=True)
    assert ask(*out).stdout.split()[-5:] == ["train", *out, "--resume"]
