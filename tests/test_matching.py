"""Matching algorithms: losses against plain loops in float64, closed forms, the times they train."""

import pytest
import torch
from helpers import PointwiseVelocity, SmallNet, TinyTask, gradients, penalized_loss, weights
from hypothesis import given
from hypothesis import strategies as st

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.grpo import group_advantages
from neighbor_grpo.penalties import VelocityPenalty, evaluations
from neighbor_grpo.rivals.catalogue import modified
from neighbor_grpo.rivals.forward import ForwardProcess, forward_times
from neighbor_grpo.rivals.matching import AWM, DGPO, RAM
from neighbor_grpo.rollouts import Watched
from neighbor_grpo.training import Run, TrainSettings

SHAPE, P, G, K = (3, 2, 2), 3, 5, 2
SMALL = dict(group_size=G, steps=3, trained_steps=K)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmallNet()


def moved(network, amount=0.05):
    "A copy with other weights."
    other = SmallNet()
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p.add_(amount * randn(p.shape, seeded(9, i), dtype=p.dtype))
    return other


def collect(algorithm, velocity):
    "A rollout, and the credit of random rewards."
    noise = randn((P, *SHAPE), seeded(1), dtype=torch.float64)
    rollout = algorithm.rollout(velocity, noise, None, [*map(seeded, range(P))])
    credit = algorithm.advantages(randn((P, G), seeded(2), dtype=torch.float64))
    return rollout, credit


def update(algorithm, policy, rollout, credit, **more):
    "Value and gradient of one update's loss."
    policy.zero_grad()
    total = sum(algorithm.losses(policy, rollout, credit, **more))
    total.backward()
    return total.detach(), gradients(policy)


def each(rollout):
    "Every noised sample: numbers, state, time, sample, noise."
    for k in range(K):
        for p in range(P):
            for i in range(G):
                x, t, x0 = rollout.x[k, p, i], rollout.ts[k, p], rollout.samples[p, i]
                yield k, p, i, x, t, x0, (x - (1 - t) * x0) / t


def error(v, x0, noise):
    "The loss of flow matching, by its definition."
    return sum((a - (n - s)) ** 2 for a, n, s in zip(v.flatten(), noise.flatten(), x0.flatten())) / v.numel()


# --- times ---


@given(st.floats(0, 0.9), st.floats(0, 3), st.integers(1, 7), st.integers(0, 99))
def test_trained_times_have_the_density_that_is_asked_for(least, power, count, seed):
    t, plain = (forward_times(2, count, 1.0, seeded(seed), *more).double() for more in ((least, power), ()))
    share = ((t - least) / (1 - least)).clamp_min(0)  # of all times below: the integral of the density
    torch.testing.assert_close(share ** (1 + power), plain, atol=1e-5, rtol=0)
    assert (t >= least).all() and (t <= 1).all() and (t.diff(dim=0) <= 0).all()


def test_an_algorithm_trains_the_times_of_its_settings():
    velocity = PointwiseVelocity().double()
    noise, streams = randn((400, *SHAPE), seeded(1), dtype=torch.float64), [*map(seeded, range(400))]
    late = ForwardProcess(group_size=2, steps=1, trained_steps=5, least_time=0.4, shift=3.0)
    ts = late.rollout(velocity, noise, None, streams).ts[:-1]
    assert ts.min() > 3 * 0.4 / (1 + 2 * 0.4) - 1e-6 and ts.min() < 0.68
    rising = ForwardProcess(group_size=2, steps=1, trained_steps=5, time_power=1.0)
    assert abs(rising.rollout(velocity, noise, None, streams).ts[:-1].mean() - 2 / 3) < 0.005  # of density 2t


@pytest.mark.parametrize("settings", [{"least_time": 1.0}, {"least_time": -0.1}, {"time_power": -1.0}])
def test_wrong_times_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=f"^{[*settings][0]} must be"):
        ForwardProcess(**settings)


# --- AWM ---


