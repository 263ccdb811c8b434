"""LeanGRPO's kept graph: the usual gradients to rounding, from fewer evaluations, which are counted."""

from dataclasses import replace

import pytest
import torch
from helpers import Counted, SmallNet, TinyTask, gradients
from hypothesis import given
from hypothesis import strategies as st
from test_algorithms import SHAPE, SMALL, Asked, OneUpdate, changed, streams

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.lab.compare import Variant, cost
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.penalties import evaluations, forward_equivalents
from neighbor_grpo.rivals.catalogue import make, modified
from neighbor_grpo.rivals.modifiers import KeptGraphs, Previews
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.training import TrainSettings

AROUND = ("", "weights", "guard", "chunks", "mask", "guard chunks", "slas previews")


def usual(lean, network, rollout, advantages):
    "The gradient of an update that evaluates the trained states of the same rollout again."
    inner, states = lean.algorithm, rollout.trained
    loss = inner.loss(network, rollout, states, advantages, True) / len(states)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*network.parameters()])])


@given(
    st.sampled_from(["neighbor", "flow", "dance", "dppo"]),
    st.sampled_from(["random", "first", "last"]),
    st.integers(1, 3),
    st.sampled_from(["euler", "dpm++2m", "ab2"]),
    st.integers(0, 99),
)
def test_gradients_are_the_usual_ones_from_fewer_evaluations(name, where, count, method, seed):
    algorithm = changed(SMALL[name], train_where=where, trained_steps=count)
    if name == "neighbor":
        algorithm = replace(algorithm, method=method)
    lean, network, generators = KeptGraphs(algorithm), SmallNet(), streams(3, seed)
    velocity, noise = Counted(network), randn((3, *SHAPE), seeded(seed))
    rollout = lean.rollout(velocity, noise, None, generators)
    states, samples = lean.choose(rollout, generators), 3 * algorithm.group_size
    assert (velocity.plain, velocity.gradient) == (round(samples * lean.nfe_old), round(samples * lean.nfe_theta))
    assert rollout.nfe == pytest.approx(lean.nfe_old) and len(states) == velocity.gradient
    assert torch.equal(states.select(rollout.v), rollout.kept.detach())  # each row is where it belongs

    advantages = torch.randn(3, algorithm.group_size, generator=seeded(seed), dtype=torch.float64)
    asked = velocity.calls
    (lean.loss(velocity, rollout, states, advantages, True) / len(states)).backward()
    assert velocity.calls == asked
    expected = usual(lean, network, rollout, advantages)
    assert (gradients(network) - expected).abs().max() < 1e-12 + 1e-10 * expected.abs().max()


@pytest.mark.parametrize("around", AROUND)
def test_an_iteration_of_neighbor_grpo_is_the_usual_one(around):
    "Its solver draws nothing, so choosing before the rollout changes no draw; penalties see what was kept."
    algorithm, (network, reference) = replace(SMALL["neighbor"], trained_steps=2), (SmallNet(), SmallNet())
    settings = dict(kl_weight=0.1, norm_weight=0.1)
    plain, lean = (
        OneUpdate(modified(algorithm, *around.split(), *more), network, reference, **settings).gradient
        for more in ((), ("lean",))
    )
    assert (lean - plain).abs().max() < 1e-10 < plain.abs().max()


def test_what_is_counted_is_what_is_asked():
    algorithm, policy, reference = KeptGraphs(SMALL["neighbor"]), Asked(), Asked()
    settings = dict(kl_weight=0.1)
    run, samples = OneUpdate(algorithm, policy, reference, **settings), 3 * algorithm.group_size
    asked = evaluations(algorithm, run.penalties)
    assert (policy.rows[True], reference.rows[False]) == tuple(samples * count for count in asked)
    row = Trainer(TinyTask(), algorithm, TrainSettings(groups=3, **settings)).step()
    variant = Variant("lean", algorithm, TrainSettings(groups=3, **settings))
    spent = policy.rows[False] + 3 * policy.rows[True] + reference.rows[False]
    assert cost(row, variant) == pytest.approx(spent)


def test_at_the_papers_settings_a_ninth_is_saved():
    plain, lean = forward_equivalents(NeighborGRPO()), forward_equivalents(KeptGraphs(NeighborGRPO()))
    assert (plain, lean) == (12, pytest.approx(12 - 4 / 3))


@pytest.mark.parametrize("settings", [dict(updates=2), dict(micro_batch=5), dict(collector="reference")])
def test_only_one_whole_update_on_policy(settings):
    with pytest.raises(ValueError, match="updates, collector, micro_batch must be 1, 'policy', 0"):
        OneUpdate(KeptGraphs(SMALL["neighbor"]), SmallNet(), SmallNet(), **settings)


@pytest.mark.parametrize("name", ["mix", "tempflow", "nft", "vgrpo", "tmpo"])
def test_it_stands_around_what_asks_once_a_step(name):
    with pytest.raises(ValueError, match="KeptGraphs must be around"):
        KeptGraphs(make(name))
    with pytest.raises(ValueError, match="KeptGraphs must be around"):
        KeptGraphs(NeighborGRPO(method="heun"))
    assert modified(NeighborGRPO(), "previews", "lean") == Previews(KeptGraphs(NeighborGRPO()))


def test_a_rollout_that_is_guided_otherwise_is_not_kept():
    "Its graphs would be of another velocity than that which is trained."
    task = TinyTask()
    task.split_guidance = True
    Trainer(task, SMALL["neighbor"], TrainSettings(groups=3))
    with pytest.raises(ValueError, match="train_guidance_scale must be that of the rollout with 'lean'"):
        Trainer(task, KeptGraphs(SMALL["neighbor"]), TrainSettings(groups=3))
