"""Training loop, script style: the whole loop as you would type it in a notebook, read top to bottom.

The sister files function_loop.py and class_loop.py do the same work, to the bit, in other shapes.
"""

from __future__ import annotations

import torch

from kerastorch.loops.loop import Loop
from kerastorch.run import Run


class ScriptLoop(Loop):
    """One function an action; every line that touches the weights is in sight."""

    def fit(self, run: Run) -> None:
        net, loss_fn, optimizer, scaler = run.net, run.loss_fn, run.optimizer, run.scaler
        for epoch in run.epoch_range():
            # ---- train ----
            net.train()
            for x, y, sample_weight in run.train_batches():
                with run.autocast():
                    outputs = run.forward(x)
                    loss = loss_fn(outputs, y, sample_weight)
                scaler.scale(run.share(loss)).backward()
                if run.step_is_due:  # always, without gradient accumulation
                    run.prepare_gradients()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                run.record(loss, outputs, y, sample_weight)  # stays on the device: no sync
                run.advance_lr_scheduler("step")

            # ---- validate ----
            if run.validation_is_due:
                net.eval()
                with torch.no_grad():
                    for x, y, sample_weight in run.eval_batches():
                        with run.autocast():
                            outputs = run.forward(x)
                            loss = loss_fn(outputs, y, sample_weight)
                        run.record(loss, outputs, y, sample_weight)
            run.advance_lr_scheduler("epoch")

    def evaluate(self, run: Run) -> None:
        run.net.eval()
        with torch.no_grad():
            for x, y, sample_weight in run.eval_batches():
                with run.autocast():
                    outputs = run.forward(x)
                    loss = run.loss_fn(outputs, y, sample_weight)
                run.record(loss, outputs, y, sample_weight)

    def predict(self, run: Run) -> None:
        run.net.eval()
        with torch.no_grad():
            for x in run.predict_batches():
                with run.autocast():
                    outputs = run.forward(x)
                run.collect(outputs)