@pytest.mark.parametrize(("q", "w"), [(1.0, 0.0), (1.0, 2.0), (0.25, 1.0)])
@pytest.mark.parametrize("on_policy", [True, False])
def test_awm_is_the_plain_loop(network, q, w, on_policy):
    algorithm = AWM(**SMALL, error_power=q, weight_power=w, clip_range=0.004)
    rollout, credit = collect(algorithm, network)
    policy, total, clipped = network if on_policy else moved(network, 0.01), 0, 0
    psi = lambda e, t: t**w * ((e + 1e-10) ** q - 1e-10**q) / q
    for k, p, i, x, t, x0, noise in each(rollout):
        new = psi(error(policy(x[None], t[None])[0], x0, noise), t)
        old = new.detach() if on_policy else psi(error(rollout.v[k, p, i], x0, noise), t)
        rho, a = (old - new).exp(), credit[p, i]
        clipped += abs(rho.item() - 1) > 0.004
        total = total - torch.minimum(a * rho, a * rho.clamp(0.996, 1.004)) / (K * P * G)
    assert on_policy == (clipped == 0)
    policy.zero_grad()
    total.backward()
    expected = gradients(policy)
    value, gradient = update(algorithm, policy, rollout, credit, on_policy=on_policy)
    torch.testing.assert_close((value, gradient), (total.detach(), expected), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("q", "w"), [(1.0, 0.0), (0.25, 1.0)])
def test_awm_on_policy_is_flow_matching_weighted_by_advantages(network, q, w):
    algorithm = AWM(**SMALL, error_power=q, weight_power=w)
    rollout, credit = collect(algorithm, network)
    _, found = update(algorithm, network, rollout, credit, on_policy=True)
    t = rollout.ts[:-1, :, None].expand(-1, -1, G)
    noise = (rollout.x[:-1] - (1 - t[..., None, None, None]) * rollout.samples) / t[..., None, None, None]
    v = network(rollout.x[:-1].flatten(0, 2), t.flatten()).view_as(noise)
    e = (v - noise + rollout.samples).flatten(3).square().mean(3)
    network.zero_grad()
    (credit * t**w * (e.detach() + 1e-10) ** (q - 1) * e).mean().backward()
    torch.testing.assert_close(found, gradients(network), rtol=1e-7, atol=1e-10)


def test_awm_clips_advantages_and_maps_them_to_one():
    rewards = randn((4, 60), seeded(3), dtype=torch.float64)
    rewards[:, 0] = 30
    plain = group_advantages(rewards)
    assert plain.max() > 6
    torch.testing.assert_close(AWM().advantages(rewards), plain.clamp(-5, 5) / 5)
    both = torch.stack([rewards, rewards.flip(1)], 2)
    mixed = 0.25 * plain + 0.75 * plain.flip(1)
    torch.testing.assert_close(AWM().advantages(both, [0.25, 0.75]), mixed.clamp(-5, 5) / 5)


# --- DGPO ---


def preferences(algorithm, policy, rollout, credit, first, on_policy):
    "Minus its objective, as nested loops, and how many samples are beyond the clip."
    total, left, c = 0, 0, algorithm.clip_range
    known = {(k, p, i): (x, t, x0, noise) for k, p, i, x, t, x0, noise in each(rollout)}
    for k, p in [(k, p) for k in range(K) for p in range(P)]:
        preference = 0
        for i, a in enumerate(credit[p]):
            x, t, x0, noise = known[k, p, i]
            new = error(policy(x[None], t[None])[0], x0, noise)
            old = new.detach() if on_policy else error(rollout.v[k, p, i], x0, noise)
            before = error(first(x[None], t[None])[0], x0, noise).detach() if first else old
            rho = (old - new).exp().item()
            beyond = rho > 1 + c if a > 0 else rho < 1 - c
            left += beyond
            preference = preference + a * ((new.detach() if beyond else new) - before)
        preference = preference * algorithm.beta / G
        total = total - torch.nn.functional.logsigmoid(-preference) / algorithm.beta
    return total / (K * P), left


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("micro_batch", [0, G * K])
def test_dgpo_prefers_the_good_of_each_group_at_each_time(network, frozen, on_policy, micro_batch):
    algorithm = DGPO(**SMALL, beta=30.0, frozen_reference=frozen, clip_range=0.004)
    rollout, credit = collect(algorithm, network)
    policy, first = network if on_policy else moved(network, 0.01), moved(network, 0.1)
    total, left = preferences(algorithm, policy, rollout, credit, first if frozen else None, on_policy)
    assert on_policy == (left == 0)
    policy.zero_grad()
    total.backward()
    expected = gradients(policy)
    policy.zero_grad()
    for states in algorithm.choose(rollout).split(micro_batch):
        loss = algorithm.loss(Watched(policy, first), rollout, states, credit, on_policy)
        (loss / (K * P * G)).backward()
    torch.testing.assert_close(gradients(policy), expected, rtol=1e-7, atol=1e-10)


