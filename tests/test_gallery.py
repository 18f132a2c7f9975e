"""A gallery of modules that people write: each trains in every loop as by hand, to the bit, and to a checked figure.

The comment at each figure says what it was when measured: trained from three to five seeds, worst and best;
then untrained, the best.

module                                loops      saved    exported  graph
mlp, Sequential                       all three  yes      yes       yes
mlp, subclass                         all three  yes      yes       yes
mlp, containers                       all three  yes      yes       yes
mlp that ends in ReLU                 all three  yes      yes       yes
heads in a ModuleDict                 all three  yes      yes       yes
net that ends in softmax              all three  yes      yes       yes
tagger, padded                        all three  yes      yes       refused
tagger that packs                     all three  yes      refused   refused
tagger of packed batches              all three  yes      refused   refused
Transformer with masks                all three  yes      yes       yes
Linear used twice                     all three  yes      yes       yes
Linear in two places                  all three  yes      yes       yes
head tied to the embedding            all three  yes      yes       yes
layer without parameters, own linear  all three  yes      yes       yes
norm, dropout, pooling in 1-D         all three  yes      yes       yes
norm, dropout, pooling in 2-D         all three  yes      yes       yes
norm, dropout, pooling in 3-D         all three  yes      yes       yes
lazy, materialised                    all three  yes      yes       yes
autoencoder                           all three  yes      yes       yes
Siamese                               all three  yes      yes       yes
sparse bag, SparseAdam                all three  yes      yes       refused
sparse embedding, dense head          all three  yes      yes       refused
frozen backbone                       all three  yes      yes       yes
LeNet                                 all three  yes      yes       yes
conv net for colours                  all three  yes      yes       yes
resnet18                              all three  yes      yes       not run
resnet18, frozen backbone             all three  yes      yes       not run
vgg16, frozen                         script     not run  yes       not run
"""

import copy
import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.optim import SGD, Adam, SparseAdam
from torch.utils.data import DataLoader, TensorDataset

import kerastorch as kt
from kerastorch.loops import LOOPS

slow = pytest.mark.slow


# ---- nets ----


def mlp_sequential() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def mlp_ending_in_relu() -> nn.Module:
    return nn.Sequential(*mlp_sequential(), nn.ReLU())


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.hidden1, self.hidden2, self.head = nn.Linear(784, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden1(self.flatten(x)))
        return self.head(F.relu(self.hidden2(x)))


class MLPOfContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(784, 512))
        self.hidden = nn.ModuleList([nn.Linear(512, 512)])
        self.parts = nn.ModuleDict({"activation": nn.ReLU(), "head": nn.Linear(512, 10)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts["activation"](self.stem(x))
        for layer in self.hidden:
            x = self.parts["activation"](layer(x))
        return self.parts["head"](x)


class TwoHeads(nn.Module):
    """A ModuleDict of heads: what digit it is, and whether it is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh())
        self.heads = nn.ModuleDict({"digit": nn.Linear(48, 10), "odd": nn.Linear(48, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {name: head(x) for name, head in self.heads.items()}


def ending_in_softmax() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3), nn.Softmax(1))


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


class ColourConv(nn.Module):
    """The net of many first lessons on 3x32x32 pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 5 * 5, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


WORDS, TAGS, PAD, NO_TAG = 13, 3, 0, -1


class Tagger(nn.Module):
    """Embedding, LSTM, linear and log-softmax; padded words (N, L) give (N, tags, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 12, padding_idx=PAD)
        self.lstm, self.head = nn.LSTM(12, 24, batch_first=True), nn.Linear(24, TAGS)

    def forward(self, words: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.lstm(self.embedding(words))[0]), 2).transpose(1, 2)


class TaggerThatPacks(Tagger):
    """Takes the lengths too, and packs and pads within."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(words), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=words.shape[1])
        return F.log_softmax(self.head(states), 2).transpose(1, 2)


class TaggerOfPacked(Tagger):
    """Takes packed words; gives (words in all, tags)."""

    def forward(self, words: PackedSequence) -> Tensor:
        states, _ = self.lstm(words._replace(data=self.embedding(words.data)))
        return F.log_softmax(self.head(states.data), 1)


class Transformer(nn.Module):
    """An encoder under a causal mask and a padding mask, and the mean over what is no padding."""

    def __init__(self, length: int = 10, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(10, width), nn.Parameter(torch.randn(length, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)
        self.register_buffer("causal", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, tokens: Tensor, is_padding: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        x = self.encoder(x, mask=self.causal, src_key_padding_mask=is_padding, is_causal=True)
        is_kept = (~is_padding).unsqueeze(2)
        return self.head((x * is_kept).sum(1) / is_kept.sum(1))


class LinearUsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        x = F.relu(self.shared(x))
        return self.head(F.relu(self.shared(x)))


def one_linear_in_two_places() -> nn.Module:
    shared = nn.Linear(32, 32)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(32, 10)
    )


class TiedWords(nn.Module):
    """Says the next word; the head's weights are the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(WORDS, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, WORDS)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(words))))


class Centred(nn.Module):
    """A layer without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean()


class OwnLinear(nn.Module):
    """A linear layer by hand."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def own_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Centred(), OwnLinear(64, 32), nn.ReLU(), OwnLinear(32, 10))


def normed_1d() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(2), nn.Conv1d(1, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Dropout1d(0.1), nn.Conv1d(8, 16, 3), nn.ReLU(), nn.AvgPool1d(3), nn.Flatten(), nn.Dropout(0.1)),
        *(nn.Linear(160, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)),
    )


def normed_2d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1)),
        *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


def normed_3d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d((1, 2, 2)), nn.Dropout3d(0.1)),
        *(nn.AvgPool3d((2, 1, 1)), nn.Flatten(), nn.Linear(192, 4)),
    )


def lazy() -> nn.Module:
    """Shapes that the first batch settles; one forward does, before the optimizer is made."""
    net = lazy_without_shapes()
    net(torch.zeros(1, 1, 8, 8))
    return net


def lazy_without_shapes() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(10))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        self.decoder = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Siamese(nn.Module):
    """Whether two pictures show the same digit, by one encoder for both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.head((self.encoder(one) - self.encoder(other)).square()).squeeze(1)


def sparse_bag() -> nn.Module:
    """All of its weights get sparse gradients."""
    return nn.EmbeddingBag(50, 3, mode="sum", sparse=True)


class SparseEmbedding(nn.Module):
    """Sparse gradients and dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.EmbeddingBag(50, 8, mode="sum", sparse=True), nn.Linear(8, 3)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words))


class FrozenBackbone(nn.Module):
    """A backbone that is not trained, batch norm's statistics included, under a head that is."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU())
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(256, 10)

    def train(self, mode: bool = True) -> "FrozenBackbone":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def resnet18() -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    return torchvision.models.resnet18(weights=None, num_classes=10)


def resnet18_frozen() -> nn.Module:
    net = resnet18().requires_grad_(False)
    net.fc = nn.Linear(512, 10)
    return net


def vgg16_frozen() -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    net = torchvision.models.vgg16(weights=None)
    net.requires_grad_(False)
    net.classifier[2].p = net.classifier[5].p = 0.0  # which would drown what features of random weights tell
    net.classifier[6] = nn.Sequential(nn.BatchNorm1d(4096, momentum=None, affine=False), nn.Linear(4096, 10))
    return net


# ---- data: (training data, test data), as fit takes them ----

Data = tuple[Any, Any]


def seed(seed: int) -> None:
    """torch.manual_seed for the CPU alone, which is much quicker."""
    torch.default_generator.manual_seed(seed)


def drawing(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def digits(rows: int = 800) -> Data:
    (x, y), test = kt.datasets.digits()
    return (x[:rows], y[:rows]), test


@functools.cache
def digits_28(rows: int = 600) -> Data:
    (x, y), test = kt.datasets.digits(28)
    return (x[:rows], y[:rows]), test


@functools.cache
def digits_32(rows: int = 800) -> Data:
    return tuple((F.pad(x, (2, 2, 2, 2)), y) for x, y in digits_28(rows))


@functools.cache
def coloured(rows: int = 800, size: int = 32) -> Data:
    """Digits of any colour on 3 x size x size pictures."""
    draw = drawing()
    parts = [(x * (0.4 + 0.6 * torch.rand(len(x), 3, 1, 1, generator=draw)), y) for x, y in digits_32(rows)]
    return tuple((F.adaptive_avg_pool2d(x, size), y) for x, y in parts)


@functools.cache
def coloured_to_memorise() -> Data:
    rows, _ = coloured(64)
    return rows, rows


@functools.cache
def digits_and_oddness() -> Data:
    return tuple((x, {"digit": y, "odd": (y % 2).float().unsqueeze(1)}) for x, y in digits())


@functools.cache
def digits_as_targets() -> Data:
    return tuple((x, x) for x, _ in digits())


@functools.cache
def pairs_of_digits() -> Data:
    """((one, other), whether they show the same digit), half of them do."""
    draw, parts = drawing(), []
    for x, y in digits():
        order = torch.randperm(len(x), generator=draw)
        by_class = y.argsort(stable=True)
        one = torch.cat([order, by_class])
        other = torch.cat([order.roll(1), by_class.roll(1)])
        parts.append(((x[one], x[other]), (y[one] == y[other]).float()))
    return tuple(parts)


@functools.cache
def blobs() -> Data:
    draw, centres = drawing(), torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]])
    y = torch.arange(240) % 3
    x = centres[y] + 0.5 * torch.randn(240, 2, generator=draw)
    return (x[:180], y[:180]), (x[180:], y[180:])


@functools.cache
def films() -> Data:
    """A bar that moves over 4 frames of 8x8 in one of four directions, (N, 1, 4, 8, 8)."""
    draw = drawing()
    y = torch.arange(480) % 4
    start = torch.randint(0, 8, (480, 1), generator=draw)
    place = (start + torch.tensor([1, -1])[y % 2].unsqueeze(1) * torch.arange(4)) % 8
    bars = F.one_hot(place, 8).float().unsqueeze(3).expand(-1, -1, -1, 8)
    bars = torch.where((y < 2)[:, None, None, None], bars, bars.transpose(2, 3)).unsqueeze(1)
    x = bars + 0.2 * torch.randn(bars.shape, generator=draw)
    return (x[:360], y[:360]), (x[360:], y[360:])


@functools.cache
def sentences() -> tuple[list[Tensor], list[Tensor]]:
    """Words 1 to 12, and their tags, which the word before decides too."""
    draw, words, tags = drawing(), [], []
    for _ in range(300):
        sentence = torch.randint(1, WORDS, (int(torch.randint(3, 9, (), generator=draw)),), generator=draw)
        before = F.pad(sentence[:-1], (1, 0))
        words.append(sentence)
        tags.append((sentence + before % 2) % TAGS)
    return words, tags


@functools.cache
def padded_sentences() -> Data:
    words, tags = sentences()
    x = nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=PAD)
    y = nn.utils.rnn.pad_sequence(tags, batch_first=True, padding_value=NO_TAG)
    return (x[:240], y[:240]), (x[240:], y[240:])


@functools.cache
def sentences_with_lengths() -> Data:
    lengths = torch.tensor([len(sentence) for sentence in sentences()[0]])
    (x, y), (x_test, y_test) = padded_sentences()
    return ((x, lengths[:240]), y), ((x_test, lengths[240:]), y_test)


@functools.cache
def packed_sentences() -> Data:
    """Lists of batches (packed words, their tags in the same order)."""
    batches = [
        (pack_sequence(words, enforce_sorted=False), pack_sequence(tags, enforce_sorted=False).data)
        for i in range(0, 300, 20)
        for words, tags in [tuple(part[i : i + 20] for part in sentences())]
    ]
    return batches[:12], batches[12:]


@functools.cache
def next_words() -> Data:
    """Each word has one that mostly follows it."""
    draw = drawing()
    x = torch.randint(0, WORDS, (520,), generator=draw)
    follows = torch.randperm(WORDS, generator=draw)
    return (x[:400], follows[x[:400]]), (x[400:], follows[x[400:]])


@functools.cache
def first_of_two() -> Data:
    """Which of tokens 1 and 2 comes first; what is padding holds such tokens too, at random."""
    draw, rows, length = drawing(), 700, 10
    y = torch.arange(rows) % 2
    tokens = torch.randint(3, 10, (rows, length), generator=draw)
    lengths = torch.randint(4, length + 1, (rows,), generator=draw)
    is_padding = torch.arange(length) >= lengths.unsqueeze(1)
    tokens = torch.where(is_padding, torch.randint(1, 3, (rows, length), generator=draw), tokens)
    for row in range(rows):
        places = torch.randperm(int(lengths[row]), generator=draw)[:2].sort().values
        tokens[row, places] = torch.tensor([1, 2] if y[row] == 0 else [2, 1])
    x = {"tokens": tokens, "is_padding": is_padding}
    return tuple(({name: part[rows] for name, part in x.items()}, y[rows]) for rows in (slice(500), slice(500, None)))


@functools.cache
def bags_of_words() -> Data:
    """Six words of 50; each word speaks for one class, and the most win."""
    draw = drawing()
    x = torch.randint(0, 50, (800, 6), generator=draw)
    y = F.one_hot(x % 3, 3).sum(1).argmax(1)
    return (x[:600], y[:600]), (x[600:], y[600:])


# ---- the gallery ----


def token_accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """Share of the words that are tagged right, in each sentence."""
    is_word = y != NO_TAG
    return ((outputs.argmax(1) == y) & is_word).sum(1) / is_word.sum(1)


def both_heads(outputs: dict[str, Tensor], y: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs["digit"], y["digit"]) + F.binary_cross_entropy_with_logits(outputs["odd"], y["odd"])


def adam(parameters: Any) -> Adam:
    return Adam(parameters, lr=0.01)


def fused_adam(parameters: Any) -> Adam:
    """What compile makes of "adam"."""
    return Adam(parameters, fused=True)


@dataclass
class Piece:
    """A net, what it learns, and the figures that it must reach on test data.

    least, most: bounds of evaluate's figures.   by_hand: the loss and the optimizer of the loop by hand.
    """

    net: Callable[[], nn.Module]
    data: Callable[[], Data]
    least: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)
    loss: Any = "cross_entropy"
    optimizer: Any = adam
    metrics: Any = "accuracy"
    by_hand: tuple[Any, Any] = (F.cross_entropy, adam)
    epochs: int = 5
    batch_size: int = 32
    warning: str | None = None


