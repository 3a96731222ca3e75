import functools

import numpy as np
import pytest
import torch

from glann.errors import GlannError
from glann.evaluation.arrays import as_features, as_pair, check_option
from glann.evaluation.frechet import frechet_distance, kernel_distance
from glann.evaluation.manifold import density_coverage, precision_recall
from glann.evaluation.memorisation import memorisation
from glann.evaluation.prd import prd_curve

VALUES = np.random.default_rng(0).normal(size=(50, 4))
"""Rounded to float16 below, so that every dtype holds the same numbers."""

SCORES = {
    "FID": (frechet_distance, 2),
    "KID": (kernel_distance, 2),
    "precision": (precision_recall, 4),
    "density": (density_coverage, 6),
    "PRD": (functools.partial(prd_curve, runs=1), 20),
}
"""The pure scores of a pair, and the fewest rows that each takes."""


def of_every_kind(values: np.ndarray):
    values = values.astype(np.float16)
    read_only = values.astype(np.float32)
    read_only.flags.writeable = False
    tensor = torch.from_numpy(values)
    return {
        "float16": values,
        "float32": values.astype(np.float32),
        "float64": values.astype(np.float64),
        "long": values.astype(np.longdouble),
        "big-endian": values.astype(">f4"),
        "read-only": read_only,
        "columns": np.asfortranarray(values.astype(np.float32)),
        "tensor16": tensor,
        "tensor32": tensor.float(),
        "tensor64": tensor.double(),
        "tensor-columns": tensor.double().T.contiguous().T,
        "gradient": tensor.float().requires_grad_(),
    }


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_the_same_from_arrays_of_every_kind(score):
    function, _ = SCORES[score]
    reals, fakes = of_every_kind(VALUES), of_every_kind(VALUES[::-1] * 0.9 + 0.2)
    wanted = function(real=reals["float64"], fake=fakes["float64"])
    for kind in reals:
        found = function(real=reals[kind], fake=fakes[kind])
        mixed = function(real=reals["tensor32"], fake=fakes[kind])
        for one in (found, mixed):
            assert np.array_equal(np.asarray(one), np.asarray(wanted)), kind
        for arrays, values in ((reals, VALUES), (fakes, VALUES[::-1] * 0.9 + 0.2)):
            left = arrays[kind].detach() if "tensor" in kind or kind == "gradient" else arrays[kind]
            assert np.array_equal(np.asarray(left), values.astype(np.float16)), kind


@pytest.mark.parametrize("score", ["FID", "KID", "precision", "density"])
def test_scores_are_python_floats(score):
    found = SCORES[score][0](real=VALUES, fake=VALUES + 1)
    assert {type(x) for x in (found if isinstance(found, tuple) else (found,))} == {float}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("few", ["real", "fake"])
def test_too_few_samples_are_refused_and_just_enough_are_not(score, few):
    function, least = SCORES[score]
    arrays = {"real": VALUES[:least], "fake": VALUES[:least]}
    function(**arrays)
    arrays[few] = VALUES[: least - 1]
    message = f"{few} has {least - 1} rows; wanted at least {least}, "
    with pytest.raises(GlannError, match=message):
        function(**arrays)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("place", ["real", "fake"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, -1e300])
def test_numbers_that_are_not_finite_are_refused(score, place, bad):
    arrays = {"real": VALUES.copy(), "fake": VALUES.copy()}
    arrays[place][17, 2] = bad
    with pytest.raises(GlannError, match=f"{place} holds NaN.*row 17"):
        SCORES[score][0](**arrays)


@pytest.mark.parametrize("score", SCORES)
def test_the_largest_numbers_that_are_taken_give_finite_scores(score):
    largest = np.full_like(VALUES, np.finfo(np.float32).max)
    found = SCORES[score][0](real=largest * np.sign(VALUES), fake=-largest)
    assert np.isfinite(np.asarray(found)).all()


@pytest.mark.parametrize("score", SCORES)
def test_real_and_fake_go_by_keyword(score):
    with pytest.raises(TypeError, match="positional"):
        SCORES[score][0](VALUES, VALUES)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (VALUES[0], r"features has shape \(4,\); wanted \(n, d\)"),
        (VALUES[None], r"shape \(1, 50, 4\)"),
        (VALUES[:, :0], r"shape \(50, 0\); wanted \(n, d\)"),
        (torch.zeros(5, 3), r"shape \(5, 3\); wanted \(n, 4\)"),
        (VALUES[:0], "has 0 rows; wanted at least 1"),
        (VALUES.astype(np.int64), "dtype int64; wanted floats"),
        (torch.zeros(5, 4, dtype=torch.uint8), "dtype uint8; wanted floats.*to_float"),
        (VALUES.astype(complex), "dtype complex128"),
        (np.array([["a", "b"]]), "dtype <U1"),
        (VALUES.tolist(), "features is a list; wanted a NumPy array or a tensor"),
        (None, "is a NoneType"),
    ],
)
def test_what_is_not_features_is_refused(array, message):
    with pytest.raises(GlannError, match=message):
        as_features(array, "features", like=torch.zeros(1, 4))


def test_the_error_says_why_so_many_are_wanted():
    with pytest.raises(GlannError, match=r"^real has 1 rows; wanted at least 3, for three$"):
        as_pair(VALUES[:1], VALUES, 3, "for three")
    with pytest.raises(GlannError, match=r"^x has 1 rows; wanted at least 3$"):
        as_features(VALUES[:1], "x", 3)


def test_only_float64_stays_float64():
    kinds = of_every_kind(VALUES)
    for kind, array in kinds.items():
        double = kind in ("float64", "long", "tensor64", "tensor-columns")
        assert as_features(array, "x").dtype == (torch.float64 if double else torch.float32), kind
    assert not as_features(kinds["gradient"], "x").requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda **x: precision_recall(**x, k=0), "k = 0"),
        (lambda **x: density_coverage(**x, k=-1), "k = -1"),
        (lambda **x: kernel_distance(**x, subsets=0), "subsets = 0"),
        (lambda **x: kernel_distance(**x, subset_size=1), "subset_size = 1"),
        (lambda **x: prd_curve(**x, clusters=1), "clusters = 1"),
        (lambda **x: prd_curve(**x, angles=2), "angles = 2"),
        (lambda **x: prd_curve(**x, runs=0), "runs = 0"),
        (lambda real, fake: memorisation(fake=fake, train=real, test=real, shown=-1), "shown = -1"),
    ],
)
def test_options_out_of_range_are_refused(call, message):
    with pytest.raises(GlannError, match=f"^{message} is out of range; wanted at least"):
        call(real=VALUES, fake=VALUES)
    check_option("anything", 3, 3)
