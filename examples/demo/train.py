"""One training run: the same seed, the same batches, any optimizer; what it cost and what it reached."""

import math
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from tqdm import tqdm

import corpus
from model import LanguageModel

SEED = 20260101
LARGE = 4096  # elements from which AdamW8bit keeps 8-bit state
LAST = 50  # steps whose mean is the final loss


@dataclass(frozen=True)
class Setting:
    """Sizes of the model and of the training; equal for all runs of one demo."""

    steps: int = 450
    batch: int = 12
    length: int = 128
    width: int = 192
    heads: int = 6
    depth: int = 4
    peak_lr: float = 1e-3
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.01
    held_out_batches: int = 8

    def lr_factor(self, step):
        """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
        warm = max(1, self.steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, self.steps - warm))


@dataclass
class Result:
    """What one run reached. Times in seconds per step, sizes in bytes, losses in nats per byte of text."""

    name: str
    losses: list = field(default_factory=list)
    held_out: float = math.nan
    large_state: int = 0
    state: int = 0
    optimizer_time: float = math.nan
    step_time: float = math.nan

    @property
    def final(self):
        return statistics.fmean(self.losses[-LAST:])


def state_bytes(optimizer):
    """(bytes of state of parameters of at least LARGE elements, bytes of all state); shared tensors count once."""
    seen, large, total = set(), 0, 0
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in seen:
                continue
            seen.add(value.untyped_storage().data_ptr())
            total += value.numel() * value.element_size()
            if parameter.numel() >= LARGE:
                large += value.numel() * value.element_size()
    return large, total


def loss_of(model, inputs, targets):
    """Mean cross entropy in nats; inputs and targets int64 [batch, length]."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def run(name, make_optimizer, text, held_out, setting, steps=None):
    """Train from SEED and return a Result.

    make_optimizer(parameters, lr, betas, weight_decay) builds the optimizer; steps cuts the run short, for timing only:
    the held-out loss is then left out.
    """
    torch.manual_seed(SEED)
    s = setting
    model = LanguageModel(corpus.VOCABULARY, s.length, s.width, s.heads, s.depth)
    optimizer = make_optimizer(model.parameters(), lr=s.peak_lr, betas=s.betas, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, s.lr_factor)
    result, optimizer_times, step_times = Result(name), [], []
    count = steps or s.steps
    pairs = corpus.batches(text, count, s.batch, s.length, SEED)
    bar = tqdm(pairs, desc=name, total=count, mininterval=0.2 if sys.stderr.isatty() else 20)
    for inputs, targets in bar:
        started = time.perf_counter()
        loss = loss_of(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = time.perf_counter()
        optimizer.step()
        after = time.perf_counter()
        schedule.step()
        result.losses.append(loss.item())
        optimizer_times.append(after - before)
        step_times.append(after - started)
        bar.set_postfix(loss=f"{result.losses[-1]:.3f}", refresh=False)
    result.optimizer_time, result.step_time = statistics.median(optimizer_times), statistics.median(step_times)
    result.large_state, result.state = state_bytes(optimizer)
    if steps is None:
        result.held_out = evaluate(model, held_out, setting)
    return result


@torch.no_grad()
def evaluate(model, held_out, setting):
    """Mean loss over a fixed set of held-out windows."""
    s = setting
    pairs = corpus.batches(held_out, s.held_out_batches, s.batch, s.length, SEED + 1)
    return statistics.fmean(loss_of(model, inputs, targets).item() for inputs, targets in pairs)
