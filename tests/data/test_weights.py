"""Sample weights beside any data: the same batches in the same order, each with its weights; class weights by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from kerastorch.data import ClassWeight, make_dataset, make_source, split_dataset
from kerastorch.losses import make_loss

CPU = torch.device("cpu")
N = 11
X = torch.arange(float(N))[:, None]
Y = torch.arange(N) % 3
W = torch.linspace(0.5, 3.0, N)


class Rows(Dataset):
    """Row i is (x, y) of row i."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], Y[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class OwnLoader(DataLoader):
    pass


def negated(items):
    """A collate function of one's own."""
    x, y = default_collate(items)
    return -x, y


def as_dict(items):
    x, y = default_collate(items)
    return {"x": x, "y": y}


def read(data, **arguments):
    return [batch for batch, _ in make_source(data, name="the data", **arguments).one_pass()]


def weigh(data, weights=W):
    return make_dataset(data, sample_weight=weights, caller="fit")


LOADERS = {
    "in order": {"batch_size": 4},
    "shuffled": {"batch_size": 4, "shuffle": True},
    "dropping the last": {"batch_size": 4, "shuffle": True, "drop_last": True},
    "own collate": {"batch_size": 4, "shuffle": True, "collate_fn": negated},
    "own sampler": {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * N, N)},
    "own batch_sampler": {"batch_sampler": BatchSampler(SequentialSampler(range(N)), 3, True)},
    "workers": {"batch_size": 4, "shuffle": True, "num_workers": 2, "collate_fn": negated},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_and_random_state_are_those_of_the_loader_without_weights(kind):
    def loader():
        return DataLoader(Rows(), **LOADERS[kind])

    torch.manual_seed(3)
    plain = list(loader())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    weighted = read(weigh(loader()))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(weighted) == len(plain)
    for (x, y, sample_weight), (plain_x, plain_y) in zip(weighted, plain, strict=True):
        assert torch.equal(x, plain_x)
        assert torch.equal(y, plain_y)
        assert torch.equal(sample_weight, W[x.abs().long().flatten()])


def test_the_loader_s_own_generator_is_drawn_from():
    def generator():
        return torch.Generator().manual_seed(7)

    plain, weighted = generator(), generator()
    batches = [x for x, _ in DataLoader(Rows(), 4, shuffle=True, generator=plain)]
    read_batches = read(weigh(DataLoader(Rows(), 4, shuffle=True, generator=weighted)))
    assert all(torch.equal(x, expected) for (x, _, _), expected in zip(read_batches, batches, strict=True))
    assert torch.equal(weighted.get_state(), plain.get_state())


def test_settings_of_the_loader_are_kept():
    loader = DataLoader(Rows(), 4, num_workers=2, prefetch_factor=3, persistent_workers=True, timeout=5.0)
    weighted = weigh(loader)
    for name in ("num_workers", "prefetch_factor", "persistent_workers", "timeout", "pin_memory", "in_order"):
        assert getattr(weighted, name) == getattr(loader, name), name


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_dataset_is_read_as_a_loader_over_it_would(shuffle):
    torch.manual_seed(3)
    plain = list(DataLoader(Rows(), 4, shuffle))
    torch.manual_seed(3)
    weighted = read(weigh(Rows()), batch_size=4, shuffle=shuffle)
    for (x, y, sample_weight), (plain_x, plain_y) in zip(weighted, plain, strict=True):
        assert torch.equal(x, plain_x)
        assert torch.equal(y, plain_y)
        assert torch.equal(sample_weight, W[x.long().flatten()])


@pytest.mark.parametrize("weights", [W, W.double().numpy(), W.tolist()], ids=["tensor", "numpy", "list"])
def test_weights_come_in_any_form_and_end_in_float32(weights):
    _, _, sample_weight = read(weigh(Rows(), weights), batch_size=N)[0]
    assert sample_weight.dtype == torch.float32
    assert torch.equal(sample_weight, W)


