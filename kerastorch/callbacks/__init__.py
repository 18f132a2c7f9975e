"""Callbacks: the base and the order of its hooks in callback.py, one file each for the rest."""

from kerastorch.callbacks.callback import Callback, CallbackList
from kerastorch.callbacks.early_stopping import EarlyStopping
from kerastorch.callbacks.lambda_callback import LambdaCallback
from kerastorch.callbacks.model_checkpoint import ModelCheckpoint

__all__ = ["Callback", "CallbackList", "EarlyStopping", "LambdaCallback", "ModelCheckpoint"]
