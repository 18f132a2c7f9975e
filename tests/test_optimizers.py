"""Optimizers and schedulers by name, class, factory and object; parameter groups by glob on the names."""

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR

import kerastorch as kt
from kerastorch.loops import LOOPS
from kerastorch.optimizers import (
    OPTIMIZERS,
    SCHEDULERS,
    make_optimizer,
    make_scheduler,
    spanning_scheduler,
)


def make_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def names_of(group: dict[str, Any], net: nn.Module) -> list[str]:
    by_id = {id(parameter): name for name, parameter in net.named_parameters()}
    return [by_id[id(parameter)] for parameter in group["params"]]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 15).reshape(5, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


# ---- names ----

STEPPING = sorted(set(OPTIMIZERS) - {"lbfgs", "sparse_adam"})  # these two want a closure, and sparse gradients


@pytest.mark.parametrize("name", STEPPING)
def test_named_optimizer_equals_torch_s_own_to_the_bit(name: str) -> None:
    mine, theirs, cls = make_net(), make_net(), OPTIMIZERS[name]
    fused = {"fused": True} if "fused" in inspect.signature(cls).parameters else {}
    after = train(mine, make_optimizer(name, mine))
    expected = train(theirs, cls(theirs.parameters(), **fused))
    assert all(map(torch.equal, after, expected))
    assert not any(map(torch.equal, after, make_net().parameters()))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_named_optimizer_is_fused_on_cpu(name: str) -> None:
    assert make_optimizer(name, make_net()).defaults["fused"] is True


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_name_makes_its_class_over_all_parameters(name: str) -> None:
    net = make_net()
    optimizer = make_optimizer(name, net)
    assert type(optimizer) is OPTIMIZERS[name]
    assert names_of(optimizer.param_groups[0], net) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_sparse_embedding_gets_an_sgd_that_is_not_fused_and_steps() -> None:
    net = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    before = net[0].weight.detach().clone()
    optimizer = make_optimizer("sgd", net)
    assert not optimizer.defaults["fused"]
    net(torch.tensor([1, 3])).sum().backward()
    optimizer.step()
    moved = (net[0].weight.detach() != before).any(1)
    assert moved.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad"])
def test_parameters_that_torch_can_not_step_fused_get_the_plain_step(name: str) -> None:
    mine, theirs = (nn.ParameterDict({"p": torch.ones(3, dtype=torch.complex64)}) for _ in range(2))
    for net, optimizer in ((mine, make_optimizer(name, mine)), (theirs, OPTIMIZERS[name](theirs.parameters()))):
        net["p"].abs().square().sum().backward()
        optimizer.step()
    assert torch.equal(mine["p"], theirs["p"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", STEPPING)
def test_named_optimizer_steps_on_cuda(name: str) -> None:
    net = make_net().cuda()
    optimizer = make_optimizer(name, net)
    net(torch.ones(5, 3, device="cuda")).square().mean().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize(("name", "near"), [("sgdd", "sgd"), ("adan", "adam"), ("rms_prop", "rmsprop")])
def test_unknown_optimizer_gives_the_nearest_and_all(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"optimizer '{name}' is not known; did you mean '{near}'.*Known: .*radam"):
        make_optimizer(name, make_net())


# ---- classes, factories, objects ----


def test_class_is_called_with_the_parameters_only() -> None:
    optimizer = make_optimizer(torch.optim.SGD, make_net())
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults == torch.optim.SGD(make_net().parameters()).defaults  # not fused


def test_factory_keeps_its_options() -> None:
    optimizer = make_optimizer(lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9), make_net())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.5, 0.9)


def test_object_is_used_as_given() -> None:
    net = make_net()
    optimizer = torch.optim.Adam(net[2].parameters())  # a part of the net is enough
    assert make_optimizer(optimizer, net) is optimizer


def test_optimizer_of_another_net_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Adam given holds none of the net's parameters.*SGD\(net\.parameters\(\)"):
        make_optimizer(torch.optim.Adam(make_net().parameters()), make_net())


@pytest.mark.parametrize("optimizer", [3, None, ["adam"]])
def test_what_can_not_make_an_optimizer_is_refused_with_the_names(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a name.*got .*Names: .*adamw"):
        make_optimizer(optimizer, make_net())


def test_factory_that_makes_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must make a torch\.optim\.Optimizer, but .*list.* made a list"):
        make_optimizer(list, make_net())


def test_net_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        make_optimizer("sgd", nn.ReLU())


def split_by_ndim(parameters: Any) -> torch.optim.Optimizer:
    """Decays matrices alone; a parameter without a shape says that it has one dimension."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    rest = [parameter for parameter in parameters if parameter.ndim <= 1]
    return torch.optim.SGD([{"params": matrices, "weight_decay": 0.1}, {"params": rest}], lr=0.1)


def matrices_alone(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in parameters if parameter.ndim > 1] or parameters[:1], lr=0.1)


@pytest.mark.parametrize("optimizer", ["adagrad", torch.optim.Adagrad, split_by_ndim, matrices_alone])
def test_what_looks_at_a_lazy_nets_weights_is_refused_with_the_line_that_helps(optimizer: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"the shape of '1\.weight' is not known: .*net\(x\[:1\]\)"):
        make_optimizer(optimizer, net)
    net(torch.zeros(2, 3))
    make_optimizer(optimizer, net)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"adagrad"}))
def test_an_optimizer_of_a_lazy_net_is_the_one_of_the_net_with_shapes(name: str) -> None:
    made = []
    for is_early in (True, False):
        net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
        if not is_early:
            net(torch.zeros(2, 3))
        optimizer = make_optimizer(name, net, param_groups={"*.bias": {"lr": 0.5}} if name != "lbfgs" else None)
        net(torch.zeros(2, 3))
        made.append(optimizer.state_dict())
    assert made[0] == made[1]


def test_a_lazy_loss_is_refused_with_the_line_that_helps() -> None:
    with pytest.raises(ValueError, match=r"the shape of 'loss\.weight' is not known yet: call the loss once"):
        make_optimizer("sgd", make_net(), nn.LazyLinear(1))


# ---- the loss's parameters ----


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_parameters_of_a_loss_module_join() -> None:
    net, loss = make_net(), Scaled()
    optimizer = make_optimizer("sgd", net, loss, param_groups={"loss.*": {"lr": 0.5}})
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 1]
    assert optimizer.param_groups[1]["params"][0] is loss.scale
    assert optimizer.param_groups[1]["lr"] == 0.5


def test_parameters_that_net_and_loss_share_are_stepped_once() -> None:
    net = make_net()
    loss = Scaled()
    loss.net = net  # a loss that penalises the net's own weights
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make_optimizer("sgd", net, loss)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == 5


# ---- parameter groups ----


def test_parameter_joins_the_first_pattern_that_matches() -> None:
    net = make_net()
    groups = {"*.bias": {"weight_decay": 0.0}, "2.*": {"lr": 0.25}}
    optimizer = make_optimizer("sgd", net, param_groups=groups)
    rest, bias, last = optimizer.param_groups
    assert names_of(rest, net) == ["0.weight"]
    assert names_of(bias, net) == ["0.bias", "2.bias"]
    assert names_of(last, net) == ["2.weight"]
    assert (rest["lr"], bias["lr"], last["lr"]) == (1e-3, 1e-3, 0.25)
    assert bias["weight_decay"] == 0.0


def test_groups_equal_those_written_by_hand_to_the_bit() -> None:
    mine, theirs = make_net(), make_net()
    factory = lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.3)  # noqa: E731
    after = train(mine, make_optimizer(factory, mine, param_groups={"*.bias": {"weight_decay": 0.0}}))
    by_hand = [
        {"params": [theirs[0].weight, theirs[2].weight]},
        {"params": [theirs[0].bias, theirs[2].bias], "weight_decay": 0.0},
    ]
    expected = train(theirs, torch.optim.SGD(by_hand, lr=0.1, weight_decay=0.3))
    assert all(map(torch.equal, after, expected))


def test_pattern_for_all_parameters_leaves_no_empty_group() -> None:
    optimizer = make_optimizer("adam", make_net(), param_groups={"*": {"lr": 0.5}})
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(4, 0.5)]


def test_pattern_that_matches_nothing_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ValueError, match=r"'0\.weigth' matches no parameter; did you mean '0\.weight'.*Parameters: 0\.weight, 0\.bias"
    ):
        make_optimizer("sgd", make_net(), param_groups={"0.weigth": {"lr": 0.1}})


@pytest.mark.parametrize("optimizer", ["sgd", torch.optim.SGD])
def test_unknown_option_of_a_group_is_refused_with_the_nearest(optimizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'\*\.bias'\] sets 'weight_dacay', which SGD does not have; did you mean 'weight_decay'"
    ):
        make_optimizer(optimizer, make_net(), param_groups={"*.bias": {"weight_dacay": 0.0}})


def test_groups_beside_an_optimizer_object_are_refused() -> None:
    net = make_net()
    with pytest.raises(ValueError, match="param_groups needs an optimizer given by name or class"):
        make_optimizer(torch.optim.SGD(net.parameters()), net, param_groups={"*.bias": {"lr": 0.1}})


# ---- schedulers ----


def sgd(lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(make_net().parameters(), lr=lr, momentum=0.9)


def test_no_scheduler_stays_none() -> None:
    assert make_scheduler(None, sgd()) is None


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "One-Cycle"])
def test_scheduler_that_spans_a_fit_stays_a_name(name: str) -> None:
    assert make_scheduler(name, sgd()) == name.lower().replace("-", "_")


def test_every_scheduler_name_is_made_or_spans() -> None:
    for name in SCHEDULERS:
        made = make_scheduler(name, sgd())
        assert made == name or (name == "reduce_on_plateau" and type(made) is ReduceLROnPlateau)


def test_scheduler_by_factory_class_and_object_is_bound_to_the_optimizer() -> None:
    optimizer = sgd()
    made = make_scheduler(lambda optimizer: StepLR(optimizer, step_size=7), optimizer)
    assert isinstance(made, StepLR)
    assert (made.step_size, made.optimizer) == (7, optimizer)
    by_class = make_scheduler(ReduceLROnPlateau, optimizer)
    assert isinstance(by_class, ReduceLROnPlateau)
    assert by_class.optimizer is optimizer
    assert make_scheduler(made, optimizer) is made


def test_scheduler_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"StepLR given belongs to another optimizer.*lambda optimizer: StepLR"):
        make_scheduler(StepLR(sgd(), step_size=1), sgd())


def test_unknown_scheduler_gives_the_nearest() -> None:
    with pytest.raises(ValueError, match="lr_scheduler 'cosin' is not known; did you mean 'cosine'"):
        make_scheduler("cosin", sgd())


@pytest.mark.parametrize("lr_scheduler", [3, ["cosine"]])
def test_what_can_not_make_a_scheduler_is_refused(lr_scheduler: Any) -> None:
    with pytest.raises(TypeError, match=r"lr_scheduler must be a name.*got .*Names: cosine, one_cycle"):
        make_scheduler(lr_scheduler, sgd())


def test_factory_that_makes_no_scheduler_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must make a torch scheduler.*made a .*SGD"):
        make_scheduler(lambda optimizer: optimizer, sgd())


def rates(scheduler: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("cosine", lambda optimizer: CosineAnnealingLR(optimizer, T_max=10)),
        ("one_cycle", lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=10)),
    ],
)
def test_spanning_scheduler_gives_torch_s_rates_in_every_fit(name: str, by_hand: Any) -> None:
    optimizer, steps = sgd(), 9
    expected = rates(by_hand(sgd()), steps)
    for _fit in range(3):
        with spanning_scheduler(name, optimizer, 10) as scheduler:
            assert rates(scheduler, steps) == expected
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert optimizer.param_groups[0]["momentum"] == 0.9


def test_one_cycle_peaks_at_each_group_s_own_rate() -> None:
    net = make_net()
    optimizer = torch.optim.SGD([{"params": net[0].parameters(), "lr": 0.2}, {"params": net[2].parameters()}], lr=0.1)
    peaks = [0.0, 0.0]
    with spanning_scheduler("one_cycle", optimizer, 20) as scheduler:
        for _ in range(19):
            optimizer.step()
            scheduler.step()
            peaks = [max(peak, group["lr"]) for peak, group in zip(peaks, optimizer.param_groups, strict=True)]
    assert peaks == pytest.approx([0.2, 0.1], rel=1e-6)


def test_spanning_scheduler_over_data_of_no_known_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr_scheduler='cosine' spans the fit.*no length: give steps_per_epoch"):
        spanning_scheduler("cosine", sgd(), None).__enter__()


def test_one_cycle_over_too_few_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"within 1 steps.*lr_scheduler_interval='step'"):
        spanning_scheduler("one_cycle", sgd(), 1).__enter__()


def test_rates_given_as_tensors_are_put_back_in_place() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam(make_net().parameters(), lr=rate, capturable=False, foreach=False)
    with spanning_scheduler("cosine", optimizer, 4) as scheduler:
        rates(scheduler, 4)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)


def test_plateau_that_waits_for_a_rise_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='min'"):
        make_scheduler(lambda optimizer: ReduceLROnPlateau(optimizer, mode="max"), sgd())


# ---- sparse gradients ----


class FunctionalEmbedding(nn.Module):
    """Sparse gradients that no layer announces."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(10, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(nn.functional.embedding(x, self.table, sparse=True).flatten(1))
        return outputs


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def embedding_net() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))