def test_unpack_sees_the_batch_as_the_loader_gives_it():
    seen = []

    def unpack(batch):
        seen.append(batch)
        return batch["x"], batch["y"]

    loader = DataLoader(Rows(), 4, collate_fn=as_dict)
    for x, y, sample_weight in read(weigh(loader), unpack=unpack):
        assert torch.equal(sample_weight, W[x.long().flatten()])
        assert torch.equal(y, Y[x.long().flatten()])
    assert [sorted(batch) for batch in seen] == [["x", "y"]] * 3


def test_weights_multiply_those_in_the_batch():
    own = torch.linspace(1, 2, N)
    loader = DataLoader(TensorDataset(X, Y, own), 4)
    read_weights = torch.cat([sample_weight for _, _, sample_weight in read(weigh(loader))])
    assert torch.equal(read_weights, own * W)


def test_the_batch_s_own_weights_stay_as_they_are():
    own = torch.linspace(1, 2, N)
    for data in (DataLoader(TensorDataset(X, Y, own), 4), (X, Y, own), [(X, Y, own)]):
        made = make_dataset(data, caller="fit")
        assert torch.equal(torch.cat([weight for _, _, weight in read(made)]), own)


# ---- a split of weighted data ----


@pytest.mark.parametrize("form", ["arrays", "Dataset", "loader", "loader with collate"])
def test_each_side_of_a_split_keeps_its_rows_weights(form):
    if form == "arrays":
        data = make_dataset(X, Y, W, caller="fit")
    elif form == "Dataset":
        data = weigh(Rows())
    else:
        data = weigh(DataLoader(Rows(), 4, shuffle=True, collate_fn=negated if "collate" in form else None))
    train, val = split_dataset(data, 0.3)
    for part, rows in ((train, range(7)), (val, range(7, N))):
        batches = read(part)
        x = torch.cat([x for x, _, _ in batches]).abs().long().flatten()
        assert sorted(x.tolist()) == list(rows)
        assert torch.equal(torch.cat([weight for _, _, weight in batches]), W[x])
    assert torch.equal(torch.cat([x for x, _, _ in read(val)]).abs().flatten(), X[7:].flatten())  # never shuffled


# ---- what can't be weighted ----


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Stream(), ["fit(sample_weight=...)", "Stream", "no rows to count", "(x, y, sample_weight)"]),
        (DataLoader(Stream(), 4), ["Stream", "no rows to count"]),
        ([(X, Y)], ["list", "no rows to count"]),
        (iter([(X, Y)]), ["list_iterator", "no rows to count"]),
        (OwnLoader(Rows(), 4), ["plain DataLoader", "OwnLoader over Rows", "(x, y, sample_weight)"]),
        (DataLoader(Rows(), batch_size=None), ["plain DataLoader with batches"]),
    ],
    ids=["stream", "stream's loader", "batches", "iterator", "subclass", "loader without batches"],
)
def test_data_whose_rows_can_not_be_matched_are_refused_with_the_way_out(data, words):
    with pytest.raises(ValueError, match="sample_weight") as error:
        weigh(data)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("weights", "shape"),
    [
        (W[:5], r"Tensor\(5,\) float32"),
        (W[:, None], r"Tensor\(11, 1\) float32"),
        (torch.tensor(2.0), r"Tensor\(\)"),
        ((W, W), r"\(Tensor\(11,\) float32, Tensor\(11,\) float32\)"),
    ],
    ids=["short", "column", "number", "pair"],
)
@pytest.mark.parametrize("data", [Rows(), DataLoader(Rows(), 4)], ids=["Dataset", "loader"])
def test_weights_of_another_shape_are_refused(data, weights, shape):
    with pytest.raises(ValueError, match=rf"fit\(\) got 11 samples in x but {shape}.* as sample_weight: .*\(11,\)"):
        weigh(data, weights)


def test_weights_of_another_length_are_refused_beside_arrays():
    with pytest.raises(ValueError, match=r"got 11 samples in x but 5 in sample_weight"):
        make_dataset(X, Y, W[:5], caller="fit")


# ---- class weights ----

