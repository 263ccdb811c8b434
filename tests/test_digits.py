"""Digits: the data, the networks, the figures that show reward hacking, and a short run that learns."""

import math

import pytest
import torch
from helpers import weights

from neighbor_grpo.flow import randn, seeded
from neighbor_grpo.neighbor import NeighborGRPO
from neighbor_grpo.runs.pictures import image_grid
from neighbor_grpo.runs.trainer import Trainer
from neighbor_grpo.tasks.digits import (
    NULL,
    Classifier,
    DigitsSettings,
    DigitsTask,
    UNet,
    diversity,
    frechet_distance,
    halves,
    load_images,
    train_classifier,
)
from neighbor_grpo.training import TrainSettings

FIGURES = {"reward", "judge", "frechet", "diversity"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "Where the task keeps its networks."
    folder = tmp_path_factory.mktemp("digits")
    make_task(folder)
    return folder


def make_task(folder, **settings):
    return DigitsTask(DigitsSettings(pretrain_steps=150, eval_samples=256, **settings), folder, progress=False)


# --- data and networks ---


def test_images_are_real_digits():
    images, labels = load_images()
    assert images.shape == (1797, 1, 8, 8) and labels.shape == (1797,)
    assert images.min() == -1 and images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("total", [2, 11, 1797])
def test_halves_are_disjoint_and_complete(total):
    first, second = halves(total)
    assert len(first) == total // 2 and sorted(torch.cat([first, second]).tolist()) == list(range(total))
    assert torch.equal(first, halves(total)[0])


def test_halves_hold_every_digit_alike():
    _, labels = load_images()
    first, second = (labels[half].bincount(minlength=10) for half in halves(len(labels)))
    assert (first - second).abs().max() < 40


def test_networks_have_the_shapes_they_promise():
    torch.manual_seed(0)
    network, x = UNet(), torch.randn(5, 1, 8, 8)
    torch.nn.init.normal_(network.out.weight, std=0.1)
    t, labels = torch.rand(5), torch.tensor([0, 3, 9, NULL, NULL])
    v = network(x, t, labels)
    assert v.shape == x.shape
    assert not torch.equal(v, network(x, t, labels.flip(0)))  # labels count
    assert not torch.equal(v, network(x, 1 - t, labels))  # and times
    torch.testing.assert_close(network(x[2:3], t[2:3], labels[2:3]), v[2:3], atol=1e-5, rtol=0)
    assert Classifier()(x).shape == (5, 10) and Classifier().features(x).shape == (5, 32)


def test_classifiers_recognise_the_half_they_have_not_seen(folder):
    images, labels = load_images()
    mine, other = halves(len(images))
    task = make_task(folder)
    for network, unseen in ((task.reward_model, other), (task.judge, mine)):
        with torch.no_grad():
            accuracy = (network(images[unseen]).argmax(1) == labels[unseen]).float().mean().item()
        assert accuracy >= 0.95
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_reward_model_and_judge_see_nothing_of_each_other(folder, monkeypatch):
    seen, (images, _) = [], load_images()
    record = lambda network, images, labels, **more: (seen.append(images), network)[1]
    monkeypatch.setattr("neighbor_grpo.tasks.digits.train_classifier", record)
    monkeypatch.setattr("neighbor_grpo.tasks.digits.train_flow", lambda network, *more, **options: (network, []))
    DigitsTask(progress=False)
    keys = [{tuple(image.flatten().tolist()) for image in part} for part in seen]
    assert len(keys) == 2 and not keys[0] & keys[1]
    assert sum(map(len, seen)) == len(images)


def test_pretraining_follows_from_its_seed_alone(monkeypatch):
    monkeypatch.setattr("neighbor_grpo.tasks.digits.train_classifier", lambda network, *more, **options: network)
    tasks = []
    for seed in (0, 0, 1):
        torch.rand(3 + len(tasks))
        tasks.append(DigitsTask(DigitsSettings(pretrain_steps=2), seed=seed, progress=False))
    for name in ("base", "judge", "reward_model"):
        first, again, other = (weights(getattr(task, name)) for task in tasks)
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_training_a_classifier_repeats_itself():
    images, labels = load_images()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        network = train_classifier(Classifier(8), images[:256], labels[:256], epochs=2, seed=seed)
        outputs.append(network(images[:3]).detach())
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_a_grid_places_images_row_by_row():
    images = torch.arange(1.0, 8).reshape(7, 1, 1, 1).expand(7, 1, 2, 2)
    large = image_grid(images, columns=3, frame=0.0)
    assert large.shape == (12, 12, 1)  # three rows of three, each image with its frame; the last row is filled up
    assert large[1::4, 1::4, 0].tolist() == large[2::4, 2::4, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert not large[::4].any() and not large[3::4].any() and not large[:, ::4].any() and not large[:, 3::4].any()
    assert image_grid(images).shape == (12, 12, 1), "nearly square"
    for wrong in (dict(images=images[:0]), dict(images=images, columns=-1)):
        with pytest.raises(ValueError, match="(images|columns) must be"):
            image_grid(**wrong)


# --- figures ---


def test_frechet_distance_of_a_set_to_itself_is_zero():
    a = randn((500, 8), seeded(0))
    assert frechet_distance(a, a) < 1e-8
    assert frechet_distance(a, a[torch.randperm(500)]) < 1e-8


def test_frechet_distance_is_the_closed_form():
    # Both covariances are diagonal: |shift|^2 + sum of squared differences of the standard deviations.
    z = torch.linalg.qr(randn((400, 6), seeded(0), dtype=torch.float64) - 0).Q
    z = torch.linalg.qr(z - z.mean(0)).Q * math.sqrt(399)  # mean 0 and covariance 1, exactly
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0]).double(), torch.arange(6).double()
    expected = shift.square().sum() + (scale - 1).square().sum()
    assert frechet_distance(z, z * scale + shift) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_correlated_features():
    z = torch.linalg.qr(randn((400, 3), seeded(0), dtype=torch.float64)).Q
    z = torch.linalg.qr(z - z.mean(0)).Q * math.sqrt(399)
    a, b = (torch.randn(3, 3, generator=seeded(k), dtype=torch.float64) for k in (1, 2))
    cov_a, cov_b = a @ a.T, b @ b.T
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    expected = cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet_distance(z @ a.T, z @ b.T) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(z @ b.T, z @ a.T) == pytest.approx(expected.item(), rel=1e-6)


