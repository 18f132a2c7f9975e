"""Training loop whose step is one graph: the function-style loop with its train_step compiled, or captured on a GPU.

The sister file function_loop.py shows what the graph does; weights agree with the other loops' within rounding.
"""

from __future__ import annotations

from kerastorch.graph import GraphStep
from kerastorch.loops.function_loop import (
    FunctionLoop,
    eval_step,
    evaluate,
    predict,
    predict_step,
    train_epoch,
    train_step,
)
from kerastorch.loops.loop import Loop
from kerastorch.run import Run


class GraphLoop(Loop):
    """Forward, gradients, clipping and update in one graph; evaluation as it is elsewhere.

    It is made at the first full batch, on a GPU after three eager ones; a later fit of the same model goes on with it.
    Whether a part was frozen, say, is looked at between epochs. On a GPU the Python of forward, with hooks of its
    modules, runs as a graph is made and in none of its steps.
    Raises ValueError for what a graph can't hold, with the way out.
    """

    def __init__(self) -> None:
        self._step: GraphStep | None = None

    def fit(self, run: Run) -> None:
        if self._step is None or not (self._step.is_busy or self._step.fits(run)):
            self._step = GraphStep(run, eager_step=train_step)
        step = self._step
        if step.is_busy:  # with the fit of a callback that calls train_on_batch
            return FunctionLoop().fit(run)
        step.begin(run)
        try:
            for epoch in run.epoch_range():
                step.begin_epoch()
                train_epoch(run, lambda run, x, y, sample_weight: step(x, y, sample_weight))
                if run.validation_is_due:
                    evaluate(run, eval_step)
                run.advance_lr_scheduler("epoch")
        finally:
            step.end()

    def evaluate(self, run: Run) -> None:
        evaluate(run, eval_step)

    def predict(self, run: Run) -> None:
        predict(run, predict_step)