TARGETS = {
    "indices": ("cross_entropy", Y, Y),
    "int32 indices": ("cross_entropy", Y.int(), Y),
    "one-hot": ("cross_entropy", nn.functional.one_hot(Y, 3).float(), Y),
    "binary column": ("bce_with_logits", (Y > 0).float()[:, None], (Y > 0).long()),
    "binary": ("bce_with_logits", (Y > 0).float(), (Y > 0).long()),
    "smoothed binary": ("bce_with_logits", (Y > 0).float() * 0.8 + 0.1, (Y > 0).long()),
    "a loss of one's own": (lambda outputs, y: outputs, Y, Y),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_each_sample_gets_the_weight_of_its_class_or_one(kind):
    loss, y, classes = TARGETS[kind]
    weights = {0: 0.25, 1: 4.0}  # class 2 is missing
    by_hand = torch.tensor([weights.get(int(c), 1.0) for c in classes])
    class_weight = ClassWeight(weights, make_loss(loss, CPU), CPU)
    assert torch.equal(class_weight(y, None), by_hand)
    assert torch.equal(class_weight(y, W), by_hand * W)


def test_classes_beyond_the_largest_key_weigh_one():
    class_weight = ClassWeight({1: 3.0}, make_loss("cross_entropy", CPU), CPU)
    assert class_weight(torch.tensor([0, 1, 2, 9]), None).tolist() == [1.0, 3.0, 1.0, 1.0]


def test_ignored_targets_do_not_take_a_class_s_weight_for_an_index():
    class_weight = ClassWeight({0: 5.0}, make_loss("cross_entropy", CPU), CPU)
    assert torch.isfinite(class_weight(torch.tensor([-100, 0, 1]), None)).all()


def test_pixels_are_weighted_each():
    masks = torch.arange(24).reshape(2, 3, 4) % 3
    class_weight = ClassWeight({0: 2.0, 2: 0.5}, make_loss("cross_entropy", CPU), CPU)
    by_hand = torch.tensor([2.0, 1.0, 0.5])[masks]
    assert torch.equal(class_weight(masks, None), by_hand)
    assert torch.equal(class_weight(masks, torch.tensor([1.0, 3.0])), by_hand * torch.tensor([1.0, 3.0])[:, None, None])


@pytest.mark.parametrize("keys", [{}, {"a": 1.0}, {-1: 1.0}, {0.5: 1.0}, {1.0: 2.0}])
def test_keys_that_are_no_class_indices_are_refused(keys):
    with pytest.raises(ValueError, match=r"class_weight takes \{class index from 0: weight\}"):
        ClassWeight(keys, make_loss("cross_entropy", CPU), CPU)


def test_numpy_keys_are_indices():
    """As sklearn's compute_class_weight zipped with numpy.unique gives them."""
    class_weight = ClassWeight(dict(zip(np.unique(Y), [1.0, 2.0, 3.0], strict=True)), make_loss("nll", CPU), CPU)
    assert torch.equal(class_weight(Y, None), torch.tensor([1.0, 2.0, 3.0])[Y])


@pytest.mark.parametrize(
    ("loss", "words"),
    [("mse", "needs classes.*regression.*sample_weight"), (["cross_entropy", "mse"], "one output.*sample_weight")],
)
def test_losses_without_one_class_a_sample_are_refused(loss, words):
    with pytest.raises(ValueError, match=words):
        ClassWeight({0: 1.0}, make_loss(loss, CPU), CPU)


def test_targets_without_one_class_a_sample_are_refused():
    labels = ClassWeight({0: 1.0}, make_loss("bce_with_logits", CPU), CPU)
    with pytest.raises(ValueError, match=r"one class a sample, but targets are Tensor\(5, 3\) float32: several labels"):
        labels(torch.ones(5, 3), None)
    with pytest.raises(ValueError, match=r"one tensor of targets, got \{'a': Tensor\(5,\) float32\}"):
        labels({"a": torch.ones(5)}, None)
    with pytest.raises(ValueError, match="one tensor of targets, got NoneType"):
        labels(None, None)


def test_weighted_rows_are_seen_through_a_subset_of_them():
    weighted = Subset(weigh(Subset(Rows(), range(3, N)), W[3:]), [0, 2])
    x, _, sample_weight = read(weighted)[0]
    assert x.flatten().tolist() == [3.0, 5.0]
    assert torch.equal(sample_weight, W[[3, 5]])
