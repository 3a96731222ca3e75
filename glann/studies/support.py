"""How much of the data samples of images reach, and how soon they repeat themselves.

Recall and coverage beside held-out images; and the birthday test of Arora & Zhang 2017 (arXiv
1706.08224): a sampler of few images soon gives two that are alike.
"""

from collections.abc import Callable, Sequence

import torch

from glann.comparison import LABELS, SAMPLE_SEED
from glann.evaluation.features import make_features
from glann.evaluation.manifold import density_coverage, precision_recall
from glann.evaluation.modes import birthday, closest_pairs
from glann.images import interleave, save_grid, to_float
from glann.recipes import load_recipe
from glann.report.studies import Picture, Section, Table
from glann.studies.study import Place, Row, failures, spread
from glann.studies.trained import images_of, mixed, name_of, trained

SCORED = 10_000
"""Samples and held-out images of which recall and coverage are computed, at the most."""

BIRTHDAY_SAMPLES = 2000
"""Among which those that are alike are looked for, at the most."""

BIRTHDAY = (
    "Birthday: the smallest sample of which half hold two as near as the nearest pair of "
    f"{BIRTHDAY_SAMPLES:,} held-out images, in pixels; none: not even {BIRTHDAY_SAMPLES:,} do. A "
    "sampler of N images repeats one in about √N. Digits that are alike by chance, straight ones "
    "above all, count too: compare with the floor."
)


def support(
    place: Place,
    samples: torch.Tensor,
    held_out: torch.Tensor,
    features: Callable[[torch.Tensor], torch.Tensor],
) -> Row:
    """Recall, coverage and birthday of samples, and pictures of them.

    Args:
        place: of the run.
        samples: uint8 `(n, c, h, w)`.
        held_out: uint8 `(m, c, h, w)`, none of them seen in training.
        features: images → float `(n, d)`, in which recall and coverage are measured.

    Returns:
        "recall"; "coverage"; "birthday", the smallest sample that likely holds two as near as the
        nearest of equally many held-out images, or None; "picture" of samples and "closest", their
        nearest pairs one above the other.
    """
    held_out = mixed(held_out, SCORED)
    n = min(SCORED, len(samples), len(held_out))
    real, fake = features(held_out[:n]), features(samples[:n])
    n = min(BIRTHDAY_SAMPLES, len(samples), len(held_out))
    real_pixels, pixels = (to_float(images[:n]).flatten(1) for images in (held_out, samples))
    alike = float(closest_pairs(fake=real_pixels, shown=1)[1])
    pairs, _ = closest_pairs(fake=pixels, shown=8)
    picture, closest = f"pictures/{place.key}.png", f"pictures/{place.key}-closest.png"
    save_grid(samples[:64], place.folder / picture, columns=8)
    both = interleave(samples[pairs[:, 0]], samples[pairs[:, 1]])
    save_grid(both, place.folder / closest, columns=8)
    return {
        "recall": precision_recall(real=real, fake=fake)[1],
        "coverage": density_coverage(real=real, fake=fake)[1],
        "birthday": birthday(fake=pixels, threshold=alike),
        "picture": picture,
        "closest": closest,
    }


def images_row(place: Place, *, recipe: str, model: str, seed: int) -> Row:
    """The support of a recipe's model; "floor": of its training images."""
    train, test = images_of(place, load_recipe(recipe))
    features = make_features("auto", train=train, test=test, device=place.device)
    if model == "floor":
        made = mixed(train.images, len(test))
    else:
        made = trained(place, recipe, model, seed).sample(len(test), SAMPLE_SEED)
    return support(place, made, test.images, features)


HEAD = ["recall", "coverage", "birthday"]


def cells(rows: Sequence[Row]) -> list[str]:
    """What a table says of one model's rows under HEAD."""
    return [
        spread([row["recall"] for row in rows], 3),
        spread([row["coverage"] for row in rows], 3),
        ", ".join(str(row["birthday"] or "none") for row in rows),
    ]


def pictures(rows: Sequence[Row], of: str) -> list[Picture]:
    """Samples and nearest pairs of the first run of each model."""
    found = []
    for row in {row["model"]: row for row in reversed(rows)}.values():
        name, ours = name_of(row), row["model"] == "glann"
        found.append(Picture(row["picture"], f"{of}, {name}", ours))
        found.append(Picture(row["closest"], f"their nearest pairs, {name}", ours))
    return found


def support_section(recipe: str, rows: Sequence[Row]) -> Section:
    """What the rows of `images_row` show."""
    lines = []
    done = [row for row in rows if "failed" not in row]
    for model in dict.fromkeys(row["model"] for row in done):
        lines.append([LABELS[model], *cells([row for row in done if row["model"] == model])])
    note = (
        f"Samples beside the test images of {recipe}, as many of both. Means over seeds ± standard "
        f"deviation, and the birthday of each. {BIRTHDAY}{failures(rows, name_of)}"
    )
    ours = [row for row in done if row["model"] == "glann"]
    finding = ""
    if ours:
        finding = f"{recipe}: GLANN has recall {cells(ours)[0]}, coverage {cells(ours)[1]}"
    return Section(
        finding,
        tables=[Table(["model", *HEAD], lines, note, [LABELS["glann"]])],
        pictures=pictures(done, recipe),
    )
