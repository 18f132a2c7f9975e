"""The words of an error: near matches, the list of what is known, and the argument's own name."""

import pytest

from kerastorch.errors import check_choice, check_int, check_number, did_you_mean, look_up, warn

TABLE = {"adam": 1, "adamw": 2, "sgd": 3, "bce_with_logits": 4}


@pytest.mark.parametrize("name", ["bce_with_logits", "BCE_With_Logits", "bce-with-logits", " bce_with_logits "])
def test_look_up_minds_neither_case_nor_dashes_nor_spaces_around(name: str) -> None:
    assert look_up("loss", name, TABLE) == 4


def test_look_up_of_an_unknown_name_says_kind_name_near_match_and_all_known() -> None:
    with pytest.raises(ValueError, match="known") as raised:
        look_up("optimizer", "sdg", TABLE)
    assert str(raised.value) == (
        "optimizer 'sdg' is not known; did you mean 'sgd'? Known: adam, adamw, bce_with_logits, sgd."
    )


def test_look_up_far_from_everything_gives_no_near_match() -> None:
    with pytest.raises(ValueError, match=r"'zzzz' is not known\. Known: adam") as raised:
        look_up("optimizer", "zzzz", TABLE)
    assert "did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adma", "; did you mean 'adam' or 'adamw'?"),
        ("SGDD", "; did you mean 'sgd'?"),
        ("quux", "."),
    ],
)
def test_did_you_mean_gives_up_to_two_names(name: str, hint: str) -> None:
    assert did_you_mean(name, TABLE) == hint


def test_did_you_mean_keeps_the_known_name_s_own_case() -> None:
    assert did_you_mean("linear", ["Linear1"]) == "; did you mean 'Linear1'?"


@pytest.mark.parametrize("value", ["auto", 0, 1, 2])
def test_check_choice_lets_a_choice_pass(value: object) -> None:
    check_choice("verbose", value, ("auto", 0, 1, 2))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("atuo", "verbose='atuo' is not known; did you mean 'auto'? Use one of: 'auto', 0, 1, 2."),
        (3, "verbose=3 is not known. Use one of: 'auto', 0, 1, 2."),
        (None, "verbose=None is not known. Use one of: 'auto', 0, 1, 2."),
    ],
)
def test_check_choice_names_argument_value_and_choices(value: object, message: str) -> None:
    with pytest.raises(ValueError, match="verbose") as raised:
        check_choice("verbose", value, iter(("auto", 0, 1, 2)))
    assert str(raised.value) == message


@pytest.mark.parametrize("value", [1, 2, 10**12])
def test_check_int_lets_counts_pass(value: int) -> None:
    check_int("epochs", value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "epochs must be at least 1, got 0"),
        (-3, ValueError, "epochs must be at least 1, got -3"),
        (1.0, TypeError, r"epochs must be an int, got 1\.0 \(float\)"),
        ("2", TypeError, r"epochs must be an int, got '2' \(str\)"),
        (True, TypeError, r"epochs must be an int, got True \(bool\)"),
        (None, TypeError, r"epochs must be an int, got None \(NoneType\)"),
    ],
)
def test_check_int_names_argument_and_value(value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_int("epochs", value)


def test_check_number_takes_numbers_and_says_what_is_none() -> None:
    for value in (1, -0.5, float("inf")):
        check_number("min_delta", value)
    with pytest.raises(TypeError, match=r"min_delta must be a number, got '1' \(str\)"):
        check_number("min_delta", "1")
    with pytest.raises(TypeError, match=r"min_delta must be a number, got True \(bool\)"):
        check_number("min_delta", True)
    with pytest.raises(ValueError, match=r"min_delta must be a number, got nan"):
        check_number("min_delta", float("nan"))


def test_warn_points_at_the_line_outside_the_package() -> None:
    with pytest.warns(UserWarning, match="odd") as warned:
        warn("odd")
    assert warned[0].filename == __file__