def test_diversity_compares_pairwise_distances():
    real = randn((300, 1, 8, 8), seeded(0))
    assert diversity(real, real) == pytest.approx(1)
    assert diversity(0.5 * real + 3, real) == pytest.approx(0.5, rel=1e-5)
    assert diversity(real[:1].expand(50, 1, 8, 8), real) == 0


def test_class_reward_is_a_probability(folder):
    images, labels = load_images()
    task = make_task(folder, target=3)
    rewards = task.reward(images)
    assert rewards.shape == (1797,) and not rewards.requires_grad
    assert 0 <= rewards.min() and rewards.max() <= 1
    assert rewards[labels == 3].mean() > 0.9 and rewards[labels != 3].mean() < 0.05
    assert task.reward(100 * randn((50, 1, 8, 8), seeded(0))).max() <= 1


def test_ink_reward_is_mean_brightness_without_a_bound(folder):
    task = make_task(folder, reward="ink")
    levels = torch.tensor([-1.0, 0.0, 1.0, 9.0]).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert task.reward(levels).tolist() == [0, 0.5, 1, 5]


def test_conditions_are_the_null_label(folder):
    assert make_task(folder).conditions(torch.tensor([0, 0])).tolist() == [NULL, NULL]


def test_evaluation_repeats_itself_and_shows_what_the_base_can_do(folder):
    task = make_task(folder)
    figures = task.evaluate(task.base)
    torch.rand(3)
    assert task.evaluate(task.base) == figures and set(figures) == FIGURES
    assert 0.02 < figures["reward"] < 0.3  # one class of ten: headroom
    assert figures["frechet"] > 0 and figures["diversity"] > 0.5
    asked = task.evaluate(task.base, label=3)
    assert asked["judge"] > 2 * figures["judge"] and asked["frechet"] < figures["frechet"]


def test_real_digits_have_the_best_figures(folder):
    task = make_task(folder)
    features = task.judge.features(task.real)
    half = torch.randperm(len(features), generator=seeded(0)).chunk(2)
    base = task.judge.features(task.sample(task.base, 256))
    assert frechet_distance(features[half[0]], features[half[1]]) < 0.5 * frechet_distance(base, features)


def test_pictures_are_saved(folder, tmp_path):
    task = make_task(folder)
    task.draw({"before": task.base, "after": task.policy}, tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


# --- learning ---


def test_a_short_run_raises_reward_and_judge(folder):
    task = make_task(folder)
    settings = TrainSettings(iterations=30, groups=8, lr=5e-4, eval_every=30)
    before, after = Trainer(task, NeighborGRPO(), settings).run(progress=False).evals
    assert after["reward"] > before["reward"] + 0.25
    assert after["judge"] > before["judge"] + 0.15  # not only the network that was asked for
    assert task.evaluate(task.base) == {k: v for k, v in before.items() if k != "iteration"}  # the base stays


def test_ink_is_hacked(folder):
    task = make_task(folder, reward="ink")
    settings = TrainSettings(iterations=40, groups=6, lr=1e-3, eval_every=40)
    before, after = Trainer(task, NeighborGRPO(), settings).run(progress=False).evals
    assert after["reward"] > before["reward"] + 0.2
    assert after["frechet"] > 2 * before["frechet"] and after["diversity"] < before["diversity"]
