"""Forward-process algorithms: times and noises, losses against plain loops and closed forms, and what they learn."""

from dataclasses import fields, replace

import pytest
import torch
from helpers import Counted, PointwiseVelocity, SmallNet, gradients, penalized_loss
from hypothesis import given
from hypothesis import strategies as st

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.grpo import SurrogateStats, group_advantages
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.penalties import VelocityPenalty, evaluations
from neighbor_grpo.rivals.catalogue import modified
from neighbor_grpo.rivals.forward import VGRPO, DiffusionNFT, ForwardProcess, forward_times
from neighbor_grpo.rollouts import Algorithm
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.solvers import METHODS, solve
from neighbor_grpo.tasks.toy2d import ToySettings, ToyTask
from neighbor_grpo.training import TrainSettings

SHAPE = (3, 2, 2)
NFT = DiffusionNFT(group_size=6, steps=4, trained_steps=3)
ELBO = VGRPO(group_size=6, steps=4, trained_steps=3)
both = pytest.mark.parametrize("algorithm", [NFT, ELBO], ids=["nft", "vgrpo"])


def streams(groups, *keys):
    return [seeded(7, *keys, g) for g in range(groups)]


def collect(algorithm, velocity, groups=3, cond=None, dtype=torch.float64):
    "A rollout and advantages of random rewards."
    noise = randn((groups, *SHAPE), seeded(1), dtype=dtype)
    rollout = algorithm.rollout(velocity, noise, cond, streams(groups, 0))
    rewards = randn((groups, algorithm.group_size), seeded(2), dtype=dtype)
    return rollout, algorithm.advantages(rewards)


def loss_gradient(algorithm, network, rollout, advantages, **more):
    network.zero_grad()
    for loss in algorithm.losses(network, rollout, advantages, **more):
        loss.backward()
    return gradients(network)


def moved(network, amount=0.05):
    "A copy with other weights."
    other = SmallNet(dtype=next(network.parameters()).dtype)
    other.load_state_dict(network.state_dict())
    with torch.no_grad():
        for i, p in enumerate(other.parameters()):
            p.add_(amount * randn(p.shape, seeded(9, i), dtype=p.dtype))
    return other


def answering(v):
    "A velocity that gives this answer, whatever it is asked."
    return lambda x, t, cond=None: v


@pytest.fixture
def network():
    torch.manual_seed(0)
    return SmallNet()


# --- times and noises ---


@given(
    groups=st.integers(1, 4),
    count=st.integers(1, 12),
    shift=st.floats(0.2, 5),
    seed=st.integers(0, 99),
    each=st.booleans(),
)
def test_one_time_in_each_stratum(groups, count, shift, seed, each):
    generator = [seeded(seed, p) for p in range(groups)] if each else seeded(seed)
    t = forward_times(groups, count, shift, generator).double()
    assert t.shape == (count, groups) and (0 < t).all() and (t <= 1).all()
    unshifted = t / (shift - (shift - 1) * t)
    edges = torch.linspace(1, 0, count + 1, dtype=torch.float64)[:, None]
    assert (unshifted <= edges[:-1] + 1e-5).all() and (unshifted >= edges[1:] - 1e-5).all()


def test_times_are_uniform():
    t = forward_times(4000, 3, generator=seeded(0))
    assert (t.flatten().sort().values - torch.linspace(0, 1, t.numel())).abs().max() < 0.02
    assert (
        torch.corrcoef(t) - torch.eye(3)
    ).abs().max() < 0.06  # the strata's times have nothing to do with each other


def test_times_are_the_groups_own():
    t = forward_times(3, 4, generator=streams(3))
    assert len({tuple(column.tolist()) for column in t.T}) == 3
    assert torch.equal(forward_times(1, 4, generator=[streams(3)[2]])[:, 0], t[:, 2])


@pytest.mark.parametrize("group_noise", [True, False])
def test_states_are_noised_samples(group_noise):
    algorithm = replace(ELBO, group_noise=group_noise)
    rollout, _ = collect(algorithm, PointwiseVelocity().double())
    assert rollout.ts.shape == (4, 3) and rollout.x.shape == (4, 3, 6, *SHAPE) and rollout.v.shape == (3, 3, 6, *SHAPE)
    assert (rollout.ts[-1] == 0).all() and rollout.noisy is None and rollout.replayed is None
    t = rollout.ts[:-1].reshape(3, 3, 1, 1, 1, 1)
    noise = (rollout.x[:-1] - (1 - t) * rollout.samples) / t
    shared = (noise - noise[:, :, :1]).abs().max()
    assert (shared < 1e-10) if group_noise else (shared > 1)
    firsts = noise[:, :, 0].flatten(0, 1)
    assert torch.cdist(firsts.flatten(1), firsts.flatten(1)).fill_diagonal_(9).min() > 1  # other times, other groups
    assert abs(noise.std() - 1) < 0.2 and abs(noise.mean()) < 0.3


