"""A trial on one batch, and what speed and memory it shows. Sisters: copies.py, data.py, net.py."""

from __future__ import annotations

import inspect
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset, TensorDataset

from kerastorch.data import Batch
from kerastorch.data.arrays import NestedDataset
from kerastorch.device import leaves
from kerastorch.loops.function_loop import train_step
from kerastorch.report import Finding, Layer, format_bytes
from kerastorch.run import Run

MAX_SECONDS = 5.0  # of a trial that is tried again at other rates
SLOW_SECONDS, SLOW_RATIO = 0.005, 2.0  # a draw below either is never called slow: noise reaches that far


@dataclass
class Trial:
    """Steps on one batch: the loss before each, and the seconds that each took."""

    run: Run
    chance: float | None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def has_fallen(self, share: float) -> bool:
        return self.losses[-1] < self.losses[0] - share * abs(self.losses[0])

    @property
    def has_overfitted(self) -> bool:
        last = self.losses[-1]
        if self.chance is not None and last >= self.chance:  # no better than knowing nothing of x
            return False
        return self.has_fallen(0.5) or abs(last) < 1e-3 or (self.chance is not None and last < 0.1 * self.chance)


def needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def overfit(make_run: Callable[..., Run], batch: Batch, steps: int, chance: float | None, factor: float = 1.0) -> Trial:
    """Train copies on one batch, the learning rate times factor, dropout off; stop at a loss that is not finite."""
    trial = Trial(make_run([batch] * (4 * steps + 1)), chance)
    for module in trial.run.net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    for group in trial.run.optimizer.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * factor
    for x, y, sample_weight in trial.run.train_batches():
        trial.run.loss_fn.on_first_batch = None  # the look was taken before
        start = time.perf_counter()
        loss, _ = train_step(trial.run, x, y, sample_weight)
        trial.losses.append(loss.item())  # a sync: without it the seconds would be those of the launches
        trial.seconds.append(time.perf_counter() - start)
        is_due = len(trial.losses) > 1 and (len(trial.losses) - 1) % steps == 0
        if not math.isfinite(trial.losses[-1]) or (is_due and (trial.has_overfitted or not trial.has_fallen(0.1))):
            break  # a small net at Adam's usual rate is on its way, but not there, after 50 steps
    return trial


def check_trial(trial: Trial, try_again: Callable[..., Trial]) -> Finding:
    first, last = trial.losses[0], trial.losses[-1]
    rates = dict.fromkeys(f"{float(group['lr']):.4g}" for group in trial.run.optimizer.param_groups if "lr" in group)
    figures = f"learning rate {', '.join(rates)}: " if rates else ""
    figures += f"{len(trial.losses) - 1} steps on one batch take the loss from {first:.4g} to {last:.4g}"
    if not math.isfinite(last):
        text = f"{figures}. Lower the learning rate, or set clip_grad_norm=1.0 in compile()."
        return Finding("error", "The loss is not finite", text)
    if trial.has_overfitted:
        return Finding("ok", "One batch can be overfitted", f"{figures}.")
    reason = "Look for a wrong loss, targets that don't belong to their rows, too small a net, too few steps."
    if not trial.has_fallen(0.01) and last <= first:
        reason = f"It hardly moves: the learning rate is too low, or gradients don't arrive. {reason}"
    elif last > first:
        reason = f"It rises: the learning rate is too high. {reason}"
    for factor in (10.0, 100.0, 0.1) if rates and sum(trial.seconds) < MAX_SECONDS else ():
        again = try_again(factor)
        if math.isfinite(again.losses[-1]) and again.has_overfitted:
            if factor == 10 and trial.has_fallen(0.1):
                text = f"{figures}; at 10 times the rate to {again.losses[-1]:.4g}."
                return Finding("ok", "One batch can be overfitted, slowly", text)
            what = "too low" if factor > 1 else "too high"
            reason = f"The learning rate is {what}: at {factor:g} times it the loss falls to {again.losses[-1]:.4g}."
            break
    return Finding("warning", "One batch can't be overfitted", f"{figures}. {reason}")


# ---- speed and memory ----


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds[1:] or seconds)  # the first pays for what is set up once


def check_speed(batches: object, draw: float, step: float) -> Finding:
    figures = f"a batch takes {1e3 * draw:.3g} ms to draw, a step {1e3 * step:.3g} ms"
    is_slow = draw > max(SLOW_SECONDS, SLOW_RATIO * step)
    if not is_slow or not isinstance(batches, DataLoader) or batches.num_workers or _is_in_memory(batches.dataset):
        return Finding("ok", "Speed", f"{figures}.")
    workers = min(math.ceil(draw / step), os.cpu_count() or 1)
    text = f"{figures}: drawing takes {draw / step:.1f} times as long. Give a DataLoader(..., num_workers={workers})."
    return Finding("warning", "Data is slower than the net", text)


def _is_in_memory(dataset: object) -> bool:
    """Whether these rows are tensors already: workers would only copy them."""
    return isinstance(dataset.dataset if isinstance(dataset, Subset) else dataset, (TensorDataset, NestedDataset))


def check_memory(layers: Sequence[Layer], num_samples: int, run: Run) -> Finding:
    weights, trained = list(run.net.parameters()), [p for p in run.net.parameters() if p.requires_grad]
    state = [leaf for entry in run.optimizer.state.values() for leaf in leaves(entry) if isinstance(leaf, Tensor)]
    per_sample = sum(layer.bytes for layer in layers) / num_samples
    text = (
        f"weights {format_bytes(_nbytes(weights))}, gradients {format_bytes(_nbytes(trained))}, "
        f"optimizer {format_bytes(_nbytes(state))}; layer outputs {format_bytes(per_sample)} a sample, "
        f"{num_samples} in a batch."
    )
    if run.device.type == "cuda" and per_sample:
        free, _ = torch.cuda.mem_get_info(run.device)
        samples = int(0.8 * free / (2 * per_sample))  # outputs and their gradients; a fifth stays for workspaces
        text += f" About {samples:,} samples fit into the {format_bytes(free)} that are free."
    return Finding("ok", "Memory", text)


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
