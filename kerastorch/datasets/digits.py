"""The 1,797 UCI handwritten digits, for runs that must be quick and need no download.

The images and labels lie in digits.npz beside this file; digits() turns them into train and test tensors.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

_FILE = Path(__file__).with_name("digits.npz")
_MAX_PIXEL = 16  # pixels count the set bits in a 4x4 block of the scan


def digits(image_size: Literal[8, 28] = 8) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the UCI handwritten digits 0 to 9 as ((x_train, y_train), (x_test, y_test)), on the CPU.

    image_size: 8 gives the images as they are; 28 a bilinear upscale, the size of MNIST.
    x: float32, (N, 1, image_size, image_size), in [0, 1] (0 is paper, 1 is ink).   y: int64, (N,).
    The split is fixed: every fifth image (index 4, 9, 14, ...) is a test image: 1,438 train, 359 test.
    Raises ValueError for any other image_size.
    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
    1998, https://doi.org/10.24432/C50P49, CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/).
    Changes made: test part only, as 8x8 arrays.
    """
    if image_size not in (8, 28):
        raise ValueError(f"image_size must be 8 or 28, got {image_size!r}.")
    with np.load(_FILE, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    x = torch.from_numpy(images).unsqueeze(1).to(torch.float32) / _MAX_PIXEL
    y = torch.from_numpy(labels).to(torch.int64)
    if image_size == 28:
        x = interpolate(x, size=(28, 28), mode="bilinear", align_corners=False)
    is_test = torch.from_numpy(np.arange(len(labels)) % 5 == 4)
    return (x[~is_test], y[~is_test]), (x[is_test], y[is_test])