def test_samples_are_the_solvers():
    velocity = PointwiseVelocity().double()
    for method in METHODS:
        rollout, _ = collect(replace(NFT, method=method), velocity)
        plain = NeighborGRPO(group_size=6, steps=4, sigma=1.0, anchors=1, trained_steps=1)
        start = plain.starts(randn((3, *SHAPE), seeded(1), dtype=torch.float64), 6, streams(3, 0))
        expected = solve(velocity, start.flatten(0, 1), time_grid(4), None, method).x[-1].unflatten(0, (3, 6))
        assert torch.equal(rollout.samples, expected)


@both
def test_velocities_are_the_collectors(algorithm, network):
    shift = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    rollout, _ = collect(algorithm, network, cond=shift)
    for k in range(3):
        for p in range(3):
            v = network(rollout.x[k, p], rollout.ts[k, p].expand(6), shift[p].expand(6))
            torch.testing.assert_close(rollout.v[k, p], v, rtol=1e-12, atol=1e-12)


@both
def test_a_group_does_not_depend_on_the_others(algorithm):
    velocity = PointwiseVelocity()
    together, _ = collect(algorithm, velocity, dtype=torch.float32)
    noise = randn((3, *SHAPE), seeded(1))
    for p in range(3):
        alone = algorithm.rollout(velocity, noise[p : p + 1], None, [streams(3, 0)[p]])
        assert torch.equal(alone.x[:, 0], together.x[:, p]) and torch.equal(alone.ts[:, 0], together.ts[:, p])
        assert torch.equal(alone.v[:, 0], together.v[:, p])


@both
def test_every_sample_is_trained_at_every_time(algorithm):
    rollout, _ = collect(algorithm, PointwiseVelocity().double())
    states = algorithm.choose(rollout)
    found = set(zip(states.step.tolist(), states.prompt.tolist(), states.member.tolist(), strict=True))
    assert len(states) == 3 * 3 * 6 and found == {(k, p, i) for k in range(3) for p in range(3) for i in range(6)}


# --- losses ---


def plain_regression(x, x0, t, v):
    "The self-normalised regression of one state."
    error = (x - t * v - x0).flatten()
    return (error**2).mean() / error.abs().mean().detach()


def plain_nft(algorithm, network, rollout, advantages, old):
    "Loop over states; `old(k, p, i, v)` is the collecting policy's velocity."
    total, (count, groups, size), b = 0, rollout.v.shape[:3], algorithm.beta
    for k in range(count):
        for p in range(groups):
            for i in range(size):
                x, x0, t = rollout.x[k, p, i], rollout.samples[p, i], rollout.ts[k, p]
                v = network(x[None], t[None])[0]
                v_old = old(k, p, i, v)
                plus, minus = (1 - b) * v_old + b * v, (1 + b) * v_old - b * v
                r = min(max(advantages[p, i].item() / 5, -1), 1) / 2 + 0.5
                total += r * plain_regression(x, x0, t, plus) + (1 - r) * plain_regression(x, x0, t, minus)
    return total / (count * groups * size) * 5 / b


@pytest.mark.parametrize("beta", [0.1, 1.0, 1.7])
@pytest.mark.parametrize("on_policy", [True, False])
def test_nft_is_the_plain_loop(network, beta, on_policy):
    algorithm = replace(NFT, beta=beta)
    rollout, advantages = collect(algorithm, network)
    policy = network if on_policy else moved(network)
    ours = loss_gradient(algorithm, policy, rollout, advantages, on_policy=on_policy)
    old = (lambda k, p, i, v: v.detach()) if on_policy else (lambda k, p, i, v: rollout.v[k, p, i])
    value = plain_nft(algorithm, policy, rollout, advantages, old)
    policy.zero_grad()
    value.backward()
    torch.testing.assert_close(ours, gradients(policy), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(algorithm.losses(policy, rollout, advantages, on_policy=on_policy)), value)