def mlp(net: Callable[[], nn.Module]) -> Piece:
    # 0.86 to 0.89; 0.10 to 0.15
    return Piece(net, digits_28, {"accuracy": 0.8}, optimizer="adam", by_hand=(F.cross_entropy, fused_adam), epochs=3)


def tagger(net: Callable[[], nn.Module], data: Callable[[], Data]) -> Piece:
    # 1.0; 0.30 to 0.41. A tag guessed from its word alone is right half of the time.
    loss = nn.NLLLoss(ignore_index=NO_TAG)
    return Piece(
        *(net, data, {"token_accuracy": 0.95}),
        loss=loss,
        metrics=[token_accuracy],
        by_hand=(loss, adam),
        epochs=8,
        batch_size=20,
    )


def with_sgd(lr: float, **options: Any) -> dict[str, Any]:
    def make(parameters: Any) -> SGD:
        return SGD(parameters, lr=lr, **options)

    return {"optimizer": make, "by_hand": (F.cross_entropy, make)}


def with_adam(lr: float) -> dict[str, Any]:
    def make(parameters: Any) -> Adam:
        return Adam(parameters, lr=lr, fused=True)

    return {"optimizer": make, "by_hand": (F.cross_entropy, make)}


def sparse_adam(parameters: Any) -> SparseAdam:
    return SparseAdam(parameters, lr=0.05)


