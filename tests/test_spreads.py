import math
import re

import pytest

from glann.report.charts import ACCENT
from glann.report.spreads import Bundle, Strip, bundles, strips


def alt(svg):
    return re.search(r'aria-label="([^"]*)"', svg)[1]


def test_the_mean_of_a_bundle_is_geometric():
    bundle = Bundle("a", [[(1, 1.0), (10, 8.0)], [(1, 4.0), (10, 2.0)]])
    assert bundle.mean() == [(1, pytest.approx(2)), (10, pytest.approx(4))]


def test_curves_of_one_bundle_have_the_same_points():
    with pytest.raises(ValueError, match="shorter"):
        Bundle("a", [[(1, 1.0), (10, 8.0)], [(1, 4.0)]]).mean()


def test_bundles_are_named_and_told():
    shown = [
        Bundle("GLANN", [[(1, 1.0), (100, 0.5)], [(1, 1.0), (100, 0.125)]], ours=True),
        Bundle("a rival", [[(1, 1e-6), (100, 1e6)]]),
    ]
    svg = bundles(shown, "one", "steps", "norm")
    assert alt(svg) == (
        "norm against steps, both on log scales: GLANN from 1 to 0.25, a rival from 1e-06 to 1e+06."
    )
    assert ">GLANN</text>" in svg
    assert ">a rival</text>" in svg
    assert ACCENT in svg
    assert set(re.findall(r' id="(\w+)-', svg)) == {"one"}


@pytest.mark.parametrize("scores", [[2.0, 3.0, math.inf], [5.0], [math.inf]])
def test_strips_show_every_run(scores):
    svg = strips([Strip("GLANN", scores, scores[-1], ours=True)], "one", "FID ÷ floor", 20.0)
    assert len(re.findall(rf"<use [^>]*{ACCENT}", svg)) == len(scores)
    assert alt(svg) == f"FID ÷ floor of each run, on a log scale. Medians: GLANN {scores[-1]:.3g}."


def test_strips_stand_in_the_order_given():
    svg = strips([Strip(name, [3.0], 3.0) for name in ("b", "a")], "one", "FID ÷ floor", 20.0)
    assert svg.index(">b</text>") < svg.index(">a</text>")