def test_dgpo_on_policy_is_half_of_awm_where_it_has_not_left_its_reference(network):
    plain = AWM(**SMALL, error_power=1.0, weight_power=0.0)
    rollout, credit = collect(plain, network)
    _, found = update(DGPO(**SMALL), network, rollout, credit, on_policy=True)
    _, expected = update(plain, network, rollout, credit / 2, on_policy=True)
    torch.testing.assert_close(found, expected)


# --- RAM ---


@pytest.mark.parametrize("on_policy", [True, False])
def test_ram_regresses_on_the_corrected_velocity(network, on_policy):
    algorithm = RAM(**SMALL, multiplier=7.0)
    rollout, credit = collect(algorithm, network)
    policy, first, total = network if on_policy else moved(network), moved(network, 0.1), 0
    for k, p, i, x, t, x0, noise in each(rollout):
        v = policy(x[None], t[None])[0]
        old = v.detach() if on_policy else rollout.v[k, p, i]
        target = first(x[None], t[None])[0] + 7 * credit[p, i] * (noise - x0 - old)
        total = total + (v - target.detach()).square().mean() / 7 / (K * P * G)
    policy.zero_grad()
    total.backward()
    expected = gradients(policy)
    value, found = update(algorithm, Watching(policy, first), rollout, credit, on_policy=on_policy)
    torch.testing.assert_close((value, found), (total.detach(), expected), rtol=1e-9, atol=1e-11)


class Watching(Watched):
    "As the loop hands it over, with the weights of the policy."

    def zero_grad(self):
        self.velocity.zero_grad()

    def parameters(self):
        return self.velocity.parameters()


def test_ram_on_policy_is_awm_with_a_penalty(network):
    plain, first = AWM(**SMALL, error_power=1.0, weight_power=0.0), moved(network, 0.1)
    rollout, credit = collect(plain, network)
    _, found = update(RAM(**SMALL, multiplier=20.0), Watching(network, first), rollout, credit, on_policy=True)
    penalties = [(VelocityPenalty(1 / 20), first)]
    network.zero_grad()
    penalized_loss(plain, network, rollout, credit, penalties, on_policy=True).backward()
    torch.testing.assert_close(found, gradients(network))


# --- a run hands the policy before training to the loss ---


@pytest.mark.parametrize("algorithm", [RAM(**SMALL), DGPO(**SMALL), modified(DGPO(**SMALL), "slas")])
def test_a_run_compares_with_its_first_weights(algorithm):
    task = TinyTask(dropout=0.0)
    run = Run(task, algorithm, TrainSettings(groups=3, updates=2, lr=0.1))
    start = weights(task.policy)
    run.step()
    assert torch.equal(weights(run.reference), start) and not torch.equal(weights(task.policy), start)
    free = Run(TinyTask(dropout=0.0), DGPO(**SMALL, frozen_reference=False), TrainSettings(groups=3))
    assert free.reference is None
    assert evaluations(algorithm) == (K, K) and evaluations(free.algorithm) == (K, 0)


REFUSED = [
    (DGPO, {"beta": 0.0}, "> 0"),
    (DGPO, {"clip_range": 0.0}, "in (0, 1)"),
    (DGPO, {"advantage_clip": 0.0}, "> 0"),
    (DGPO, {"frozen_reference": 1}, "True or False"),
    (RAM, {"multiplier": 0.0}, "> 0"),
    (AWM, {"error_power": 0.0}, "in (0, 1]"),
    (AWM, {"weight_power": -1.0}, ">= 0"),
    (AWM, {"clip_range": 1.0}, "in (0, 1)"),
    (AWM, {"advantage_clip": 0.0}, "> 0"),
]


@pytest.mark.parametrize(("kind", "settings", "allowed"), REFUSED)
def test_wrong_settings_are_refused_by_name(kind, settings, allowed):
    with pytest.raises(ValueError) as found:
        kind(**settings)
    assert str(found.value).startswith([*settings][0]) and allowed in str(found.value)


def test_a_velocity_in_half_precision_is_compared_in_full():
    algorithm = AWM(**SMALL, error_power=1.0, weight_power=0.0)
    rollout, credit = collect(algorithm, PointwiseVelocity().double())
    states = algorithm.choose(rollout)
    coarse = states.select(rollout.v).bfloat16()
    losses = [algorithm.loss(lambda *_, v=v: v, rollout, states, credit) for v in (coarse, coarse.double())]
    assert torch.equal(*losses)