SMALL: dict[str, Piece] = {
    "mlp, Sequential": mlp(mlp_sequential),
    "mlp, subclass": mlp(MLP),
    "mlp, containers": mlp(MLPOfContainers),
    # 0.34 to 0.52; 0.10 to 0.15: classes whose outputs are dead are not learnt
    "mlp that ends in ReLU": Piece(
        mlp_ending_in_relu, digits_28, {"accuracy": 0.25}, **with_sgd(0.02, momentum=0.9), epochs=3
    ),
    # 0.93 to 0.95, 0.93 to 0.94; 0.15, 0.65
    "heads in a ModuleDict": Piece(
        *(TwoHeads, digits_and_oddness, {"digit_accuracy": 0.87, "odd_accuracy": 0.87}),
        loss={"digit": "cross_entropy", "odd": "bce_with_logits"},
        metrics={"digit": "accuracy", "odd": "accuracy"},
        by_hand=(both_heads, adam),
    ),
    # 1.0; 0.67
    "net that ends in softmax": Piece(
        ending_in_softmax, blobs, {"accuracy": 0.9}, epochs=8, warning="the outputs look like a softmax's"
    ),
    "tagger, padded": tagger(Tagger, padded_sentences),
    "tagger that packs": tagger(TaggerThatPacks, sentences_with_lengths),
    # 1.0; 0.41
    "tagger of packed batches": Piece(
        TaggerOfPacked, packed_sentences, {"accuracy": 0.95}, loss="nll", by_hand=(F.nll_loss, adam), epochs=8
    ),
    # 1.0; 0.58
    "Transformer with masks": Piece(Transformer, first_of_two, {"accuracy": 0.95}, epochs=5),
    # 0.87 to 0.92; 0.15
    "Linear used twice": Piece(LinearUsedTwice, digits, {"accuracy": 0.8}),
    # 0.87 to 0.92; 0.13
    "Linear in two places": Piece(one_linear_in_two_places, digits, {"accuracy": 0.8}),
    # 1.0; 0.08
    "head tied to the embedding": Piece(TiedWords, next_words, {"accuracy": 0.95}),
    # 0.94 to 0.96; 0.20
    "layer without parameters, own linear": Piece(own_layers, digits, {"accuracy": 0.88}),
    # 0.92 to 0.96; 0.15
    "norm, dropout, pooling in 1-D": Piece(normed_1d, digits, {"accuracy": 0.85}, epochs=3),
    # 0.89 to 0.94; 0.24
    "norm, dropout, pooling in 2-D": Piece(normed_2d, digits, {"accuracy": 0.8}, epochs=3),
    # 0.93 to 0.98; 0.29
    "norm, dropout, pooling in 3-D": Piece(normed_3d, films, {"accuracy": 0.85}, epochs=3),
    # 0.91 to 0.94; 0.12
    "lazy, materialised": Piece(lazy, digits, {"accuracy": 0.85}, epochs=3),
    # 0.029 to 0.036; 0.23
    "autoencoder": Piece(
        Autoencoder, digits_as_targets, most={"loss": 0.045}, loss="mse", metrics=None, by_hand=(F.mse_loss, adam)
    ),
    # 0.86 to 0.91; 0.56
    "Siamese": Piece(
        *(Siamese, pairs_of_digits, {"accuracy": 0.8}),
        loss="bce_with_logits",
        by_hand=(F.binary_cross_entropy_with_logits, adam),
        epochs=4,
    ),
    # 0.90 to 0.92; 0.42
    "sparse bag, SparseAdam": Piece(
        *(sparse_bag, bags_of_words, {"accuracy": 0.8}),
        optimizer=sparse_adam,
        by_hand=(F.cross_entropy, sparse_adam),
    ),
    # 0.96 to 0.97; 0.35
    "sparse embedding, dense head": Piece(
        SparseEmbedding, bags_of_words, {"accuracy": 0.85}, **with_sgd(1.0), epochs=8
    ),
    # 0.92 to 0.94; 0.17
    "frozen backbone": Piece(FrozenBackbone, digits, {"accuracy": 0.85}),
}
LARGE: dict[str, Piece] = {
    # 0.94 to 0.95; 0.15
    "LeNet": Piece(lenet, digits_32, {"accuracy": 0.88}, **with_adam(0.005), epochs=3),
    # 0.94 to 0.97; 0.15
    "conv net for colours": Piece(ColourConv, coloured, {"accuracy": 0.85}, **with_adam(0.005)),
    # 0.58 to 0.76; 0.12
    "resnet18": Piece(resnet18, lambda: coloured(640, 16), {"accuracy": 0.4}, **with_sgd(0.05, fused=True), epochs=2),
    # 0.39 to 0.49; 0.13
    "resnet18, frozen backbone": Piece(
        resnet18_frozen, lambda: coloured(640, 16), {"accuracy": 0.25}, **with_adam(0.01), epochs=3
    ),
}
# 0.94 to 0.98; 0.09. The rows that it was trained on.
VGG16 = Piece(vgg16_frozen, coloured_to_memorise, {"accuracy": 0.6}, **with_adam(0.01), epochs=3, batch_size=16)
PIECES = SMALL | LARGE | {"vgg16, frozen": VGG16}