@pytest.mark.parametrize("one_ratio", [True, False])
def test_vgrpo_is_the_plain_loop(network, one_ratio):
    algorithm = replace(ELBO, one_ratio=one_ratio, clip_range=0.02)
    rollout, advantages = collect(algorithm, network)
    policy = moved(network)
    ours = loss_gradient(algorithm, policy, rollout, advantages)
    total, clipped = 0, 0
    for p in range(3):
        for i in range(6):
            x0, gaps = rollout.samples[p, i], []
            for k in range(3):
                x, t = rollout.x[k, p, i], rollout.ts[k, p]
                old = plain_regression(x, x0, t, rollout.v[k, p, i])
                gaps.append(old - plain_regression(x, x0, t, policy(x[None], t[None])[0]))
            for gap in [sum(gaps) / 3] if one_ratio else gaps:
                rho, a = gap.exp(), advantages[p, i]
                bounded = torch.minimum(a * rho, a * rho.clamp(0.98, 1.02))
                clipped += (rho - 1).abs().item() > 0.02
                total -= bounded / (18 if one_ratio else 54)
    assert clipped > 0
    policy.zero_grad()
    total.backward()
    torch.testing.assert_close(ours, gradients(policy), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_on_policy_gradient_is_weighted_flow_matching(network, beta):
    algorithm = replace(NFT, beta=beta)
    rollout, advantages = collect(algorithm, network)
    t = rollout.ts[:-1].reshape(3, 3, 1, 1, 1, 1)
    target = (rollout.x[:-1] - rollout.samples) / t  # eps - x_0
    v = network(rollout.x[:-1].flatten(0, 2), rollout.ts[:-1, :, None].expand(-1, -1, 6).flatten()).view_as(target)
    miss = (v - target).flatten(3)
    ell = t.flatten(2) * miss.square().mean(3) / miss.detach().abs().mean(3)
    network.zero_grad()
    (advantages * ell).mean().backward()
    closed = gradients(network)
    for choice in (algorithm, ELBO):  # one gradient, two papers
        ours = loss_gradient(choice, network, rollout, advantages, on_policy=True)
        torch.testing.assert_close(ours, closed, rtol=1e-9, atol=1e-12)


def test_bad_samples_repel_only_up_to_a_distance():
    x0, eps, old = (randn((1, 4), seeded(20, i), dtype=torch.float64) for i in range(3))
    rollout, advantages = collect(replace(NFT, trained_steps=1, group_size=2), PointwiseVelocity().double(), 1)
    rollout = replace(
        rollout,
        ts=torch.tensor([[0.5], [0.0]], dtype=torch.float64),
        x=torch.stack([0.5 * (x0 + eps), x0])[:, None].expand(2, 1, 2, 4),
        v=old[None, None].expand(1, 1, 2, 4),
    )
    for b in (0.5, 1.0, 2.0):
        algorithm = replace(NFT, trained_steps=1, group_size=2, beta=b)
        states = algorithm.choose(rollout)
        for s, sign in ((-0.9 / b, -1), (-1.1 / b, 1), (0.5 / b, -1)):  # away, back, away
            at = torch.tensor(s, dtype=torch.float64, requires_grad=True)
            v = (old + at * (eps - x0 - old)).expand(2, 4)
            loss = algorithm.loss(answering(v), rollout, states, torch.full((1, 2), -3.0))
            assert torch.autograd.grad(-loss, at)[0].sign() == sign


@pytest.mark.parametrize("on_policy", [True, False])
def test_ratio_on_policy_is_exactly_one(on_policy):
    velocity, stats = PointwiseVelocity(), SurrogateStats()
    rollout, advantages = collect(ELBO, velocity, dtype=torch.float32)
    for _ in ELBO.losses(velocity, rollout, advantages, on_policy=on_policy, surrogate=stats.surrogate):
        pass
    assert stats.summary()["ratio_min"] == stats.summary()["ratio_max"] == 1
    velocity.scales.data += 0.05
    for _ in ELBO.losses(velocity, rollout, advantages, surrogate=stats.surrogate):
        pass
    assert stats.summary()["ratio_max"] > 1.001


def test_first_update_is_the_same_from_stored_velocities(network):
    for algorithm in (NFT, ELBO):
        rollout, advantages = collect(algorithm, network)
        first = loss_gradient(algorithm, network, rollout, advantages, on_policy=True)
        stored = loss_gradient(algorithm, network, rollout, advantages, on_policy=False)
        # where both mixtures coincide up to rounding, so do their gradients
        torch.testing.assert_close(first, stored, rtol=1e-9, atol=1e-12)


def test_a_sample_that_is_hit_exactly_gives_no_nan():
    x0 = torch.zeros(1, 1, 2, 3)
    rollout, _ = collect(replace(NFT, trained_steps=1, group_size=2), PointwiseVelocity().double(), 1)
    hit = replace(rollout, ts=torch.tensor([[0.5], [0.0]]), x=torch.cat([x0, x0]), v=x0)
    v = torch.zeros(2, 3, requires_grad=True)
    for algorithm in (replace(NFT, trained_steps=1, group_size=2), replace(ELBO, trained_steps=1, group_size=2)):
        states = algorithm.choose(hit)
        loss = algorithm.loss(answering(v), hit, states, torch.ones(1, 2))
        assert loss.isfinite() and torch.autograd.grad(loss, v)[0].isfinite().all()


def test_mixtures_are_made_in_full_precision():
    coarse, fine = SmallNet(dtype=torch.bfloat16), replace(NFT, beta=0.01)
    rollout, advantages = collect(fine, coarse, dtype=torch.float32)
    assert rollout.v.dtype == torch.bfloat16 and rollout.x.dtype == torch.float32
    states = fine.choose(rollout)
    v = states.select(rollout.v) + 0.1 * randn((len(states), *SHAPE), seeded(5)).bfloat16()
    exact = fine.loss(answering(v.float()), replace(rollout, v=rollout.v.float()), states, advantages)
    assert torch.equal(fine.loss(answering(v), rollout, states, advantages), exact)


@pytest.mark.parametrize("kl_weight", [0.0, 0.2])
@both
def test_micro_batches_change_nothing(network, algorithm, kl_weight):
    rollout, advantages = collect(algorithm, network)
    policy, penalties = moved(network), [(VelocityPenalty(kl_weight), moved(network, 0.1))]
    found = []
    for size in (0, 3, 9, 51):
        policy.zero_grad()
        penalized_loss(algorithm, policy, rollout, advantages, penalties, micro_batch=size).backward()
        found.append(gradients(policy))
        torch.testing.assert_close(found[-1], found[0], rtol=1e-9, atol=1e-12)
    if kl_weight == 0:
        for size in (3, 9, 51):
            parts = loss_gradient(algorithm, policy, rollout, advantages, micro_batch=size)
            torch.testing.assert_close(parts, found[0], rtol=1e-9, atol=1e-12)


@both
def test_penalty_is_the_velocity_difference(network, algorithm):
    rollout, advantages = collect(algorithm, network)
    reference = moved(network)
    loss = penalized_loss(algorithm, network, rollout, 0 * advantages, [(VelocityPenalty(0.3), reference)])
    bare = sum(algorithm.losses(network, rollout, 0 * advantages))
    x, t = rollout.x[:-1].flatten(0, 2), rollout.ts[:-1, :, None].expand(-1, -1, 6).flatten()
    expected = 0.3 * (network(x, t) - reference(x, t)).square().mean()
    torch.testing.assert_close(loss - bare, expected)


# --- advantages ---


def test_advantages_are_clipped_hard_and_softly():
    rewards = randn((4, 40), seeded(3), dtype=torch.float64)
    rewards[:, 0] = 30
    plain = group_advantages(rewards)
    assert plain.max() > 6
    torch.testing.assert_close(DiffusionNFT().advantages(rewards), plain.clamp(-5, 5))
    torch.testing.assert_close(VGRPO().advantages(rewards), 3 * (plain / 3).tanh())
    several = torch.stack([rewards, randn((4, 40), seeded(4), dtype=torch.float64)], 2)
    mixed = 0.25 * plain + 0.75 * group_advantages(several[..., 1])
    torch.testing.assert_close(VGRPO().advantages(several, [0.25, 0.75]), 3 * (mixed / 3).tanh())


# --- costs and options ---


@both
@pytest.mark.parametrize("settings", [{}, {"method": "heun"}, {"trained_steps": 9, "scouts": 12}, {"kl_weight": 0.1}])
def test_evaluations_are_those_reported(algorithm, settings):
    own = {name: value for name, value in settings.items() if name in ("method", "trained_steps")}
    algorithm = replace(algorithm, **own)
    if "scouts" in settings:
        algorithm = modified(algorithm, "previews", scouts=settings["scouts"])
    velocity, reference = Counted(PointwiseVelocity().double()), Counted(PointwiseVelocity().double())
    noise = randn((3, *SHAPE), seeded(1), dtype=torch.float64)
    rollout = algorithm.rollout(velocity, noise, None, streams(3), reward=lambda x: x.flatten(2).mean(2))
    assert (velocity.plain, velocity.gradient) == (18 * algorithm.nfe_old, 0) and rollout.nfe == algorithm.nfe_old
    penalties = [(VelocityPenalty(w), reference) for w in [settings.get("kl_weight", 0)] if w]
    penalized_loss(algorithm, velocity, rollout, torch.zeros(3, 6), penalties)
    assert velocity.gradient == 18 * algorithm.nfe_theta == 18 * algorithm.trained_steps
    assert reference.plain == 18 * evaluations(algorithm, [p for p, _ in penalties])[1]
    assert reference.plain == (velocity.gradient if penalties else 0)


def test_default_costs_are_the_papers():
    assert (VGRPO().nfe_old, VGRPO().nfe_theta) == (16 + 4, 4)
    assert (DiffusionNFT().nfe_old, DiffusionNFT().nfe_theta) == (10 + 9, 9)


def test_defaults_are_the_papers():
    assert VGRPO().one_ratio and VGRPO().group_noise and VGRPO().soft_clip == 3
    assert not DiffusionNFT().group_noise and DiffusionNFT().beta == 1 and DiffusionNFT().advantage_clip == 5


def test_more_times_than_solver_steps():
    algorithm = replace(ELBO, steps=1, trained_steps=7)
    rollout, _ = collect(algorithm, PointwiseVelocity().double())
    assert rollout.v.shape[0] == 7 and len(algorithm.choose(rollout)) == 7 * 18


REFUSED = [
    (DiffusionNFT, {"beta": 0.0}, "beta", "> 0"),
    (DiffusionNFT, {"advantage_clip": -1.0}, "advantage_clip", "> 0"),
    (VGRPO, {"soft_clip": 0.0}, "soft_clip", "> 0"),
    (VGRPO, {"trained_steps": 1001}, "trained_steps", "[1, 1000]"),
    (VGRPO, {"method": "rk4"}, "method", "heun"),
    (VGRPO, {"group_noise": 1}, "group_noise", "True or False"),
    (VGRPO, {"one_ratio": 0}, "one_ratio", "True or False"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_wrong_settings_are_refused_by_name(case):
    cls, settings, name, allowed = case
    with pytest.raises(ValueError) as error:
        cls(**settings)
    assert str(error.value).startswith(name) and allowed in str(error.value)


@both
@pytest.mark.parametrize(
    ("modifier", "settings", "refuser"),
    [
        ("guard", {}, "GuardedRatios"),
        ("chunks", {"chunk": 0}, "ChunkedRatios"),
        ("weights", {"time_weight": "noise"}, "TimeWeights"),
        ("weights", {"time_weight": "equal"}, "TimeWeights"),
    ],
)
def test_what_asks_for_steps_of_the_solver_is_refused(algorithm, modifier, settings, refuser):
    with pytest.raises(ValueError) as error:
        modified(algorithm, modifier, **settings)
    assert str(error.value).startswith(refuser) and type(algorithm).__name__ in str(error.value)
    assert "ratios of its solver's steps" in str(error.value)


@pytest.mark.parametrize("name", ["train_where", "guard", "chunk", "time_weight", "scouts"])
@both
def test_settings_without_a_meaning_are_not_there(algorithm, name):
    assert name not in {field.name for field in fields(algorithm)}


def test_wrong_times_are_refused():
    with pytest.raises(ValueError, match="count"):
        forward_times(2, 0)
    with pytest.raises(ValueError, match="generator"):
        forward_times(2, 3, generator=[seeded(0)])


def test_interface_is_the_common_one():
    assert issubclass(ForwardProcess, Algorithm)
    for cls in (DiffusionNFT, VGRPO):
        assert "losses" not in vars(cls) and "rollout" not in vars(cls) and "losses" not in vars(ForwardProcess)


# --- learning ---


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return ToyTask(ToySettings(pretrain_steps=600), tmp_path_factory.mktemp("toy"), progress=False)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (DiffusionNFT(), {}),
        (DiffusionNFT(beta=0.1), {"collector": "average", "ema": 0.9}),
        (VGRPO(), {}),
        (VGRPO(), {"updates": 2}),
    ],
    ids=["nft", "nft-average", "vgrpo", "vgrpo-two-updates"],
)
def test_learns_the_toy_and_the_control_does_not(toy, algorithm, settings):
    ends = {}
    for shuffle in (False, True):
        toy.policy.load_state_dict(toy.base.state_dict())
        training = TrainSettings(iterations=25, groups=6, eval_every=25, shuffle=shuffle, **settings)
        trainer = Trainer(toy, algorithm, training).run(progress=False)
        start, ends[shuffle] = (e["reward"] for e in trainer.evals)
    assert ends[False] > start + 0.3 and ends[True] < start + 0.15
