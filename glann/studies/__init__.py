"""The claims about GLANN as experiments that anyone can run."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glann.studies.study import Study

STUDIES = {
    "modes": "no mode of the data is dropped",
    "gradients": "the gradient does not vanish",
    "stability": "training is stable with settings at random",
    "likelihood": "likelihood is maximised without computing one",
    "blur": "IMLE on pixels is blurred, GLANN is not",
}
"""Names of the studies, each also of its module here, and what they test in a few words."""


def find_study(name: str) -> "Study":
    """The study of a name of STUDIES; imports torch."""
    study: Study = importlib.import_module(f"glann.studies.{name}").STUDY
    return study