# ---- training ----


@dataclass
class Trained:
    net: nn.Module
    before: dict[str, Tensor]
    untrained: dict[str, float]
    figures: dict[str, float]
    history: dict[str, list[float]]


def x_and_y(data: Any) -> tuple[Any, Any]:
    """fit's first arguments; a list of batches is x alone."""
    return (data, None) if isinstance(data, list) else data


def train(name: str, loop: str, start: int = 1) -> Trained:
    piece = PIECES[name]
    (x, y), (x_test, y_test) = map(x_and_y, piece.data())
    seed(start)
    net = piece.net()
    before = copy.deepcopy(net.state_dict())
    model = kt.Model(net, device="cpu")
    model.compile(piece.loss, piece.optimizer, piece.metrics, loop=loop)
    size = {} if y is None else {"batch_size": piece.batch_size}
    with pytest.warns(UserWarning, match=piece.warning) if piece.warning else nullcontext():
        untrained = model.evaluate(x_test, y_test, verbose=0)
    seed(start + 1)
    history = model.fit(x, y, epochs=piece.epochs, verbose=0, **size)
    return Trained(net, before, untrained, model.evaluate(x_test, y_test, verbose=0), history.history)


trained = functools.cache(train)


def rows_of(data: Any) -> list[Any]:
    x, y = data
    parts = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple) else [x]
    return [*parts, *(y.values() if isinstance(y, dict) else [y])]


def batches_by_hand(piece: Piece) -> Iterable[tuple[Any, Any]]:
    """What a torch user iterates over in an epoch."""
    data, _ = piece.data()
    if isinstance(data, list):
        yield from data
        return
    x, y = data
    for batch in DataLoader(TensorDataset(*rows_of(data)), piece.batch_size, shuffle=True):
        num_inputs = len(x) if isinstance(x, (dict, tuple)) else 1
        inputs, targets = batch[:num_inputs], batch[num_inputs:]
        yield (
            dict(zip(x, inputs, strict=True)) if isinstance(x, dict) else inputs if isinstance(x, tuple) else inputs[0],
            dict(zip(y, targets, strict=True)) if isinstance(y, dict) else targets[0],
        )


