"""Closed forms, small networks and a bare server that several tests share."""

import contextlib
import socket
import threading

import torch
from torch import nn

from neighbor_grpo.flow import randn, seeded, time_grid
from neighbor_grpo.rollouts import Watched
from neighbor_grpo.runs.folder import Checkpoints, read_rows
from neighbor_grpo.solvers import solve
from neighbor_grpo.training import Task


class GaussianFlow:
    "Data `N(mean, scale^2)` in each dimension: the one flow whose velocity and trajectories are known exactly."

    def __init__(self, mean=1.0, scale=0.2):
        self.mean, self.scale = mean, scale

    def spread(self, t):
        "Standard deviation of x_t."
        return (((1 - t) * self.scale) ** 2 + t**2) ** 0.5

    def velocity(self, x, t, cond=None):
        "Derivative of `state` with respect to t."
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        growth = (t - (1 - t) * self.scale**2) / self.spread(t) ** 2
        return -self.mean + growth * (x - (1 - t) * self.mean)

    def state(self, z, t):
        "Where the trajectory of the quantile z stands at time t."
        return (1 - t) * self.mean + self.spread(t) * z


def reverse_sde(x, v, t, t_next, diffusion):
    "One Euler-Maruyama step of `dx = (v - g^2/2 score) dt + g dw`, with the score from the implied noise."
    noise = x + (1 - t) * v
    score = -noise / t
    drift = v - diffusion**2 / 2 * score
    return x + drift * (t_next - t), diffusion * (t - t_next) ** 0.5


class PointwiseVelocity(nn.Module):
    "A velocity that treats every number alike: the same bits whatever else is in the batch."

    def __init__(self, *scales):
        super().__init__()
        self.scales = nn.Parameter(torch.tensor(scales or (0.5, -0.3, 0.2)))

    def forward(self, x, t, cond=None):
        a, b, c = self.scales
        t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return a * x.clamp(-1.5, 1.5) + b * t + c


class SmallNet(nn.Module):
    "A velocity for small images in any floating-point format, with an optional shift as its condition."

    def __init__(self, features=12, width=16, dtype=torch.float64):
        super().__init__()
        self.inp, self.out = nn.Linear(features + 1, width, dtype=dtype), nn.Linear(width, features, dtype=dtype)

    def forward(self, x, t, cond=None):
        h = torch.cat([x.flatten(1), t[:, None]], 1).to(self.inp.weight.dtype)
        v = self.out(torch.tanh(self.inp(h))).view_as(x)
        return v if cond is None else v + cond.to(v).reshape(-1, *[1] * (x.ndim - 1))


class Counted:
    "Counts the samples that go through a velocity, with and without gradient, and remembers the times it was given."

    def __init__(self, velocity):
        self.velocity, self.calls, self.plain, self.gradient, self.batches, self.times = velocity, 0, 0, 0, [], []

    def __call__(self, x, t, cond=None):
        assert t.shape == x.shape[:1]
        self.calls += 1
        self.batches.append(len(x))
        self.times.append(t)
        if torch.is_grad_enabled():
            self.gradient += len(x)
        else:
            self.plain += len(x)
        return self.velocity(x, t, cond)


def correlation(a, b):
    "Pearson correlation of all numbers of two tensors."
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def gradients(module):
    "A copy of the gradients of a module as one vector, zero where there is none."
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()]
    ).clone()


def penalized_loss(algorithm, velocity, rollout, advantages, penalties, generator=None, on_policy=False, micro_batch=0):
    "The loss of one update as the loop makes it; `penalties` are pairs of a penalty and its reference."
    chosen, total = algorithm.choose(rollout, generator), 0
    for states in chosen.split(micro_batch):
        watched, distance = Watched(velocity), algorithm.distance_weights(rollout, states)
        loss = algorithm.loss(watched, rollout, states, advantages, on_policy)
        total = total + loss + sum(penalty.distance(watched, reference, distance) for penalty, reference in penalties)
    return total / len(chosen)


def weights(module):
    "A copy of the weights of a module as one vector."
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def strayed(found, expected, start):
    """How far two trained vectors of weights are apart, as a share of the way that training took.

    AdamW divides a gradient by its own size, so a gradient that is nothing but rounding moves its weight by up to the
    rate, in either direction. No bound on the largest difference below twice the rate times the updates holds on every
    processor. Such weights are few: over all weights rounding stays far below a hundredth of the way, and runs that
    have not trained on the same numbers are about as far apart as the way is long.
    """
    return ((found - expected).norm() / (expected - start).norm()).item()


STRAYED = 0.01  # of the way; rounding alone stays below a tenth of it


class TinyTask(Task):
    "Points that shall move to (1, 1), five prompts that shift the velocity, and dropout, which draws global numbers."

    shape, prompts = (2,), 5

    def __init__(self, seed=0, dropout=0.1):
        torch.manual_seed(seed)
        self.policy = ShiftedMLP(dropout)

    def conditions(self, prompts):
        return {"shift": prompts.float() / 10}

    def reward(self, samples, prompts):
        return -(samples - 1).square().sum(1)

    def evaluate(self, velocity):
        noise, conditions = randn((16, 2), seeded(0, 9)), {"shift": torch.zeros(16)}
        training = velocity.training
        x = solve(velocity.eval(), noise, time_grid(4), conditions).x[-1]
        velocity.train(training)
        return {"reward": self.reward(x, None).mean().item()}


class ShiftedMLP(nn.Module):
    "A small network whose condition is added to its output."

    def __init__(self, dropout=0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 2))

    def forward(self, x, t, cond):
        return self.net(torch.cat([x, t[:, None]], 1)) + cond["shift"][:, None]


def outcome(folder):
    "Everything that a run ends with, but for the time it took: newest checkpoint, metrics and evaluations."
    tensors, state = Checkpoints(folder / "checkpoints").load()
    flat = {f"{group}.{name}": value for group, values in tensors.items() for name, value in values.items()}
    metrics = [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / "metrics.jsonl")]
    return flat, {"state": state, "metrics": metrics, "evals": read_rows(folder / "eval.jsonl")}


def differences(folder, expected):
    "What two runs do not have in common, bit by bit."
    (tensors, rest), (expected_tensors, expected_rest) = outcome(folder), outcome(expected)
    names = tensors.keys() & expected_tensors.keys()
    found = sorted(tensors.keys() ^ expected_tensors.keys())
    found += [name for name in sorted(names) if not torch.equal(tensors[name], expected_tensors[name])]
    return found + [f"{key}: {rest[key]}" for key in rest if rest[key] != expected_rest[key]]


def assert_same_outcome(folder, expected):
    found = differences(folder, expected)
    assert not found, found


class Listener:
    "A server of bare sockets, which may misbehave: `serve` gets each connection in a thread of its own."

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=(self.socket.accept()[0],), daemon=True).start()

    def serve(self, connection):
        raise NotImplementedError

    def read(self, file):
        "Head and body of a request."
        head = b"".join(iter(file.readline, b"\r\n")).decode()
        sizes = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length")]
        return head, file.read(int(sizes[0]))
