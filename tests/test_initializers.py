"""initialize: which parameters a rule reaches, what it writes, and that an error writes nothing."""

import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch.initializers import INITIALIZERS, make_initializer

SHAPES = {"dirac": (4, 4, 3), "eye": (5, 4)}
NEEDED = {"constant": {"val": 0.5}, "sparse": {"sparsity": 0.5}}


def make_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 3))


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(net.state_dict())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def changed(before: dict[str, torch.Tensor], net: nn.Module) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def test_a_layer_type_reaches_weights_and_a_glob_what_it_matches():
    net = make_net()
    before = state(net)
    assert kt.initialize(net, {"nn.Linear": "xavier_uniform", "*.bias": "zeros"}) is net
    assert changed(before, net) == {"0.bias", "3.weight", "3.bias", "4.weight", "4.bias"}  # 1.bias was zero
    assert net[0].bias.abs().max() == net[4].bias.abs().max() == 0
    bound = math.sqrt(6 / (8 + 6))
    assert 0.8 * bound < net[3].weight.abs().max() <= bound


@pytest.mark.parametrize("name", sorted(INITIALIZERS))
def test_a_name_writes_what_torch_writes(name):
    net = nn.Module()
    net.weight = nn.Parameter(torch.full(SHAPES.get(name, (6, 4)), 7.0))
    expected = net.weight.detach().clone()
    torch.manual_seed(3)
    INITIALIZERS[name](expected, **NEEDED.get(name, {}))
    torch.manual_seed(3)
    kt.initialize(net, {"weight": (name, NEEDED.get(name, {}))})
    assert torch.equal(net.weight, expected)
    assert not torch.equal(expected, torch.full_like(expected, 7.0))


def test_every_initializer_of_torch_has_its_name():
    of_torch = {name.rstrip("_") for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}
    assert of_torch <= set(INITIALIZERS)


@pytest.mark.parametrize("pattern", ["Linear", "nn.Linear", "torch.nn.Linear", nn.Linear, "[34].weight"])
def test_a_type_may_be_named_in_several_ways(pattern):
    net = make_net()
    before = state(net)
    kt.initialize(net, {pattern: "ones"})
    assert changed(before, net) == {"3.weight", "4.weight"}


