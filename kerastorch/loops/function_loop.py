"""Training loop, function style: small functions, each one step of the recipe.

The sister files script_loop.py and class_loop.py do the same work, to the bit, in other shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kerastorch.loops.loop import Loop, as_pair
from kerastorch.run import Run

Step = Callable[[Run, Any, Any, Tensor | None], tuple[Tensor, Any]]
PredictStep = Callable[[Run, Any], Any]


def train_step(run: Run, x: Any, y: Any, sample_weight: Tensor | None) -> tuple[Tensor, Any]:
    """Update the weights on one batch; return the loss (a scalar on the device) and the outputs."""
    with run.autocast():
        outputs = run.forward(x)
        loss = run.loss_fn(outputs, y, sample_weight)
    run.scaler.scale(run.share(loss)).backward()
    if run.step_is_due:  # always, without gradient accumulation
        run.prepare_gradients()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
    return loss, outputs


def eval_step(run: Run, x: Any, y: Any, sample_weight: Tensor | None) -> tuple[Tensor, Any]:
    """Return the loss and the outputs of one batch."""
    with run.autocast():
        outputs = run.forward(x)
        loss = run.loss_fn(outputs, y, sample_weight)
    return loss, outputs


def predict_step(run: Run, x: Any) -> Any:
    """Return the outputs of one batch."""
    with run.autocast():
        return run.forward(x)


def train_epoch(run: Run, train_step: Step) -> None:
    run.net.train()
    for x, y, sample_weight in run.train_batches():
        loss, outputs = as_pair(train_step(run, x, y, sample_weight), "train_step")
        run.record(loss, outputs, y, sample_weight)  # stays on the device: no sync
        run.advance_lr_scheduler("step")


@torch.no_grad()
def evaluate(run: Run, eval_step: Step) -> None:
    run.net.eval()
    for x, y, sample_weight in run.eval_batches():
        loss, outputs = as_pair(eval_step(run, x, y, sample_weight), "eval_step")
        run.record(loss, outputs, y, sample_weight)


@torch.no_grad()
def predict(run: Run, predict_step: PredictStep) -> None:
    run.net.eval()
    for x in run.predict_batches():
        run.collect(predict_step(run, x))


class FunctionLoop(Loop):
    """The recipe over the functions above; FunctionLoop(train_step=f) swaps one of them.

    train_step, eval_step: (run, x, y, sample_weight) -> (loss, outputs).   predict_step: (run, x) -> outputs.
    """

    def __init__(
        self, train_step: Step = train_step, eval_step: Step = eval_step, predict_step: PredictStep = predict_step
    ) -> None:
        self.train_step, self.eval_step, self.predict_step = train_step, eval_step, predict_step

    def fit(self, run: Run) -> None:
        for epoch in run.epoch_range():
            train_epoch(run, self.train_step)
            if run.validation_is_due:
                evaluate(run, self.eval_step)
            run.advance_lr_scheduler("epoch")

    def evaluate(self, run: Run) -> None:
        evaluate(run, self.eval_step)

    def predict(self, run: Run) -> None:
        predict(run, self.predict_step)
