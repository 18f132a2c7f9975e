"""Training loop, class style: methods that are the places to override.

The sister files script_loop.py and function_loop.py do the same work, to the bit, in other shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kerastorch.loops.loop import Loop, as_pair
from kerastorch.run import Run


class ClassLoop(Loop):
    """A ladder, each rung overridable alone: fit, train_epoch, train_step; evaluate, eval_step; predict, predict_step.

    self.run, self.net, self.loss_fn and self.optimizer are those of the running call.
    """

    def fit(self, run: Run) -> None:
        for epoch in run.epoch_range():
            self.train_epoch()
            if run.validation_is_due:
                self.evaluate(run)
            run.advance_lr_scheduler("epoch")

    def train_epoch(self) -> None:
        run = self.run
        run.net.train()
        for x, y, sample_weight in run.train_batches():
            loss, outputs = as_pair(self.train_step(x, y, sample_weight), "train_step")
            run.record(loss, outputs, y, sample_weight)  # stays on the device: no sync
            run.advance_lr_scheduler("step")

    def train_step(self, x: Any, y: Any, sample_weight: Tensor | None) -> tuple[Tensor, Any]:
        """Update the weights on one batch; return the loss (a scalar on the device) and the outputs."""
        run = self.run
        with run.autocast():
            outputs = run.forward(x)
            loss = self.loss_fn(outputs, y, sample_weight)
        run.scaler.scale(run.share(loss)).backward()
        if run.step_is_due:  # always, without gradient accumulation
            run.prepare_gradients()
            run.scaler.step(self.optimizer)
            run.scaler.update()
            self.optimizer.zero_grad()
        return loss, outputs

    @torch.no_grad()
    def evaluate(self, run: Run) -> None:
        run.net.eval()
        for x, y, sample_weight in run.eval_batches():
            loss, outputs = as_pair(self.eval_step(x, y, sample_weight), "eval_step")
            run.record(loss, outputs, y, sample_weight)

    def eval_step(self, x: Any, y: Any, sample_weight: Tensor | None) -> tuple[Tensor, Any]:
        """Return the loss and the outputs of one batch."""
        run = self.run
        with run.autocast():
            outputs = run.forward(x)
            loss = self.loss_fn(outputs, y, sample_weight)
        return loss, outputs

    @torch.no_grad()
    def predict(self, run: Run) -> None:
        run.net.eval()
        for x in run.predict_batches():
            run.collect(self.predict_step(x))

    def predict_step(self, x: Any) -> Any:
        """Return the outputs of one batch."""
        with self.run.autocast():
            return self.run.forward(x)