def test_a_type_reaches_subclasses_own_types_and_all_matrices_of_a_recurrent_layer():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(2))

    class OwnLinear(nn.Linear):
        pass

    net = nn.ModuleDict({"scale": Scale(), "linear": OwnLinear(2, 2), "lstm": nn.LSTM(2, 2)})
    before = state(net)
    kt.initialize(net, {"Scale": 3, "nn.Linear": 4.0, "nn.LSTM": "orthogonal"})
    expected = {"scale.factor", "linear.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    assert changed(before, net) == expected
    assert net["scale"].factor.tolist() == [3, 3]
    recurrent = net["lstm"].weight_hh_l0
    assert torch.allclose(recurrent.T @ recurrent, torch.eye(2), atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("rule", ["normal", lambda tensor: torch.ones(5, 3)])
def test_a_layer_type_leaves_the_padding_row_zero_and_a_glob_fills_it(layer, rule):
    net = nn.ModuleDict({"words": layer(5, 3, padding_idx=-2), "head": nn.Linear(3, 5)})
    net["head"].weight = net["words"].weight
    for pattern in (layer, "nn.Linear"):
        nn.init.zeros_(net["words"].weight)
        kt.initialize(net, {pattern: rule})
        assert (net["words"].weight != 0).all(1).tolist() == [True, True, True, False, True]
    kt.initialize(net, {"words.weight": rule})
    assert (net["words"].weight != 0).all()


def test_a_function_s_own_tensor_keeps_its_padding_row():
    pretrained = torch.ones(5, 3)
    kt.initialize(nn.Embedding(5, 3, padding_idx=0), {"nn.Embedding": lambda tensor: pretrained})
    assert torch.equal(pretrained, torch.ones(5, 3))


def test_only_biases_are_left_out_of_a_layer_s_rule():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("bias", "q_bias", "bias_scale", "unbiased", "bias_ihx"):
                self.register_parameter(name, nn.Parameter(torch.zeros(2)))

    net = Scaled()
    kt.initialize(net, {"Scaled": "ones"})
    assert {name for name, value in net.named_parameters() if value.any()} == {"bias_scale", "unbiased", "bias_ihx"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(2, 3, num_layers=2, bidirectional=True),
        nn.GRUCell(2, 3),
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.Bilinear(2, 3, 4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_no_bias_of_torch_s_layers_is_reached_by_their_type(layer):
    before = state(layer)
    kt.initialize(layer, {type(layer): 3.0})
    assert changed(before, layer) == {name for name, _ in layer.named_parameters(recurse=False) if "bias" not in name}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (0.25, 0.25),
        (("constant", {"val": 0.5}), 0.5),
        (partial(nn.init.constant_, val=2.0), 2.0),
        (lambda tensor: torch.full_like(tensor, 3.0), 3.0),
    ],
)
def test_numbers_pairs_and_functions_fill(spec, expected):
    net = nn.Linear(3, 2)
    kt.initialize(net, {"weight": spec})
    assert net.weight.tolist() == [[expected] * 3] * 2


def test_the_first_matching_rule_counts():
    net = make_net()
    kt.initialize(net, {"4.weight": "zeros", "nn.Linear": "ones"})
    assert (net[4].weight.unique().tolist(), net[3].weight.unique().tolist()) == ([0.0], [1.0])


def test_a_shared_parameter_is_reached_by_each_of_its_names():
    net = nn.ModuleDict({"a": nn.Embedding(4, 3), "b": nn.Linear(3, 4)})
    net["b"].weight = net["a"].weight
    kt.initialize(net, {"b.weight": "ones"})
    assert net["a"].weight.unique().tolist() == [1.0]
    with pytest.raises(ValueError, match=r"pattern 'nn.Linear' comes too late"):
        kt.initialize(net, {"a.weight": "zeros", "nn.Linear": "ones"})


def test_a_seed_repeats_whatever_was_drawn_before_and_the_order_of_the_rules():
    rules = {"nn.Linear": "xavier_normal", "0.*": "normal"}
    one, two, three = make_net(), make_net(), make_net()
    kt.initialize(one, rules, seed=1)
    torch.rand(3)
    kt.initialize(two, dict(reversed(rules.items())), seed=1)
    kt.initialize(three, rules, seed=2)
    for name in ("0.weight", "0.bias", "3.weight", "4.weight"):
        assert torch.equal(one.state_dict()[name], two.state_dict()[name]), name
        assert not torch.equal(one.state_dict()[name], three.state_dict()[name]), name


def draws(tensor: torch.Tensor) -> None:
    tensor.fill_(random.random() + np.random.rand())


def test_with_a_seed_the_global_random_states_stay_and_without_one_torch_draws_on():
    kt.set_seed(5)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    net = make_net()
    kt.set_seed(5)
    kt.initialize(net, {"nn.Linear": "normal", "0.weight": draws}, seed=9)
    with pytest.raises(ValueError, match="can't fill"):
        kt.initialize(net, {"nn.Linear": "normal", "0.bias": "orthogonal"}, seed=9)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected

    torch.manual_seed(5)
    by_hand = nn.init.normal_(torch.empty(6, 8))
    torch.manual_seed(5)
    kt.initialize(net, {"3.weight": "normal"})
    assert torch.equal(net[3].weight, by_hand)


def test_strides_dtype_and_requires_grad_stay():
    net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last).bfloat16()
    net.weight.requires_grad_(False)
    stride, parameter = net.weight.stride(), net.weight
    kt.initialize(net, {"nn.Conv2d": "kaiming_normal"}, seed=0)
    assert net.weight is parameter
    assert (net.weight.stride(), net.weight.dtype, net.weight.requires_grad) == (stride, torch.bfloat16, False)


def fails_late(tensor: torch.Tensor) -> None:
    tensor.zero_()
    raise RuntimeError("late")


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({"nn.Linaer": "ones"}, ValueError, "'nn.Linaer' matches no layer type and no parameter; did you mean 'nn.Lin"),
        ({"4.wieght": "ones"}, ValueError, r"'4.wieght' matches no .* did you mean '4.weight'.*Layer types: BatchNorm"),
        ({nn.GRU: "ones"}, ValueError, "pattern GRU matches no layer type"),
        ({"[ab]zzz": "ones"}, ValueError, r"'\[ab\]zzz' matches no layer type and no parameter\. Layer types: BatchN"),
        ({"zzz.weight*": "ones", 0: "ones"}, TypeError, r"a pattern must be a layer type or a string, .* got 0\."),
        ({int: "ones"}, TypeError, "a pattern must be a layer type or a string, .* got <class 'int'>"),
        ({"nn.Conv*": "ones"}, ValueError, r"parameter; a layer type is no glob: give 'Conv1d' a rule each\. Layer t"),
        ({"*Norm*": "ones", "*.weight": 0}, ValueError, "a layer type is no glob: give 'BatchNorm1d' a rule each"),
        ({"nn.Convv": "ones"}, ValueError, r"did you mean 'nn.Conv1d' or 'torch.nn.Conv1d'\?"),
        ({"nn.Linear": "zzz"}, ValueError, r"initializer 'zzz' is not known\. Known: constant, "),
        ({"nn.Linear": ("normal", {"zzz": 1})}, ValueError, r"'normal' has no argument 'zzz'\. Known: mean, std"),
        (
            {"nn.Linear": ("uniform", {"a": 2, "b": 1})},
            ValueError,
            r"'nn.Linear' can't fill '3.weight' .*from=2 > to=1\.",
        ),
        (
            {"nn.Linear": ("normal", {"std": "a"})},
            TypeError,
            "'nn.Linear' can't fill '3.weight' .*must be float, not str",
        ),
        ({"nn.Linear": ("trunc_normal", {"std": 0})}, ValueError, "can't fill '3.weight' .*division by zero"),
        ({"nn.Linear": partial(nn.init.normal_, std=-1)}, ValueError, "can't fill '3.weight' .*std >= 0.0"),
        ({"nn.Flatten": "ones"}, ValueError, "'nn.Flatten' matches layers that have no parameters"),
        ({"nn.Linear": "xavier_unifrom"}, ValueError, "did you mean 'xavier_uniform'"),
        ({"nn.Linear": ("normal", {"sdt": 1})}, ValueError, "'normal' has no argument 'sdt'; did you mean 'std'"),
        ({"nn.Linear": "constant"}, ValueError, r"needs 'val': write \('constant', \{'val': 0.1\}\)"),
        ({"nn.Linear": None}, TypeError, "must be a name, a number, a pair .*, got None"),
        ({"*.bias": "xavier_uniform"}, ValueError, r"for '\*.bias' can't fill '0.bias' of shape \(4,\)"),
        ({"4.bias": lambda t: torch.zeros(7)}, ValueError, r"made shape \(7,\) for '4.bias', which has shape \(3,\)"),
        ({"4.bias": fails_late}, RuntimeError, "late"),
        ({"*.weight": "ones", "nn.Linear": "ones"}, ValueError, "'nn.Linear' comes too late.*3.weight, 4.weight"),
    ],
)
def test_an_error_names_what_is_wrong_and_leaves_the_net(rules, error, match):
    net = make_net()
    before = state(net)
    with pytest.raises(error, match=match):
        kt.initialize(net, {"0.weight": "ones", **rules})
    assert_same(before, net.state_dict())


