"What the environment says is honored, or refused by the name of its variable; devices without float64 get none."

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path

import accelerate
import matplotlib
import pytest
import torch
from torch import nn

from neighbor_grpo import cli
from neighbor_grpo.grpo import SurrogateStats
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.penalties import VelocityPenalty
from neighbor_grpo.rivals.catalogue import ALGORITHMS, make, modified
from neighbor_grpo.rivals.gaussian import FlowGRPO
from neighbor_grpo.rollouts import Watched
from neighbor_grpo.runs import processes as distributed
from neighbor_grpo.runs import tracking
from neighbor_grpo.runs.machine import choose_device
from neighbor_grpo.runs.processes import CHECKED, check_environment, check_world, make_accelerator
from neighbor_grpo.runs.tracking import tracker_names

SHORT = "train toy --pretrain_steps 2 --iterations 1 --groups 2 --group_size 4 --steps 3 --trained_steps 1 --quiet"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "No variable of a launcher, and none left behind."
    for name in list(os.environ):
        if re.match("ACCELERATE_|FSDP_|MASTER_|WORLD_SIZE|RANK|LOCAL_RANK", name):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# --- trackers ---


def test_a_folder_of_the_trackers_name_is_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "TRACKERS", ("no_such_tracker",))
    (tmp_path / "no_such_tracker" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert tracking.find_spec("no_such_tracker") is not None, "Python sees a namespace"
    with pytest.raises(ValueError, match="trackers must be installed: pip install no_such_tracker"):
        tracker_names("no_such_tracker")


# --- accelerate's settings ---

BAD = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_TORCH_DEVICE": "cuda:1",
    "ACCELERATE_DEBUG_MODE": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_USE_SAGEMAKER": "true",
    "FSDP_VERSION": "1",
    "FSDP_OFFLOAD_PARAMS": "true",
    "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP",
    "FSDP_RESHARD_AFTER_FORWARD": "false",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "JointTransformerBlock,T5Block",
    "FSDP_IGNORED_MODULES": "proj_out",
    "FSDP_BACKWARD_PREFETCH": "NO_PREFETCH",
    "FSDP_FORWARD_PREFETCH": "true",
    "FSDP_USE_ORIG_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true",
}
FINE = {  # what `accelerate launch` sets when it is asked for nothing, and a usual FSDP configuration
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "FluxTransformerBlock, FluxSingleTransformerBlock",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


@pytest.mark.parametrize("name", CHECKED)
def test_a_setting_that_would_be_ignored_is_refused_by_the_name_of_its_variable(name, monkeypatch):
    for good, value in FINE.items():
        monkeypatch.setenv(good, value)
    check_environment()
    monkeypatch.setenv(name, BAD[name])
    with pytest.raises(ValueError) as error:
        check_environment()
    assert name in str(error.value) and repr(BAD[name]) in str(error.value)
    if name.startswith("FSDP_"):
        monkeypatch.delenv("ACCELERATE_USE_FSDP")
        check_environment()  # left over: nobody asks for FSDP


HONORED = """USE_CPU USE_FSDP USE_DEEPSPEED USE_MEGATRON_LM CPU_AFFINITY FSDP_STATE_DICT_TYPE FSDP_SYNC_MODULE_STATES
FSDP_MIN_NUM_PARAMS"""  # by accelerate or by this library, or true of every run
INSIDE = """DYNAMO_MODE DYNAMO_USE_ FP8_ DEEPSPEED_ CONFIG_DS_FIELDS SAGEMAKER_ ALLOW_CP IN_TPU_POD DOWNCAST_BF16
PARALLELISM_ LOG_LEVEL ENABLE_RICH BYPASS_DEVICE_MAP INIT_INCLUDE DEBUG_RDV NUM_PROCESSES"""  # only with another


def test_every_setting_of_the_launcher_was_thought_of():
    "For the version that was read: each variable in accelerate's source is checked, honored or inside another."
    if not version("accelerate").startswith("1.15."):
        pytest.skip("read for accelerate 1.15")
    sources = [path.read_text() for path in Path(accelerate.__file__).parent.rglob("*.py")]
    found = {name for text in sources for name in re.findall(r"\"((?:ACCELERATE|FSDP)_[A-Z0-9_]*[A-Z0-9])\"", text)}
    known = tuple((HONORED + " " + INSIDE).split())
    new = [name for name in found - CHECKED.keys() if not name.removeprefix("ACCELERATE_").startswith(known)]
    assert len(found) > 40 and not new


def test_the_settings_of_a_launcher_are_checked_for_one_process_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert cli.main(SHORT.split()) == 1
    assert "ACCELERATE_MIXED_PRECISION" in capsys.readouterr().err and not list(tmp_path.glob("runs/*"))


def test_use_cpu_is_honored(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert choose_device() == torch.device("cpu")


@pytest.mark.parametrize("line, cpu", [("toy", True), ("sd3 --device cpu", True), ("sd3", False)])
def test_a_launched_task_without_a_device_stays_on_the_cpu(line, cpu, monkeypatch, tmp_path):
    "Beside a GPU, accelerate would take NCCL, which cannot add up gradients that are on the CPU."
    asked = []
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setattr(distributed, "make_accelerator", lambda out, trackers, cpu: asked.append(cpu))
    monkeypatch.setattr(distributed, "splitter", lambda accelerator: None)
    with cli.launched(tmp_path, cli.read_command(line.split())[2]):
        assert asked == [cpu]


# --- what is left over ---


def test_one_process_trains_where_a_container_sets_an_address(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert cli.main(SHORT.split()) == 0, capsys.readouterr().err


@pytest.mark.parametrize("asked", ["2", "two"])
def test_a_number_of_processes_that_is_left_over_is_named(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", asked)
    assert cli.main(SHORT.split()) == 1 and "WORLD_SIZE" in capsys.readouterr().err
    assert cli.main([*SHORT.split(), "--out", str(tmp_path / "run")]) == 1
    assert "unset WORLD_SIZE and MASTER_ADDR" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        check_world(1)


def test_processes_that_do_not_join_name_what_they_were_told(tmp_path, monkeypatch):
    def fail(**settings):
        raise RuntimeError("timed out")

    monkeypatch.setattr(distributed, "Accelerator", fail)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    with pytest.raises(RuntimeError, match="MASTER_ADDR.*10.0.0.1.*timed out"):
        make_accelerator(tmp_path / "run")


def test_a_notebooks_backend_that_is_missing_is_left_aside(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "module://no_such_package.backend_inline")
    monkeypatch.setitem(matplotlib.rcParams, "backend", "module://no_such_package.backend_inline")
    assert cli.main([*SHORT.split(), "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "reward.png").stat().st_size > 1000
    here = f"module://{Path(__file__).stem}"
    monkeypatch.setitem(sys.modules, Path(__file__).stem, sys.modules[__name__])
    monkeypatch.setenv("MPLBACKEND", here)
    cli.draw_into_files()
    assert os.environ["MPLBACKEND"] == here, "one that is there stays"


# --- a device without float64 ---


class OnMPS(torch.Tensor):
    "Everything computed from it is of its kind and never float64, until it is brought to the CPU."

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        leaves = function is torch.Tensor.cpu or function is torch.Tensor.to and "cpu" in args
        if leaves:
            return result.as_subclass(torch.Tensor)
        for value in result if isinstance(result, (list, tuple)) else (result,):
            assert not isinstance(value, OnMPS) or value.dtype != torch.float64, f"float64 on MPS: {function}"
        return result


SMALL = dict(group_size=6)
KINDS = {
    **{name: make(name, **SMALL) for name in ALGORITHMS},
    "neighbor-rollout": NeighborGRPO(leap_from="rollout", **SMALL),
    "neighbor-ab2": NeighborGRPO(leap_from="rollout", method="ab2", **SMALL),
    "neighbor-modified": modified(NeighborGRPO(**SMALL), "guard", "previews", "slas", scouts=8),
    "flow-modified": modified(FlowGRPO(**SMALL), "guard", "weights", "chunks", "replay", time_weight="noise", chunk=3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_algorithm_asks_a_device_for_float64(kind):
    algorithm = KINDS[kind]
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    velocity = Watched(lambda x, t, cond: net(x) * t[:, None])
    reward = lambda samples: samples[..., 0].as_subclass(torch.Tensor)
    noise = torch.randn(2, 2).as_subclass(OnMPS)
    rollout = algorithm.rollout(velocity, noise, None, None, 0, reward)
    assert isinstance(rollout.x, OnMPS) and isinstance(rollout.ts, OnMPS)
    rollout, rewards, _ = algorithm.recall(rollout, reward(rollout.samples), torch.arange(2), {}, None)
    advantages, states = algorithm.advantages(rewards), algorithm.choose(rollout, None)
    for micro_batch in (0, 2 * algorithm.together):
        for part in states.split(micro_batch):
            loss = algorithm.loss(velocity, rollout, part, advantages, False, SurrogateStats().surrogate)
            weights = algorithm.distance_weights(rollout, part)
            loss = loss + VelocityPenalty(0.1).distance(velocity, velocity.velocity, weights)
            loss.backward()
            assert isinstance(loss, OnMPS)


def test_the_emulation_sees_float64():
    with pytest.raises(AssertionError, match="float64 on MPS"):
        torch.ones(2).as_subclass(OnMPS).double()
    assert torch.ones(2).as_subclass(OnMPS).cpu().double().dtype == torch.float64
    assert NeighborGRPO(leap_from="rollout").method == "dpm++2m"


def test_the_blocks_of_every_family_may_be_named(monkeypatch):
    "As diffusers names them, which is what `accelerate config` offers."
    from neighbor_grpo.lab.cost import MODELS

    networks = {model.network for model in MODELS.values()}
    blocks = {name for network in networks for name in network._no_split_modules if name.endswith("TransformerBlock")}
    assert len(blocks) > 8
    for good, value in FINE.items():
        monkeypatch.setenv(good, value)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(blocks)))
    check_environment()
