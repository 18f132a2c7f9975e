"""What a call leaves behind: nothing held, rates put back, loops and histories usable."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.callbacks import EarlyStopping
from kerastorch.loops import LOOPS

X, Y = torch.randn(24, 4), torch.arange(24) % 2


def make_model(**arguments):
    model = kt.Model(nn.Linear(4, 2), device=arguments.pop("device", "cpu"))
    model.compile(**{"loss": "cross_entropy", "optimizer": "sgd", **arguments})
    return model


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
def test_data_is_let_go_after_a_call(verb, loop):
    model, stop = make_model(loop=loop), EarlyStopping(monitor="loss", restore_best_weights=True)
    dataset = TensorDataset(X.clone(), Y)
    held = weakref.ref(dataset)
    callbacks = [stop] if verb == "fit" else []
    getattr(model, verb)(DataLoader(dataset, 8), verbose=0, callbacks=callbacks)
    del dataset
    gc.collect()
    assert held() is None
    assert stop.best_weights is None


def test_a_history_and_a_model_can_be_pickled_and_copied_after_fit():
    model = make_model(metrics=["accuracy"])
    history = model.fit(X, Y, epochs=2, verbose=0)
    assert pickle.loads(pickle.dumps(history)).history == history.history
    twin = copy.deepcopy(model)
    twin.fit(X, Y, verbose=0)
    assert not torch.equal(twin.net.weight, model.net.weight)


def test_workers_do_not_outlive_a_fit_whose_epochs_end_within_a_pass():
    import multiprocessing

    model = make_model()
    model.fit(DataLoader(TensorDataset(X, Y), 4, num_workers=1), steps_per_epoch=3, verbose=0)
    gc.collect()
    assert multiprocessing.active_children() == []


def test_two_models_may_share_a_loop_and_call_each_other():
    loop = kt.ClassLoop()
    first, second = make_model(loop=loop), make_model(loop=loop)
    seen = []

    class Other(kt.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append(second.evaluate(X, Y, verbose=0)["loss"])

    alone = copy.deepcopy(first)
    first.fit(X, Y, batch_size=8, shuffle=False, callbacks=[Other()], verbose=0)
    alone.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    assert len(seen) == 3
    assert torch.equal(first.net.weight, alone.net.weight)


def test_a_callback_may_evaluate_with_itself_and_keeps_its_fit():
    class Nested(kt.Callback):
        def on_epoch_end(self, epoch, logs=None):
            run = self.run
            self.model.evaluate(X, Y, callbacks=[self], verbose=0)
            assert self.run is run
            self.model.stop_training = True

    assert make_model().fit(X, Y, epochs=5, callbacks=[Nested()], verbose=0).epoch == [0]


@pytest.mark.parametrize("name", ["cosine", "one_cycle"])
def test_a_schedule_by_name_puts_the_rate_back_so_that_more_training_trains(name):
    optimizer = torch.optim.SGD((net := nn.Linear(4, 2)).parameters(), lr=0.1)
    model = kt.Model(net, "cpu")
    model.compile("cross_entropy", optimizer, lr_scheduler=name, lr_scheduler_interval="step")
    model.fit(X, Y, batch_size=6, epochs=2, verbose=0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    before = net.weight.detach().clone()
    model.train_on_batch(X, Y)
    assert not torch.equal(net.weight, before)


def test_a_plateau_scheduler_waits_for_the_epochs_that_validate():
    seen = []

    class Spy(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics)

    model = make_model(lr_scheduler=Spy)
    history = model.fit(X, Y, validation_data=(X * 100, Y), validation_freq=2, epochs=4, verbose=0).history
    assert seen == history["val_loss"]
    assert len(seen) == 2


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu", 0)])
def test_a_device_with_an_index_is_the_one_that_parameters_report(device):
    model = make_model(device=device)
    model.fit(X, Y, verbose=0)
    assert model.device == model.net.weight.device


def test_numpy_integers_are_integers():
    history = make_model().fit(
        X, Y, batch_size=np.int64(8), epochs=np.int64(2), validation_data=(X, Y), validation_freq=np.int64(2), verbose=0
    )
    assert len(history.history["val_loss"]) == 1


def test_an_object_with_the_two_methods_of_a_dataset_is_one():
    class Rows:
        def __len__(self):
            return len(X)

        def __getitem__(self, index):
            return X[index], Y[index]

    models = [make_model() for _ in range(2)]
    models[1].net.load_state_dict(models[0].net.state_dict())
    models[0].fit(Rows(), shuffle=False, verbose=0)
    models[1].fit(X, Y, shuffle=False, verbose=0)
    assert torch.equal(models[0].net.weight, models[1].net.weight)


def test_weights_of_one_change_nothing_where_targets_are_ignored():
    y = Y.clone()
    y[::2] = -100
    model = make_model()
    plain = model.evaluate(X, y, verbose=0)["loss"]
    assert model.evaluate(X, y, sample_weight=torch.ones(24), verbose=0)["loss"] == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("returned", [None, 0.5, ("a", "b")])
def test_a_loss_that_returns_no_tensor_is_named(returned):
    def strange(outputs, y):
        return returned

    with pytest.raises(TypeError, match=f"the loss strange must return a tensor, got {type(returned).__name__}"):
        make_model(loss=strange).fit(X, Y, verbose=0)


@pytest.mark.slow
def test_a_torchvision_that_does_not_fit_is_named_and_the_rest_works(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    code = """
import torch, kerastorch as kt
model = kt.Model(torch.nn.Linear(3, 2), device="cpu")
model.compile("cross_entropy", "sgd", ["accuracy"])
print(sorted(model.fit(torch.randn(8, 3), torch.arange(8) % 2, verbose=0).history))
try:
    model.compile("cross_entropy", "sgd", ["auroc"])
    print("loaded")
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}){code}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    assert lines[0] == "['accuracy', 'loss']"
    assert "nms does not exist" in lines[1]
    assert "install the torchvision that matches" in lines[1]
