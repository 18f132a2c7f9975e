"""The embedded digits: form, split, and that the labels belong to the images. Sister tests lie beside this file."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate

import kerastorch.datasets
from kerastorch.datasets import digits

FILE = Path(kerastorch.datasets.__file__).with_name("digits.npz")


def test_digits_is_the_function_not_its_module() -> None:
    assert callable(kerastorch.datasets.digits)
    assert kerastorch.datasets.__all__ == ["digits"]


def test_file_holds_1797_byte_images_without_pickles() -> None:
    assert FILE.stat().st_size < 100_000
    with np.load(FILE, allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["images", "labels"]
        images, labels = arrays["images"], arrays["labels"]
    assert (images.shape, images.dtype) == ((1797, 8, 8), np.uint8)
    assert (labels.shape, labels.dtype) == ((1797,), np.uint8)
    assert (images.min(), images.max()) == (0, 16)


def test_default_is_8x8_with_1438_train_and_359_test_images() -> None:
    (x_train, y_train), (x_test, y_test) = digits()
    assert x_train.shape == (1438, 1, 8, 8)
    assert y_train.shape == (1438,)
    assert x_test.shape == (359, 1, 8, 8)
    assert y_test.shape == (359,)


def test_image_size_28_has_the_shape_of_mnist() -> None:
    (x_train, y_train), (x_test, y_test) = digits(image_size=28)
    assert x_train.shape == (1438, 1, 28, 28)
    assert y_train.shape == (1438,)
    assert x_test.shape == (359, 1, 28, 28)
    assert y_test.shape == (359,)


@pytest.mark.parametrize("image_size", [8, 28])
def test_images_are_float32_between_0_and_1_and_labels_int64(image_size: int) -> None:
    for x, y in digits(image_size):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert x.min() == 0.0
        assert 0.9 < x.max() <= 1.0


def test_dtype_and_device_do_not_follow_torch_defaults() -> None:
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            (x_train, y_train), _ = digits(image_size=28)
    finally:
        torch.set_default_dtype(default_dtype)
    assert x_train.dtype == torch.float32
    assert x_train.device == y_train.device == torch.device("cpu")


def test_every_class_is_in_both_parts() -> None:
    for _, y in digits():
        assert set(y.tolist()) == set(range(10))


def test_every_image_is_in_exactly_one_part_and_every_fifth_in_test() -> None:
    (x_train, y_train), (x_test, y_test) = digits()
    assert len(x_train) + len(x_test) == 1797
    test_rows = list(range(4, 1797, 5))
    train_rows = sorted(set(range(1797)) - set(test_rows))
    with np.load(FILE, allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    for x, y, rows in [(x_train, y_train, train_rows), (x_test, y_test, test_rows)]:
        assert torch.equal(x[:, 0], images[rows].float() / 16)
        assert torch.equal(y, labels[rows].long())


def test_image_size_28_is_a_bilinear_upscale_of_the_same_images() -> None:
    for (x_small, y_small), (x_large, y_large) in zip(digits(), digits(image_size=28), strict=True):
        expected = interpolate(x_small, size=28, mode="bilinear", align_corners=False)
        torch.testing.assert_close(x_large, expected)
        assert torch.equal(y_large, y_small)


@pytest.mark.parametrize("image_size", [8, 28])
def test_two_calls_are_equal_and_share_no_memory(image_size: int) -> None:
    for (x, y), (x_again, y_again) in zip(digits(image_size), digits(image_size), strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
        assert x.data_ptr() != x_again.data_ptr()
        assert y.data_ptr() != y_again.data_ptr()


def test_global_random_states_are_untouched() -> None:
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    digits(image_size=28)
    assert random.getstate() == python_state
    np.testing.assert_equal(np.random.get_state(), numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("image_size", [0, 16, -8, "28", (28, 28), None])
def test_bad_image_size_is_refused_and_named(image_size: object) -> None:
    message = f"image_size must be 8 or 28, got {image_size!r}."
    with pytest.raises(ValueError, match=re.escape(message)):
        digits(image_size)


@pytest.mark.parametrize("image_size", [8, 28])
def test_a_linear_softmax_net_learns_more_than_90_percent_of_the_test_labels(image_size: int) -> None:
    (x_train, y_train), (x_test, y_test) = digits(image_size)
    weight = torch.zeros(image_size * image_size, 10, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(40):
        loss = cross_entropy(x_train.flatten(1) @ weight, y_train)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    accuracy = ((x_test.flatten(1) @ weight).argmax(1) == y_test).float().mean().item()
    assert accuracy > 0.9
