"""What fit returns: the logs of each epoch, as lists of floats, a table or a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kerastorch.metrics import LogValue
from kerastorch.plots import plot_curves

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class History:
    """The logs of the epochs that were finished.

    epoch: the epochs' indices, from 0.   params: the call's verbose, epochs and steps.   model: the Model fitted.
    """

    def __init__(self, model: object = None, params: Mapping[str, object] | None = None) -> None:
        self.model = model
        self.params = dict(params or {})
        self.epoch: list[int] = []
        self._rows: list[dict[str, LogValue]] = []

    def append(self, epoch: int, logs: Mapping[str, LogValue]) -> None:
        """Add the logs of one finished epoch; numbers, arrays and tensors become floats and lists of floats."""
        self.epoch.append(epoch)
        self._rows.append({name: _plain(value) for name, value in logs.items()})

    def extend(self, other: History) -> None:
        """Add the epochs of another History, their indices counting on from this one's."""
        for row in other._rows:
            self.append(self.epoch[-1] + 1 if self.epoch else 0, row)

    @property
    def last_logs(self) -> dict[str, LogValue]:
        """The logs of the last finished epoch; empty before the first."""
        return dict(self._rows[-1]) if self._rows else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs' indices and logs as plain lists and dicts."""
        return {"epoch": list(self.epoch), "logs": [dict(row) for row in self._rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold the epochs of state_dict() and no others."""
        self.epoch, self._rows = list(state["epoch"]), [dict(row) for row in state["logs"]]

    @property
    def history(self) -> dict[str, list[LogValue]]:
        """{name: values}, one value for each epoch that has it, names in the order in which they came."""
        columns: dict[str, list[LogValue]] = {}
        for row in self._rows:
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        return columns

    def to_pandas(self) -> pd.DataFrame:
        """Return a DataFrame with a row an epoch (index "epoch") and a column a name; NaN where an epoch lacks it.

        Raises ImportError where pandas is not installed.
        """
        import pandas as pd

        return pd.DataFrame(self._rows, index=pd.Index(self.epoch, name="epoch"))

    def plot(self) -> list[Axes]:
        """Draw a panel a name, training and validation (val_*) together, over the epochs; return matplotlib's Axes.

        Raises ImportError where matplotlib is not installed (the extra "plot"), ValueError before the first epoch ends.
        """
        return plot_curves(self.epoch, self._rows)

    def __repr__(self) -> str:
        last = ", ".join(f"{k}: {v:.4f}" for k, v in (self._rows or [{}])[-1].items() if isinstance(v, float))
        return f"History({len(self.epoch)} epochs{'; last ' + last if last else ''})"


def _plain(value: Any) -> LogValue:
    if hasattr(value, "tolist"):  # a tensor, array or numpy number
        value = value.tolist()
    return float(value) if isinstance(value, int) else value
