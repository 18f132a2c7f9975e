"""summary: its figures against ones worked out by hand, and that nothing of the model moves."""

import copy
import random
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import kerastorch as kt


def summary_of(net: nn.Module, x=None) -> kt.Summary:
    return kt.Model(net, device="cpu").summary(x)


def row(summary: kt.Summary, name: str):
    (found,) = [row for row in summary.rows if row.name == name]
    return found


def make_conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3))


class Restless(nn.Module):
    """Writes whatever a forward can write."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("count", torch.zeros(()))
        self.seen = []
        self.hidden = None

    def forward(self, x):
        self.count += 1
        self.linear.weight.data.mul_(0.5)
        self.hidden = self.linear(x)
        self.seen.append(random.random() + np.random.rand())
        return self.norm(self.hidden) + torch.rand(2)


def test_figures_of_a_conv_net_are_those_worked_out_by_hand():
    net = make_conv_net()
    net[0].requires_grad_(False)
    summary = summary_of(net, (2, 1, 8, 8))
    outputs = {"net": (2, 3), "0": (2, 4, 6, 6), "1": (2, 4, 6, 6), "2": (2, 4, 6, 6), "3": (2, 144), "4": (2, 3)}
    assert {row.name: row.output for row in summary.rows} == {name: str(shape) for name, shape in outputs.items()}
    assert [row.kind for row in summary.rows[:3]] == ["Sequential", "Conv2d", "BatchNorm2d"]
    conv, linear = 2 * 2 * 36 * 4 * 9, 2 * 2 * 144 * 3
    assert [row.flops for row in summary.rows] == [0, conv, 0, 0, 0, linear]
    assert summary.flops == conv + linear
    assert [(row.trainable, row.frozen) for row in summary.rows] == [(0, 0), (0, 40), (8, 0), (0, 0), (0, 0), (435, 0)]
    assert (summary.parameters, summary.trainable, summary.frozen, summary.shared) == (483, 443, 40, 0)
    assert (summary.parameter_bytes, summary.gradient_bytes) == (4 * 483, 4 * 443)
    assert (summary.buffer_bytes, summary.input_bytes) == (2 * 4 * 4 + 8, 2 * 64 * 4)
    assert summary.output_bytes == 4 * (288 + 288 + 6)  # ReLU works in place, Flatten gives a view


def test_without_input_there_are_parameters_alone():
    summary = summary_of(make_conv_net())
    assert (summary.parameters, summary.flops, summary.input_bytes, summary.output_bytes) == (483, None, None, None)
    assert {(row.output, row.flops) for row in summary.rows} == {("", None)}
    assert "FLOPs" not in str(summary)


def test_shared_parameters_are_counted_once():
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "again": nn.Linear(3, 5)})
    net["head"].weight = net["embedding"].weight
    net["again"] = net["head"]
    summary = summary_of(net)
    assert (summary.parameters, summary.shared, summary.parameter_bytes) == (20, 20, 80)
    assert [row.trainable for row in summary.rows] == [0, 15, 5, 0]
    assert [row.notes for row in summary.rows[1:]] == ["", "weight is embedding.weight", "is head"]
    assert "Parameters: 20 (20 trainable, 0 frozen); 20 of them shared, counted once." in str(summary)


def test_a_layer_called_twice_has_the_flops_of_both_calls():
    linear = nn.Linear(4, 4)
    summary = summary_of(nn.Sequential(linear, nn.Tanh(), linear), (2, 4))
    assert (row(summary, "0").flops, row(summary, "0").notes) == (2 * 64, "2 calls")
    assert (summary.flops, summary.parameters) == (128, 20)


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, a, b):
        return {"sum": self.linear(a) + b, "products": (a @ a.T, None)}


@pytest.mark.parametrize(
    "x",
    [
        ((2, 3), (2, 4)),
        [(2, 3), (2, 4)],
        {"b": (2, 4), "a": torch.Size((2, 3))},
        {"a": np.zeros((2, 3)), "b": torch.zeros(2, 4)},
        ((2, 3), torch.zeros(2, 4)),
        (tuple(np.array([2, 3])), [np.int32(2), 4]),
    ],
)
def test_several_inputs_come_as_tuple_list_or_dict_of_sizes_or_tensors(x):
    summary = summary_of(Add(), x)
    net = row(summary, "net")
    assert net.output == "{sum: (2, 4), products: ((2, 2), None)}"
    assert (net.flops, row(summary, "linear").flops) == (2 * 2 * 3 * 2, 2 * 2 * 3 * 4)  # a @ a.T is the net's own
    assert summary.input_bytes == 4 * (6 + 8)


def test_one_input_may_be_integers_or_packed():
    assert summary_of(nn.Embedding(5, 3), torch.tensor([[0, 4]])).rows[0].output == "(1, 2, 3)"
    summary = summary_of(nn.LSTM(8, 16), pack_sequence([torch.randn(4, 8), torch.randn(2, 8)]))
    assert summary.rows[0].output.startswith("(packed (6, 16), ")
    assert summary.flops == 2 * 6 * 64 * (8 + 16)


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_every_step_and_matrix(layer, gates):
    summary = summary_of(layer(8, 16, num_layers=2, bidirectional=True, batch_first=True), (4, 5, 8))
    assert summary.flops == 2 * 20 * 2 * gates * 16 * ((8 + 16) + (32 + 16))


def test_bilinear_layers_count_the_products_with_both_inputs():
    summary = summary_of(nn.Bilinear(3, 4, 5), ((6, 7, 3), (6, 7, 4)))
    assert summary.flops == 2 * 42 * 5 * (3 * 4 + 4)


@pytest.mark.parametrize(
    ("product", "flops"),
    [
        (lambda x: x @ x[0, 0], 2 * 24),
        (lambda x: x[0] @ x[0, 0], 2 * 12),
        (lambda x: x[0, 0] @ x[0, 0], 2 * 4),
        (lambda x: torch.vdot(x[0, 0], x[0, 0]), 2 * 4),
        (lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0]), 2 * 12),
        (lambda x: torch.addbmm(x[0, :, :3], x, x.mT), 2 * 2 * 3 * 4 * 3),
        (lambda x: torch.einsum("nij,j->ni", x, x[0, 0]), 2 * 24),
        (lambda x: nn.functional.linear(x, x[0, 0]), 2 * 24),
    ],
)
def test_products_with_vectors_count(product, flops):
    class Product(nn.Module):
        def forward(self, x):
            return product(x)

    assert summary_of(Product(), (2, 3, 4)).flops == flops


def test_a_transformer_layer_is_seen_through():
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    summary = summary_of(layer, (2, 5, 16))
    assert row(summary, "linear1").output == "(2, 5, 32)"
    assert row(summary, "linear1").flops == 2 * 10 * 16 * 32
    assert row(summary, "self_attn").flops == 2 * 10 * 16 * 16 * 4 + 2 * 2 * 2 * 5 * 5 * 16
    assert torch.backends.mha.get_fastpath_enabled() is was_enabled


def test_a_lazy_net_is_shaped_in_the_copy_only():
    net = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    summary = summary_of(net)
    assert row(summary, "0").notes.startswith("weight's shape is not known yet")
    assert (summary.parameters, summary.lazy) == (10, 2)
    assert "Parameters: 10 (10 trainable, 0 frozen); the shapes of 2 more are not known yet." in str(summary)
    summary = summary_of(net, (3, 5))
    assert (summary.parameters, summary.lazy) == (24 + 10, 0)
    assert "not known" not in str(summary)
    assert isinstance(net[0], nn.LazyLinear)
    assert net[0].has_uninitialized_params()


def test_nothing_of_the_model_moves():
    net = Restless()
    net.norm.eval()
    net(torch.ones(2, 3))  # holds an output with its graph, which deepcopy alone refuses
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    hidden, seen = net.hidden, list(net.seen)
    kt.set_seed(7)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    kt.set_seed(7)
    for x in (None, (2, 3), torch.ones(2, 3)):
        summary_of(net, x)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags
    assert (net.hidden is hidden, net.seen) == (True, seen)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_after_training_and_with_a_compiled_net_it_is_the_same():
    model = kt.Model(nn.Sequential(nn.Linear(3, 2)), device="cpu")
    before = str(model.summary((4, 3)))
    model.compile("mse", "adam")
    model.fit(torch.randn(8, 3), torch.randn(8, 2), verbose=0)
    assert str(model.summary((4, 3))) == before

    def compiled(x):
        raise AssertionError("a compiled net hides its layers")

    model.net._compiled_call_impl = compiled  # as Module.compile() does
    assert str(model.summary((4, 3))) == before
    assert model.net._compiled_call_impl is compiled


def test_text_is_a_table_with_totals():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    net[0].bias.requires_grad_(False)
    assert str(summary_of(net, (4, 3))).split("\n") == [
        "layer  kind        output  trainable  frozen  FLOPs",
        "net    Sequential  (4, 2)",
        "0      Linear      (4, 2)          6       2     48",
        "1      ReLU        (4, 2)",
        "",
        "Parameters: 8 (6 trainable, 2 frozen).",
        "Memory: parameters 32 bytes, their gradients 24 bytes, buffers 0 bytes, input 48 bytes, "
        "layer outputs 64 bytes.",
        "FLOPs: 48 in one forward pass: matrix products, convolutions and attention.",
    ]


def test_a_notebook_shows_the_same_cells():
    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.texts = []

        def handle_data(self, data):
            self.texts.append(data)

    cells = Cells()
    summary = summary_of(Add(), ((2, 3), (2, 4)))
    cells.feed(summary._repr_html_())
    assert cells.texts[:6] == ["layer", "kind", "output", "trainable", "FLOPs", "net"]
    assert "{sum: (2, 4), products: ((2, 2), None)}" in cells.texts
    assert cells.texts[-3:] == str(summary).split("\n")[-3:]


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        ((None, 3), ValueError, r"input size \(None, 3\) needs a number for each axis.*\(1, 3\)"),
        ((0, 3), ValueError, "each axis of an input size must be at least 1, got 0"),
        ("digits", TypeError, "a size such as .* got str"),
        (torch.utils.data.DataLoader([1]), TypeError, r"next\(iter\(loader\)\)\[0\]\), got DataLoader"),
    ],
)
def test_what_is_no_input_is_refused(x, error, match):
    with pytest.raises(error, match=match):
        summary_of(nn.Linear(3, 2), x)


class Words(nn.Module):
    """Adds an embedding of places, asked first, to x, or to one of it where x is integers."""

    def __init__(self):
        super().__init__()
        self.place = nn.Embedding(5, 3)
        self.words = nn.Embedding(9, 3, padding_idx=0)

    def forward(self, x, is_words):
        return self.place(torch.arange(5)) + (self.words(x) if is_words.any() else x)


def test_a_size_where_an_embedding_wants_integers_is_refused_with_a_batch_to_give():
    message = r"summary\(x\) makes .* but Embedding takes integers: .* torch.zeros\(\(2, 5\), dtype=torch.long\)"
    with pytest.raises(TypeError, match=message):
        summary_of(nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)), (2, 5))
    with pytest.raises(TypeError, match="but EmbeddingBag takes integers"):
        summary_of(nn.EmbeddingBag(9, 3), [(2, 5)])
    with pytest.raises(TypeError, match=message):
        summary_of(Words(), {"x": (2, 5), "is_words": torch.ones(1)})
    assert summary_of(Words(), {"x": (2, 5, 3), "is_words": torch.zeros(1)}).rows[0].output == "(2, 5, 3)"
    with pytest.raises(RuntimeError, match="indices"):  # torch's own
        summary_of(nn.Embedding(9, 3), torch.zeros(2, 5))


def test_an_error_in_forward_comes_as_it_is():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        summary_of(nn.Linear(3, 2), (2, 4))
    assert summary_of(nn.Linear(3, 2), (2, 3)).flops == 24  # torch's counter was left


def test_an_inner_error_that_the_net_catches_is_no_matter():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x)

    summary = summary_of(Tries(), (2, 3))
    assert [(row.output, row.flops) for row in summary.rows] == [("(2, 2)", 0), ("None", 0), ("(2, 2)", 24)]
