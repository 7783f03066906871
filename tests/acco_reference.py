"""ACCO, DPU and weight prediction as one loop over samples with one whole optimizer: FACTS 2.6, and nothing of the library.

`done`: for every step a list over the rounds of lists over the replicas of the micro-batches that were done, counted from 0 in
the step; default: all of the first and of the second half (ACCO), or all.
"""

from __future__ import annotations

import copy

import torch


def halves(accumulate, rounds):
    first = -(-accumulate // 2) if rounds == 2 else accumulate
    return [list(range(first)), list(range(first, accumulate))][:rounds]


def all_done(accumulate, rounds, replicas, contributions=None):
    shares = contributions or [accumulate] * replicas
    return [[part[:share] for share in shares] for part in halves(accumulate, rounds)]


class Reference:
    """The model (trained in place), its optimizer, and what `loss(model, x, y)` is of a single sample."""

    def __init__(self, kind, model, optimizer, loss, *, scale=1.0, clip=None, schedule=None, accumulate=2, amend=None):
        self.kind, self.model, self.loss, self.scale, self.clip = kind, model, loss, scale, clip
        self.optimizer = optimizer(list(model.parameters()))
        self.schedule = None if schedule is None else schedule(self.optimizer)
        self.accumulate, self.amend = accumulate, amend
        self.rounds = 2 if kind == "acco" else 1
        self.late = None  # (sums, samples)
        self.ahead = None
        self.before = None
        self.samples = []  # of each commit

    def sums(self, model, batches, done):
        """Sum of the gradients of single samples of these micro-batches of each replica, and how many samples they are."""
        parameters, count = list(model.parameters()), 0
        total = [torch.zeros_like(p) for p in parameters]
        for (x, y), mine in zip(batches, done):
            xs, ys = x.tensor_split(self.accumulate), y.tensor_split(self.accumulate)
            for k in mine:
                for a, b in zip(xs[k], ys[k]):
                    found = torch.autograd.grad(self.loss(model, a[None], b[None]), parameters, allow_unused=True)
                    total = [t if g is None else t + g for t, g in zip(total, found)]
                    count += 1
        return total, count

    def apply(self, model, optimizer, late):
        gradients = [total / late[1] for total in late[0]]
        if self.amend is not None:
            now = [p.detach().clone() for p in model.parameters()]
            drift = [torch.zeros_like(p) if self.before is None else p - b for p, b in zip(now, self.before or now)]
            gradients = [self.amend(g, d) for g, d in zip(gradients, drift)]
            self.before = now
        for p, g in zip(model.parameters(), gradients):
            p.grad = g
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(model.parameters()), self.clip)
        optimizer.step()

    def commit(self, late):
        self.apply(self.model, self.optimizer, late)
        self.samples.append(late[1])
        if self.schedule is not None:
            self.schedule.step()

    def foreseen(self, late):
        """A model after one more step, of copies."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        for group in optimizer.param_groups:
            group["lr"] *= self.scale
        self.apply(model, optimizer, late)
        return model

    def step(self, batches, done=None):
        done = done or all_done(self.accumulate, self.rounds, len(batches))
        if self.kind == "acco":
            estimate = self.model if self.late is None else self.foreseen(self.late)
            g, n = self.sums(self.model, batches, done[0])
            if self.late is not None:
                g, n = [a + b for a, b in zip(g, self.late[0])], n + self.late[1]
            late = self.sums(estimate, batches, done[1])
            self.commit((g, n))
            self.late = late
            return
        late = self.sums(self.model if self.ahead is None else self.ahead, batches, done[0])
        if self.late is not None:
            self.commit(self.late)
            if self.kind == "wp":
                self.ahead = self.foreseen(self.late)
        self.late = late
