"""Baselines as their authors publish them: evaluations of Flash*, where windows end, the scale of TMPO's loss."""

import pytest
import torch

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.penalties import VelocityPenalty
from neighbor_grpo.rivals.mixed import MixGRPO, MixGRPOFlash, MixGRPOFlashStar
from neighbor_grpo.rivals.modifiers import GuardedRatios, TimeWeights
from neighbor_grpo.rivals.trajectories import TMPO
from neighbor_grpo.rollouts import Watched


def still(x, t, cond=None):
    return torch.zeros_like(x)


def rolled(algorithm, iteration=0):
    return algorithm.rollout(still, randn((2, 3), seeded(0)), None, seeded(1), iteration)


def test_flash_star_takes_eight_evaluations_and_flash_sixteen_on_average():
    for iteration in (0, 24, 25, 299):
        rollout = rolled(MixGRPOFlashStar(), iteration)
        assert rollout.nfe == MixGRPOFlashStar().nfe_old == 8 and rollout.noisy[:4].all()
    counts = [rolled(MixGRPOFlash(), iteration).nfe for iteration in range(0, 300, 25)]
    assert counts[0] == MixGRPOFlash().nfe_old == 13 and round(sum(counts) / len(counts)) == 16


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_progressive_window_stays_at_the_end_of_the_path(stride):
    algorithm = MixGRPO(window_every=2, window_stride=stride)
    left = 0  # as algorithm 1 of the paper counts: l = min(l + s, T - w)
    for iteration in range(60):
        if iteration and iteration % 2 == 0:
            left = min(left + stride, 25 - 4)
        assert algorithm.window(iteration) == range(left, left + 4)
    assert left == 21


def test_last_step_is_noisy_and_trained_at_the_end_of_the_path():
    algorithm = MixGRPO(steps=6, trained_steps=2, window_every=1, group_size=4)
    for weighted in (algorithm, TimeWeights(algorithm), GuardedRatios(algorithm)):
        rollout = rolled(weighted, 9)
        assert rollout.noisy[:, 0].tolist() == [False] * 4 + [True] * 2
        states = weighted.choose(rollout, None)
        assert states.step.unique().tolist() == [4, 5]
        v = states.select(rollout.v).requires_grad_(True)
        weighted.loss(lambda x, t, cond, v=v: v, rollout, states, randn((2, 4), seeded(2))).backward()
        assert v.grad[states.step == 5].abs().min() > 0 and v.grad.isfinite().all()


@pytest.mark.parametrize("settings", [{"sampler": "cps"}, {"window_moves": "roll_back"}, {"window_moves": "random"}])
def test_other_windows_leave_out_the_last_step(settings):
    algorithm = MixGRPO(steps=6, trained_steps=2, window_every=1, **settings)
    places = [algorithm.window(iteration).start for iteration in range(200)]
    assert set(places) == set(range(4))
    assert places[3:] == [3] * 197 if "sampler" in settings else places[-1] == algorithm.window(199).start


@pytest.mark.parametrize("match", ["balance", "cross"])
def test_tmpos_loss_is_a_mean_over_trajectories(match):
    rewards = randn((2, 6), seeded(3))
    for trained_steps in (1, 2, 4):
        algorithm = TMPO(group_size=6, steps=5, trained_steps=trained_steps, train_where="first", match=match)
        rollout, target = rolled(algorithm), algorithm.advantages(rewards)
        loss = sum(algorithm.losses(still, rollout, target, seeded(4)))
        states = algorithm.choose(rollout, seeded(4))
        path = algorithm.log_prob(rollout, states, states.select(rollout.v)).view(2, 6, trained_steps).sum(2)
        p, q = path.log_softmax(1), target.log_softmax(1)
        each = 6 * q.exp() * p if match == "cross" else -(p - q).square() / 2
        torch.testing.assert_close(loss, -each.mean())


def test_tmpos_penalty_weighs_as_much_beside_its_loss_whatever_the_number_of_steps():
    def shifted(x, t, cond=None):
        return torch.ones_like(x)

    for trained_steps in (1, 4):
        algorithm = TMPO(group_size=6, steps=5, trained_steps=trained_steps)
        rollout = rolled(algorithm)
        states = algorithm.choose(rollout, seeded(4))
        watched = Watched(still)
        watched(*states.inputs(rollout))
        weights = algorithm.distance_weights(rollout, states)
        held = VelocityPenalty(0.3).distance(watched, shifted, weights) / len(states)
        pair = (algorithm.gaussian(rollout, states, f(*states.inputs(rollout))) for f in (still, shifted))
        (mean, std), (mean_ref, _) = pair
        divergence = ((mean - mean_ref) / std).square().flatten(1).mean(1) / 2
        torch.testing.assert_close(held, 0.3 * divergence.mean())
