import contextlib
import dataclasses
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from glann.errors import GlannError
from glann.settings import as_dict, check, nearest_name, setting, type_name


@dataclass
class Example:
    epochs: int = setting(15, "passes over the images", minimum=1, maximum=100)
    lr: float = setting(1e-3, "learning rate", minimum=0)
    offset: float = setting(0.0, "anything", maximum=5)
    factor: float = setting(1.0, "any finite number")
    loss: str = setting("l1", "which loss", choices=("l1", "laplacian", "vgg"))
    path: str | None = setting(None, "a file")
    start: str | None = setting(None, "where from", choices=("pca", "random"))
    batch_norm: bool = setting(True, "normalise")
    prior: float | bool = setting(False, "strength, or none", minimum=0, maximum=1)
    size: int | list[int] | None = setting(None, "pixels", minimum=4, maximum=64)
    models: list[str] = setting(["a"], "what to compare", choices=("a", "b", "c"))

    def __post_init__(self):
        self.codes_ = "learned"


@dataclass
class WithLearned:
    width: int = setting(8, "units", minimum=1)
    state: object = None


def test_defaults_are_valid():
    check(Example())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 1),
        ("epochs", 100),
        ("lr", 0),
        ("lr", 3),
        ("lr", 1e300),
        ("offset", -1e300),
        ("offset", 5),
        ("factor", -7),
        ("factor", 10**400),
        ("loss", "vgg"),
        ("path", None),
        ("path", "x"),
        ("start", "pca"),
        ("batch_norm", False),
        ("prior", True),
        ("prior", 0.5),
        ("size", 4),
        ("size", [64, 4]),
        ("size", None),
        ("models", []),
        ("models", ["c", "a"]),
    ],
)
def test_values_within_the_limits_are_taken(name, value):
    check(Example(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs = 0 is out of range; wanted 1 to 100 (passes over the images)"),
        ("epochs", 101, "epochs = 101 is out of range; wanted 1 to 100"),
        ("epochs", 10**400, "is out of range; wanted 1 to 100"),
        ("epochs", 2.0, "epochs = 2.0 is of type float; wanted int (passes over the images)"),
        ("epochs", True, "epochs = True is of type bool; wanted int"),
        ("epochs", "5", "epochs = '5' is of type text; wanted int"),
        ("epochs", None, "epochs = None is of type NoneType; wanted int"),
        ("lr", -1e-9, "lr = -1e-09 is out of range; wanted at least 0 (learning rate)"),
        ("lr", math.nan, "lr = nan is out of range; wanted at least 0"),
        ("lr", math.inf, "lr = inf is out of range; wanted at least 0"),
        ("lr", True, "lr = True is of type bool; wanted float"),
        ("offset", 5.1, "offset = 5.1 is out of range; wanted at most 5 (anything)"),
        ("offset", -math.inf, "offset = -inf is out of range; wanted at most 5"),
        ("factor", math.nan, "factor = nan is out of range; wanted a finite number"),
        ("factor", math.inf, "factor = inf is out of range; wanted a finite number"),
        ("loss", "laplacain", "loss = 'laplacain' is not one of the choices; did you mean 'lap"),
        ("loss", "xyz", "loss = 'xyz' is not one of the choices; valid: l1, laplacian, vgg"),
        ("loss", None, "loss = None is of type NoneType; wanted text"),
        ("path", 3, "path = 3 is of type int; wanted text (a file)"),
        ("start", "pcs", "start = 'pcs' is not one of the choices; did you mean 'pca'?"),
        ("batch_norm", 1, "batch_norm = 1 is of type int; wanted bool"),
        ("prior", 1.5, "prior = 1.5 is out of range; wanted 0 to 1"),
        ("prior", "x", "prior = 'x' is of type text; wanted float or bool"),
        ("size", 3, "size = 3 is out of range; wanted 4 to 64"),
        ("size", [8, 65], "size = 65 is out of range; wanted 4 to 64"),
        ("size", [8, 8.0], "size = [8, 8.0] is of type list; wanted int or list of int"),
        ("models", ["a", "bb"], "models = 'bb' is not one of the choices"),
        ("models", "a", "models = 'a' is of type text; wanted list of text"),
        ("models", ["a", 1], "models = ['a', 1] is of type list; wanted list of text"),
    ],
)
def test_other_values_are_refused_by_name(name, value, message):
    with pytest.raises(GlannError) as caught:
        check(Example(**{name: value}), "glo")
    assert str(caught.value).startswith(f"glo.{name} = ")
    assert message in str(caught.value)
    with pytest.raises(GlannError) as caught:
        check(Example(**{name: value}))
    assert str(caught.value).startswith(f"{name} = ")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from([field.name for field in dataclasses.fields(Example)]), value=anything)
@hypothesis_settings(deadline=None, max_examples=60)
def test_whatever_is_given_there_is_no_other_error(name, value):
    with contextlib.suppress(GlannError):
        check(Example(**{name: value}))


@given(value=st.integers())
def test_a_range_is_inclusive_and_nothing_else(value):
    accepted = True
    try:
        check(Example(epochs=value))
    except GlannError:
        accepted = False
    assert accepted == (1 <= value <= 100)


def test_constructors_only_store():
    assert Example(epochs=-3, loss=7).epochs == -3


def test_a_list_that_is_a_default_is_not_shared():
    Example().models.append("b")
    assert Example().models == ["a"]


def test_as_dict_leaves_out_what_was_learned():
    assert as_dict(WithLearned(width=3, state=object())) == {"width": 3}
    assert list(as_dict(Example())) == [field.name for field in dataclasses.fields(Example)]


def test_what_was_learned_is_not_checked():
    check(WithLearned(state="anything"))
    with pytest.raises(GlannError, match="width"):
        check(WithLearned(width=0))


def test_nearest_name():
    assert nearest_name("epoch", ["epochs", "width"]) == "did you mean 'epochs'?"
    assert nearest_name("zzz", iter(["width", "epochs"])) == "valid: epochs, width"


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int, "int"),
        (str, "text"),
        (float | bool, "float or bool"),
        (str | None, "text"),
        (list[int], "list of int"),
        (int | list[str] | None, "int or list of text"),
    ],
)
def test_type_names(annotation, name):
    assert type_name(annotation) == name
