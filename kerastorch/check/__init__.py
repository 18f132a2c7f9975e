"""check_model: a pre-flight look at net, loss, optimizer and data; all that it tries, it tries on copies.

The checks stand in the order in which they run: x (data.py), forward, targets, loss, gradients (net.py), a trial on one
batch, speed (trial.py); copies.py makes what they try.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from kerastorch.check.copies import copied_run, draw, kept_as_it_was
from kerastorch.check.data import check_x, check_y
from kerastorch.check.net import Watch, chance_loss, check_gradients, check_start, has_gradient, take_look
from kerastorch.check.trial import check_memory, check_speed, check_trial, median, needs_closure, overfit
from kerastorch.data import BatchSource, make_dataset, make_source, needs_unpack
from kerastorch.device import preserved_random_state
from kerastorch.errors import check_int
from kerastorch.report import Finding, Report
from kerastorch.run import Run

if TYPE_CHECKING:
    from kerastorch.model import Model

__all__ = ["check_model"]


def check_model(model: Model, x: Any, y: Any = None, *, batch_size: int | None = None, steps: int = 50) -> Report:
    """Look for the faults that training would hide, on up to 8 batches and in a short trial; return a Report.

    x, y, batch_size: as in fit; arrays and Datasets are shuffled.   steps: of the trial, which tries to overfit the
    first batch, from the weights as they are and at the optimizer's own learning rate, before any scheduler; a loss
    that has fallen, but not by half, gets up to 4 times as many.
    Steps are plain ones (net(x), loss, backward, step), whatever the loop. Net, loss and optimizer are copied: weights,
    gradients, training flags, random states and generators held by the data are afterwards what they were.
    Raises RuntimeError before compile(), ValueError for an iterator (it can be read only once), and as fit does for
    data that can't be read; an error inside forward comes as it is.
    """
    compiled = model._compiled
    if compiled is None:
        raise RuntimeError('call compile() before check(), for example model.compile("cross_entropy", "adam").')
    check_int("steps", steps)
    if batch_size is not None:
        check_int("batch_size", batch_size)
    data = make_dataset(x, y, caller="check")
    if isinstance(data, Iterator):
        raise ValueError(
            f"check() got a {type(x).__name__}, an iterator, which can be read only once: the batches it looks at "
            "would be lost to fit(). Give a DataLoader, arrays or a list of batches."
        )
    if isinstance(data, DataLoader):
        data = copy.copy(data)
        data._iterator = None  # persistent workers are kept there: a pass under way must not be begun anew
    unpack = compiled.unpack if needs_unpack(x, y) else None
    source = make_source(data, name="check()'s data", batch_size=batch_size, shuffle=True, unpack=unpack)
    with preserved_random_state(), kept_as_it_was(model.net, data), torch.enable_grad():
        is_trained = bool(compiled.optimizer.state) or bool(model.history.epoch)
        return _check(partial(copied_run, model, compiled), source, compiled.optimizer, steps, is_trained)


def _check(
    make_run: Callable[..., Run], source: BatchSource, optimizer: Optimizer, steps: int, is_trained: bool
) -> Report:
    batches, draw_seconds = draw(source)
    findings = check_x([x for x, _, _ in batches])

    # ---- forward ----
    run = make_run(batches)
    passes = run.train_batches()
    x, y, sample_weight = next(passes)
    with run.autocast(), Watch(run.net) as watch:
        outputs = run.forward(x)
    count = sum(parameter.numel() for parameter in run.net.parameters())
    findings.append(Finding("ok", "Layers", f"{len(watch.layers)} calls, {count:,} parameters."))
    findings += watch.findings or [Finding("ok", "Activations", "none dead, none saturated.")]
    memory = partial(check_memory, watch.layers, run.num_samples)

    # ---- targets: against themselves, then against the outputs with the look that fit takes at a first batch ----
    findings += check_y([y for _, y, _ in batches])
    look, run.loss_fn.on_first_batch = run.loss_fn.on_first_batch, None
    if look is not None and not _has_error(findings):
        findings += take_look(look, outputs, y, "Outputs and targets")
        run.net.eval()  # in training, batch norm would refuse a batch of one row
        for batch, (x_next, y_next, _) in enumerate(passes, start=1):
            if not _has_error(findings):
                with run.autocast(), torch.no_grad():
                    found = take_look(look, run.forward(x_next), y_next, f"Outputs and targets of batch {batch}")
                findings += [finding for finding in found if finding.level == "error"]
    if _has_error(findings):
        text = "loss, gradients, a batch to overfit, speed and memory: put the errors right first."
        return Report([*findings, Finding("ok", "Not tried", text)], watch.layers)

    # ---- loss and gradients ----
    with run.autocast():
        loss = run.loss_fn(outputs, y, sample_weight)
    chance = chance_loss(run.loss_fn, outputs, y, sample_weight)
    findings.append(check_start(loss.item(), chance, is_trained))
    if not loss.requires_grad:
        text = "no parameter reaches the loss: all are frozen, or forward or loss detaches (.detach(), .data)."
        findings.append(Finding("error", "Nothing to train", text))
    if _has_error(findings):
        return Report(findings, watch.layers)
    run.scaler.scale(loss).backward()
    without_gradient = [name for name, p in run.net.named_parameters() if p.requires_grad and not has_gradient(p)]

    # ---- a trial on one batch ----
    if needs_closure(optimizer):
        text = f"{type(optimizer).__name__} needs a closure, which plain steps don't give it."
        findings += [Finding("ok", "One batch not tried", text), *check_gradients(run, without_gradient, watch.read)]
        return Report([*findings, memory(run)], watch.layers)
    try_again = partial(overfit, make_run, batches[0], steps, chance)
    trial = try_again()
    findings.append(check_trial(trial, try_again))
    if without_gradient and math.isfinite(trial.losses[-1]):
        # a gradient that only waits for a layer of zeros to move is there after the first step
        with trial.run.autocast():
            loss = trial.run.loss_fn(trial.run.forward(x), y, sample_weight)
        trial.run.scaler.scale(loss).backward()
        later = dict(trial.run.net.named_parameters())
        without_gradient = [name for name in without_gradient if not has_gradient(later[name])]
    findings += check_gradients(run, without_gradient, watch.read)
    findings += [check_speed(source.batches, median(draw_seconds), median(trial.seconds)), memory(trial.run)]
    return Report(findings, watch.layers)


def _has_error(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)