def test_what_is_no_net_no_rules_or_not_yet_shaped_is_refused():
    with pytest.raises(TypeError, match=r"takes an nn.Module, got Model: give its net, model.net"):
        kt.initialize(kt.Model(nn.Linear(2, 2), device="cpu"), {"weight": "ones"})
    with pytest.raises(TypeError, match=r"rules must be a dict.*got 'zeros'"):
        kt.initialize(nn.Linear(2, 2), "zeros")
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        kt.initialize(nn.Linear(2, 2), {"weight": "ones"}, seed=-1)
    parametrized = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"'nn.Linear' matches '1', whose parameters are parametrized"):
        kt.initialize(parametrized, {"nn.Linear": "ones"})
    with pytest.raises(
        ValueError, match=r"call initialize\(\) before that.*Parameters: 1.bias, 1.parametrizations.weight"
    ):
        kt.initialize(parametrized, {"nn.Linear": "ones"})
    with pytest.raises(ValueError, match=r"seed must be at most 2\*\*64 - 1, got 1180591620717411303424"):
        kt.initialize(nn.Linear(2, 2), {"weight": "ones"}, seed=2**70)
    with pytest.raises(ValueError, match=r"'weight' of shape \(2, 2\): .*Half.*Call initialize\(\) before .half\(\)"):
        kt.initialize(nn.Linear(2, 2).half(), {"nn.Linear": "orthogonal"})
    with pytest.raises(ValueError, match="shape of 'weight' is not known yet"):
        kt.initialize(nn.LazyLinear(2), {"nn.Linear": "ones"})


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "made_of"), [(nn.utils.weight_norm, "weight_g, weight_v"), (nn.utils.spectral_norm, "weight_orig")]
)
def test_the_older_parametrizations_are_refused_too(wrap, made_of):
    net = wrap(nn.Linear(2, 2))
    before = state(net)
    with pytest.raises(ValueError, match=f"'nn.Linear' matches 'the net', .* by globs. Parameters: bias, {made_of}"):
        kt.initialize(net, {"nn.Linear": "ones"})
    assert_same(before, net.state_dict())


def test_a_function_is_returned_as_it_is():
    assert make_initializer(nn.init.ones_) is nn.init.ones_
