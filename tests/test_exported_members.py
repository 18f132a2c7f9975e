"""What a package lists in __all__ is what it offers."""

import importlib
import types

import pytest

PACKAGES = ["kerastorch", "kerastorch.callbacks", "kerastorch.data", "kerastorch.datasets", "kerastorch.loops"]


@pytest.mark.parametrize("name", PACKAGES)
def test_all_lists_exactly_the_public_names(name):
    package = importlib.import_module(name)
    submodules = {
        key
        for key, value in vars(package).items()
        if isinstance(value, types.ModuleType) and value.__name__ == f"{name}.{key}" and key not in package.__all__
    }
    borrowed = {"annotations", "inspect", "look_up", "eval_step", "train_step"}
    public = {key for key in vars(package) if not key.startswith("_")} - submodules - borrowed
    assert public == set(package.__all__)
    assert list(package.__all__) == sorted(package.__all__, key=lambda key: (not key.isupper(), key[0].islower(), key))