WORDS, KINDS = torch.arange(16).reshape(8, 2) % 10, torch.arange(8) % 3


@pytest.mark.parametrize("optimizer", [plain_sgd, torch.optim.SparseAdam, "sparse_adam"])
def test_clipping_sparse_gradients_by_value_is_refused_at_compile(optimizer: Any) -> None:
    model = kt.Model(embedding_net(), device="cpu")
    message = r"clip_grad_value=0\.5 can't clip the gradient of '0\.weight', which is sparse: use a dense embedding"
    with pytest.raises(ValueError, match=message):
        model.compile("cross_entropy", optimizer, clip_grad_value=0.5)


def test_clipping_by_value_is_for_what_the_optimizer_holds() -> None:
    net = embedding_net()
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", plain_sgd(net[2].parameters()), clip_grad_value=0.5)
    model.fit(WORDS, KINDS, verbose=0)
    net[0].requires_grad_(False)
    model.compile("cross_entropy", plain_sgd, clip_grad_value=0.5)
    model.fit(WORDS, KINDS, verbose=0)


@pytest.mark.parametrize("loop", LOOPS)
def test_sparse_gradients_of_a_function_are_refused_at_the_first_step(loop: str) -> None:
    model = kt.Model(FunctionalEmbedding(), device="cpu")
    model.compile("cross_entropy", plain_sgd, clip_grad_value=0.5, loop=loop)
    with pytest.raises(ValueError, match=r"clip_grad_value=0\.5 can't clip the gradient of 'table', which is sparse"):
        model.fit(WORDS, KINDS, verbose=0)


def takes_norms_of_sparse_tensors() -> bool:
    try:
        torch.linalg.vector_norm(torch.zeros(2).to_sparse())
    except NotImplementedError:
        return False
    return True


def test_sparse_gradients_are_clipped_by_norm_or_told() -> None:
    torch.manual_seed(0)
    mine = embedding_net()
    theirs = copy.deepcopy(mine)
    model = kt.Model(mine, device="cpu")
    model.compile("cross_entropy", plain_sgd, clip_grad_norm=0.01)
    if not takes_norms_of_sparse_tensors():
        with pytest.raises(ValueError, match=r"clip_grad_norm=0.01 can't clip the gradient of '0.weight', which is sp"):
            model.fit(WORDS, KINDS, batch_size=8, shuffle=False, verbose=0)
        return
    model.fit(WORDS, KINDS, batch_size=8, shuffle=False, verbose=0)
    nn.functional.cross_entropy(theirs(WORDS), KINDS).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    plain_sgd(theirs.parameters()).step()
    assert all(torch.equal(one, other) for one, other in zip(mine.parameters(), theirs.parameters(), strict=True))