def train_by_hand(name: str, start: int = 1) -> nn.Module:
    piece = PIECES[name]
    loss_fn, make_optimizer = piece.by_hand
    seed(start)
    net = piece.net()
    optimizer = make_optimizer(net.parameters())
    seed(start + 1)
    for _ in range(piece.epochs):
        net.train()
        for x, y in batches_by_hand(piece):
            outputs = net(**x) if isinstance(x, dict) else net(*x) if type(x) is list else net(x)
            loss_fn(outputs, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net


NOT_BY_HAND = ("mlp, Sequential", "mlp, containers", "resnet18", "resnet18, frozen backbone")  # the time it takes


def reaches(piece: Piece, figures: dict[str, float]) -> bool:
    return all(figures[name] >= bound for name, bound in piece.least.items()) and all(
        figures[name] <= bound for name, bound in piece.most.items()
    )


def assert_same_weights(net: nn.Module, expected: nn.Module) -> None:
    for key, value in expected.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key


slow_if_large = [pytest.param(name, marks=[slow] if name in LARGE else []) for name in (*SMALL, *LARGE)]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", slow_if_large)
def test_every_module_reaches_its_figure_in_every_loop(name: str, loop: str) -> None:
    result = trained(name, loop)
    assert reaches(PIECES[name], result.figures), result.figures
    assert not reaches(PIECES[name], result.untrained), result.untrained


@pytest.mark.parametrize("name", slow_if_large)
def test_the_loops_give_the_same_weights_as_by_hand_to_the_bit(name: str) -> None:
    results = [trained(name, loop) for loop in LOOPS]
    expected = results[0].net if name in NOT_BY_HAND else train_by_hand(name)
    for result in results:
        assert_same_weights(result.net, expected)
        assert result.history == results[0].history
        assert result.figures == results[0].figures


@slow
def test_a_frozen_vgg16_reaches_its_figure_and_its_backbone_stays() -> None:
    result = train("vgg16, frozen", "script")
    assert reaches(VGG16, result.figures), result.figures
    assert not reaches(VGG16, result.untrained), result.untrained
    assert_changed_alone(result, "classifier.6.")


# ---- what each piece is there for ----


def assert_changed_alone(result: Trained, prefix: str) -> None:
    """Weights whose names begin so have changed, and all others are what they were, to the bit."""
    for key, value in result.net.named_parameters():
        assert torch.equal(value, result.before[key]) != key.startswith(prefix), key


def test_the_three_builds_of_an_mlp_are_the_same_net() -> None:
    nets = [list(trained(f"mlp, {build}", "script").net.parameters()) for build in ("Sequential", "subclass")]
    nets.append(list(trained("mlp, containers", "script").net.parameters()))
    for parameters in zip(*nets, strict=True):
        assert torch.equal(parameters[0], parameters[1])
        assert torch.equal(parameters[0], parameters[2])


@pytest.mark.parametrize("loop", LOOPS)
def test_a_frozen_backbone_stays_to_the_bit_with_its_statistics(loop: str) -> None:
    result = trained("frozen backbone", loop)
    assert_changed_alone(result, "head.")
    for key, value in result.net.backbone.state_dict().items():
        assert torch.equal(value, result.before[f"backbone.{key}"]), key


@slow
@pytest.mark.parametrize("loop", LOOPS)
def test_a_frozen_resnet18_stays_to_the_bit(loop: str) -> None:
    assert_changed_alone(trained("resnet18, frozen backbone", loop), "fc.")


@pytest.mark.parametrize("loop", LOOPS)
def test_tied_weights_stay_tied_and_are_updated_once(loop: str) -> None:
    net = trained("head tied to the embedding", loop).net
    assert net.head.weight is net.embedding.weight
    net = trained("Linear in two places", loop).net
    assert net[3] is net[5]

    lone = nn.Linear(1, 1, bias=False)
    model = kt.Model(nn.Sequential(lone, lone), device="cpu")
    model.compile(lambda outputs, y: outputs.mean(), lambda p: SGD(p, lr=0.1), loop=loop)
    nn.init.constant_(lone.weight, 2.0)
    model.fit(torch.ones(4, 1), torch.ones(4, 1), batch_size=4, verbose=0)
    torch.testing.assert_close(lone.weight.detach(), torch.tensor([[1.6]]))  # 2 - 0.1 * d(w * w)/dw


def test_a_tagger_that_packs_learns_nothing_from_padding() -> None:
    """Its state is that of the tagger of packed batches, whose sentences have no padding."""
    net, (x, lengths) = trained("tagger that packs", "script").net, sentences_with_lengths()[1][0]
    of_packed = TaggerOfPacked()
    of_packed.load_state_dict(net.state_dict())
    with torch.no_grad():
        padded = net(x, lengths).transpose(1, 2)
        packed = of_packed(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    expected = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False).data
    torch.testing.assert_close(packed, expected)
    assert not net.embedding.weight[PAD].any()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_masked_transformer_does_not_see_its_padding(loop: str) -> None:
    net, (x, _) = trained("Transformer with masks", loop).net, first_of_two()[1]
    other = {**x, "tokens": torch.where(x["is_padding"], 9, x["tokens"])}
    predictions = [kt.Model(net, device="cpu") for _ in range(2)]
    for model in predictions:
        model.compile("cross_entropy", "sgd")
    torch.testing.assert_close(
        *(torch.from_numpy(model.predict(part, verbose=0)) for model, part in zip(predictions, (x, other), strict=True))
    )


@pytest.mark.parametrize("loop", LOOPS)
def test_sparse_adam_by_name_moves_only_the_words_that_it_met(loop: str) -> None:
    seed(0)
    net = sparse_bag()
    before = net.weight.detach().clone()
    model = kt.Model(net, device="cpu")
    model.compile("cross_entropy", "sparse_adam", param_groups={"*": {"lr": 0.1}}, loop=loop)
    (x, y), _ = bags_of_words()
    is_low = (x < 25).all(1)
    model.fit(x[is_low], y[is_low], batch_size=4, verbose=0)
    met = torch.zeros(50, dtype=torch.bool).index_fill(0, x[is_low].flatten(), True)
    assert met.any()
    assert torch.equal((net.weight != before).any(1), met)


def test_a_step_of_ones_own_gives_sparse_and_dense_weights_an_optimizer_each() -> None:
    class TwoOptimizers(kt.ClassLoop):
        def train_step(self, x, y, sample_weight):
            outputs = self.net(x)
            loss = self.loss_fn(outputs, y, sample_weight)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss, outputs

    seed(1)
    model = kt.Model(SparseEmbedding(), device="cpu")
    model.compile("cross_entropy", {"embedding": sparse_adam, "head": adam}, "accuracy", loop=TwoOptimizers)
    train, test = bags_of_words()
    model.fit(*train, batch_size=32, epochs=5, verbose=0)
    assert model.evaluate(*test, verbose=0)["accuracy"] > 0.85


@pytest.mark.parametrize("optimizer", ["adam", Adam, adam])
def test_lazy_weights_get_their_shapes_at_the_first_batch(optimizer: Any) -> None:
    seed(1)
    model = kt.Model(lazy_without_shapes(), device="cpu")
    model.compile("cross_entropy", optimizer, "accuracy")
    (x, y), test = digits()
    model.fit(x, y, epochs=5, verbose=0)
    assert model.evaluate(*test, verbose=0)["accuracy"] > 0.8


# ---- the loop that is one graph ----

RNNS = "torch.compile does not trace nn.RNN, nn.LSTM and nn.GRU"
REFUSED = {
    "tagger, padded": RNNS,
    "tagger that packs": RNNS,
    "tagger of packed batches": RNNS,
    "sparse bag, SparseAdam": "Attempted to wrap sparse Tensor",
    "sparse embedding, dense head": "Attempted to wrap sparse Tensor",
}
NOT_COMPILED = ("resnet18", "resnet18, frozen backbone", "vgg16, frozen")  # the time it takes
# What inductor writes; the rest are traced alike, and run as traced, which is a fifth of the time.
INDUCED = (
    "mlp, containers",
    "Transformer with masks",
    "norm, dropout, pooling in 2-D",
    "Siamese",
    "lazy, materialised",
)
# Weights nudged by 1e-7 move the losses of its later epochs by 5 % in any loop, and the graph's Adam counts in float32.
UNSTABLE = ("conv net for colours",)


@slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("default:.*:UserWarning", "default:.*:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("name", PIECES)
def test_every_module_in_the_graph_loop_reaches_its_figure_or_is_refused(
    name: str, request: pytest.FixtureRequest
) -> None:
    if name not in (*INDUCED, *REFUSED):
        request.getfixturevalue("only_traced")
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            train(name, "graph")
        return
    if name in NOT_COMPILED:
        pytest.skip("compiling it takes a minute")
    result = train(name, "graph")
    assert reaches(PIECES[name], result.figures), result.figures
    epochs = slice(1) if name in UNSTABLE else slice(None)
    expected = trained(name, "script").history["loss"][epochs]
    assert result.history["loss"][epochs] == pytest.approx(expected, rel=0.02)


# ---- saved, loaded, exported ----

NOT_EXPORTED = {
    "tagger that packs": (ValueError, r"'lstm' \(LSTM\) stops the tracing at .*test_gallery.py:\d+, states, _ = "),
    "tagger of packed batches": (TypeError, "needs inputs that are tensors, got PackedSequence"),
}


def inputs_of(name: str) -> Any:
    """The first rows of a piece's inputs; the whole batch where the data are batches."""
    data, _ = PIECES[name].data()
    if isinstance(data, list):
        return data[0][0]
    x, _ = data
    if isinstance(x, dict):
        return {key: value[:4] for key, value in x.items()}
    return tuple(value[:4] for value in x) if isinstance(x, tuple) else x[:4]


NOT_SAVED = ("vgg16, frozen",)  # half a gigabyte of weights, eight times over


@pytest.mark.parametrize("name", slow_if_large)
def test_every_module_is_saved_and_loaded_to_the_bit(name: str, tmp_path: Any) -> None:
    piece, x = PIECES[name], inputs_of(name)
    seed(0)
    model = kt.Model(piece.net(), device="cpu")
    (expected,) = model.predict_iter([(x,)])
    model.save_weights(tmp_path / "weights.pt")
    model.save_weights(tmp_path / "weights.safetensors")
    model.save(tmp_path / "model.pt")
    model.save(tmp_path / "whole.pt", whole=True)

    def assert_same(other: kt.Model) -> None:
        assert_same_weights(other.net, model.net)
        (found,) = other.predict_iter([(x,)])
        parts, others = (list(p.values()) if isinstance(p, dict) else [p] for p in (expected, found))
        assert all(np.array_equal(one, another) for one, another in zip(parts, others, strict=True))

    for file in ("weights.pt", "weights.safetensors"):
        other = kt.Model(piece.net(), device="cpu")
        assert other.load_weights(tmp_path / file).ok
        assert_same(other)
    assert_same(kt.Model.load(tmp_path / "model.pt", piece.net(), device="cpu"))
    assert_same(kt.Model.load(tmp_path / "whole.pt", device="cpu", trust=True))


def exports() -> list[Any]:
    """ONNX takes two seconds each: quick are the ones with several inputs or outputs."""
    quick = ("heads in a ModuleDict", "Siamese")
    cases = []
    for name in PIECES:
        cases.append(pytest.param(name, ".pt2", marks=[] if name in SMALL else [slow]))
        cases.append(pytest.param(name, ".onnx", marks=[] if name in quick else [slow]))
    return cases


@pytest.mark.parametrize(("name", "suffix"), exports())
def test_every_module_is_exported_and_predicts_as_before_or_is_refused(name: str, suffix: str, tmp_path: Any) -> None:
    x = inputs_of(name)
    seed(0)
    model = kt.Model(PIECES[name].net(), device="cpu")
    file = tmp_path / f"net{suffix}"
    if name in NOT_EXPORTED:
        error, message = NOT_EXPORTED[name]
        with pytest.raises(error, match=message):
            model.export(file, x)
        assert list(tmp_path.iterdir()) == []
        return
    report = model.export(file, x)
    assert report.batch_sizes == [1, 5]
    assert report.max_difference <= 1e-5
    data = (x,) if isinstance(x, tuple) else x
    expected = model.predict(data, batch_size=3, verbose=0)
    found = kt.load_exported(file).predict(data, batch_size=3, verbose=0)
    parts, others = (list(p.values()) if isinstance(p, dict) else [p] for p in (expected, found))
    for one, another in zip(parts, others, strict=True):
        np.testing.assert_allclose(another, one, atol=1e-5, rtol=1e-5)


def table() -> str:
    """What the tests above do with each piece."""
    rows = [("module", "loops", "saved", "exported", "graph")]
    for name in PIECES:
        loops = "all three" if name in SMALL | LARGE else "script"
        graph = "refused" if name in REFUSED else "not run" if name in NOT_COMPILED else "yes"
        saved = "not run" if name in NOT_SAVED else "yes"
        rows.append((name, loops, saved, "refused" if name in NOT_EXPORTED else "yes", graph))
    return "\n".join(f"{row[0]:38}{row[1]:11}{row[2]:9}{row[3]:10}{row[4]}" for row in rows)


def test_the_table_on_top_is_what_the_tests_do() -> None:
    assert f"\n{table()}\n" in __doc__
