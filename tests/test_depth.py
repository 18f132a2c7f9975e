"""How many of kerastorch's frames stand between the user's call and his forward."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kerastorch as kt

PACKAGE = str(Path(kt.__file__).parent)
MOST = {"script": 2, "function": 4, "class": 4}


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.depths = []

    def forward(self, x):
        frame, depth = sys._getframe(1), 0
        while frame is not None:
            depth += frame.f_code.co_filename.startswith(PACKAGE)
            frame = frame.f_back
        self.depths.append(depth)
        return self.linear(x)


@pytest.mark.parametrize("loop", MOST)
def test_own_frames_from_fit_evaluate_and_predict_to_forward(loop):
    net = Deep()
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", "sgd", ["accuracy"], loop=loop)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    model.fit(x, y, batch_size=4, validation_data=(x, y), verbose=0)
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    assert len(net.depths) == 2 + 2 + 1 + 1
    assert max(net.depths) <= MOST[loop]
    assert min(net.depths) >= 2  # the count sees our frames at all


def test_every_loop_has_a_bound():
    assert MOST.keys() == kt.loops.LOOPS.keys()
