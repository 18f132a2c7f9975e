"""kerastorch: Keras's four verbs for any PyTorch module, with a training loop you can see, swap and take with you.

    import kerastorch as kt

    model = kt.Model(net)
    model.compile("cross_entropy", "adam", ["accuracy"])
    model.fit(train_loader, epochs=5, validation_data=test_loader)

Model is in model.py, the loops in loops/, callbacks in callbacks/, the digits in datasets/.
"""

from kerastorch import callbacks, datasets, initializers, loops
from kerastorch.callbacks import Callback
from kerastorch.device import set_seed, try_all_gpus, try_gpu
from kerastorch.export import ExportReport
from kerastorch.exported import ExportedModel, load_exported
from kerastorch.history import History
from kerastorch.initializers import initialize
from kerastorch.loops import ClassLoop, FunctionLoop, Loop, ScriptLoop
from kerastorch.model import Model
from kerastorch.report import Report
from kerastorch.run import Run
from kerastorch.saving import LoadReport
from kerastorch.summary import Summary

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "ClassLoop",
    "ExportReport",
    "ExportedModel",
    "FunctionLoop",
    "History",
    "LoadReport",
    "Loop",
    "Model",
    "Report",
    "Run",
    "ScriptLoop",
    "Summary",
    "callbacks",
    "datasets",
    "initialize",
    "initializers",
    "load_exported",
    "loops",
    "set_seed",
    "try_all_gpus",
    "try_gpu",
]
