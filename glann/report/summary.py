"""What the rows of a comparison say: a mean and a spread for each model, the order, the best."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

REFERENCE, GLANN, BASELINE = "reference", "glann", "baseline"
"""Groups of rows: what GLANN's stages lose, GLANN itself, and the rest."""


@dataclass(frozen=True)
class Column:
    """One number of a row, as tables show it.

    Attributes:
        key: where it is in a row; a dot leads into a nested dict.
        title: what stands above it.
        better: which way is better; None where neither is.
        factor: what it is multiplied with to be shown.
        decimals: how many are shown; None: as many as show `digits` of the least contestant's.
        digits: how many are shown of the least.
    """

    key: str
    title: str
    better: Literal["lower", "higher"] | None = None
    factor: float = 1
    decimals: int | None = None
    digits: int = 3


SCORES = (
    Column("fid_over_floor", "FID ÷ floor", "lower"),
    Column("fid", "FID", "lower"),
    Column("kid", "KID × 1000", "lower", factor=1000, digits=2),
    Column("precision", "precision", "higher", decimals=3),
    Column("recall", "recall", "higher", decimals=3),
    Column("density", "density", decimals=3),
    Column("coverage", "coverage", "higher", decimals=3),
    Column("f8", "F8", "higher", decimals=3),
    Column("f1_8", "F1/8", "higher", decimals=3),
    # 1 is right: less is copying, and more is samples unlike any image.
    Column("memorisation.ratio", "memorisation ratio", decimals=3),
)
COSTS = (
    # What the budget says, and no merit or fault: a model that failed early is cheap.
    Column("images_seen", "images seen", decimals=0),
    Column("steps", "steps", decimals=0),
    Column("seconds", "seconds", decimals=0),
    Column("cpu_seconds", "CPU seconds", decimals=0),
    Column("parameters", "parameters", decimals=0),
)
COLUMNS = SCORES + COSTS

RATIO = SCORES[0]
"""What everything is sorted by."""

NUMBERS = (
    *(column.key for column in SCORES),
    "kid_std",
    "memorisation.share_closer_to_train",
    *(column.key for column in COSTS),
    "codes_seen",
)
"""Every number of a row."""


def value(row: dict[str, Any], key: str) -> Any:
    """What a row has under a key such as "fid" or "memorisation.ratio"; None where it has none."""
    found: Any = row
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


@dataclass(frozen=True)
class Summary:
    """One model over its seeds.

    Attributes:
        model: its short name.
        label: its name in full.
        group: "reference", "glann" or "baseline".
        rows: its rows that were scored, by seed.
        failed: its rows whose training failed, by seed.
        mean: the mean over seeds of each number that any of them has.
        spread: the sample standard deviation of those that two seeds or more have.
    """

    model: str
    label: str
    group: str
    rows: tuple[dict[str, Any], ...]
    failed: tuple[dict[str, Any], ...]
    mean: dict[str, float]
    spread: dict[str, float | None]

    @property
    def trainings(self) -> int:
        """How many seeds were tried."""
        return len(self.rows) + len(self.failed)


def summarise(rows: Iterable[dict[str, Any]]) -> list[Summary]:
    """One summary for each model: the reference rows first, each part by FID ÷ floor.

    A number that is null, missing or not finite is left out of mean and spread.
    """
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    summaries = [
        _summary(sorted(of_one, key=lambda row: row["seed"])) for of_one in by_model.values()
    ]
    return sorted(
        summaries,
        key=lambda s: (s.group != REFERENCE, s.mean.get(RATIO.key, math.inf), not s.rows),
    )


def _summary(rows: list[dict[str, Any]]) -> Summary:
    scored = tuple(row for row in rows if not row.get("failed"))
    failed = tuple(row for row in rows if row.get("failed"))
    means, spreads = {}, {}
    for key in NUMBERS:
        # Costs of a training that failed would pull the mean down: they count only if all failed.
        found = [value(row, key) for row in scored or failed]
        finite = [float(x) for x in found if x is not None and math.isfinite(x)]
        if finite:
            means[key] = statistics.fmean(finite)
            spreads[key] = statistics.stdev(finite) if len(finite) > 1 else None
    first = rows[0]
    label = first.get("label") or first["model"]
    return Summary(first["model"], label, first["group"], scored, failed, means, spreads)


def contestants(summaries: Iterable[Summary]) -> list[Summary]:
    """All but the reference rows."""
    return [summary for summary in summaries if summary.group != REFERENCE]


class Format:
    """How the numbers of one table are shown: the same decimals all down a column.

    Args:
        summaries: all rows of the table.
    """

    def __init__(self, summaries: Sequence[Summary]):
        self._decimals = {column: _decimals(column, summaries) for column in COLUMNS}
        self._best = {column: self._best_text(column, summaries) for column in COLUMNS}

    def mean(self, column: Column, summary: Summary) -> str:
        """The mean as text, such as "13.9" or "720,000"; empty where there is none."""
        return self._text(column, summary.mean.get(column.key))

    def spread(self, column: Column, summary: Summary) -> str:
        """The spread as text; empty with one seed, and where all seeds have the same by design."""
        found = summary.spread.get(column.key)
        return "" if found == 0 and column in COSTS else self._text(column, found)

    def both(self, column: Column, summary: Summary) -> str:
        """Such as "13.9 ± 0.4"; empty where there is no number."""
        spread = self.spread(column, summary)
        return self.mean(column, summary) + (f" ± {spread}" if spread else "")

    def is_best(self, column: Column, summary: Summary) -> bool:
        """Whether a contestant's number is the best of several; all that look the same are."""
        text = self.mean(column, summary)
        return summary.group != REFERENCE and text != "" and text == self._best[column]

    def _text(self, column: Column, number: float | None) -> str:
        if number is None:
            return ""
        text = f"{number * column.factor:,.{self._decimals[column]}f}"
        # KID, which is unbiased, may be a little below 0: "−0.00" would look like a mistake.
        minus = text.startswith("-") and any(digit in text for digit in "123456789")
        return ("−" if minus else "") + text.removeprefix("-")

    def _best_text(self, column: Column, summaries: Sequence[Summary]) -> str | None:
        numbers = [s.mean[column.key] for s in contestants(summaries) if column.key in s.mean]
        if column.better is None or len(numbers) < 2:
            return None
        return self._text(column, (min if column.better == "lower" else max)(numbers))


def _decimals(column: Column, summaries: Sequence[Summary]) -> int:
    if column.decimals is not None:
        return column.decimals
    for these in (contestants(summaries), summaries):
        found = [s.mean[column.key] * column.factor for s in these if column.key in s.mean]
        if least := min((number for number in found if number > 0), default=None):
            return min(4, max(0, column.digits - 1 - math.floor(math.log10(least))))
    return 2


def heading(results: dict[str, Any]) -> str:
    """What was compared, as a title."""
    contesting = contestants(summarise(results["rows"]))
    own = next((s for s in contesting if s.group == GLANN), None)
    others = sum(s.group == BASELINE for s in contesting)
    title = "Scores" if others < 2 else f"{others} models"
    if own is not None:
        name = "GLANN" if own.model.startswith("glann") else own.label
        title = name[:1].upper() + name[1:]
        if others:
            title += f" against {'a baseline' if others == 1 else f'{others} baselines'}"
    return f"{title} on {results['recipe']}"


def headline(summaries: Sequence[Summary]) -> str:
    """The result in one sentence: who has the lowest FID ÷ floor, and by how much."""
    ranked = [s for s in contestants(summaries) if RATIO.key in s.mean]
    if not ranked:
        return "No contestant has an FID."
    shown = Format(summaries)

    def times(summary: Summary) -> str:
        return shown.both(RATIO, summary)

    best, *others = ranked
    if not others:
        return f"The FID of {best.label} is {times(best)} times the floor."
    lowest = f"has the lowest FID of {len(ranked)} contestants, {times(best)} times the floor"
    rival = next((other for other in others if other.group != best.group), others[0])
    if rival.group == best.group:
        return f"{best.label} {lowest}; the next, {rival.label}, has {times(rival)}."
    if best.group == GLANN:
        return f"{best.label} {lowest}; the best baseline, {rival.label}, has {times(rival)}."
    return f"A baseline wins: {best.label} {lowest}; {rival.label} has {times(rival)}."


def caveats(summaries: Sequence[Summary]) -> list[str]:
    """What a reader has to know before believing the headline, in sentences."""
    found = []
    ranked = [s for s in contestants(summaries) if RATIO.key in s.mean]
    if ranked and max(len(s.rows) for s in ranked) == 1:
        each = " each" if len(ranked) > 1 else ""
        found.append(f"One seed{each}: how much the scores vary by chance is not known.")
    elif len(ranked) > 1:
        first, second = ranked[:2]
        gap = second.mean[RATIO.key] - first.mean[RATIO.key]
        spreads = [s.spread[RATIO.key] for s in (first, second)]
        if None in spreads:
            found.append(f"Of the first two, {first.label} and {second.label}, one has one seed.")
        elif gap < sum(spread or 0 for spread in spreads):
            found.append(f"{first.label} and {second.label} differ by less than their spreads.")
    failed = [summary for summary in contestants(summaries) if summary.failed]
    if failed:
        trainings = sum(summary.trainings for summary in contestants(summaries))
        number = sum(len(summary.failed) for summary in failed)
        names = "; ".join(
            f"{summary.label} with seed{'s' * (len(summary.failed) > 1)} "
            + ", ".join(str(row["seed"]) for row in summary.failed)
            for summary in failed
        )
        found.append(f"{number} of {trainings} trainings failed: {names}.")
    return found


def protocol_line(results: dict[str, Any]) -> str:
    """What was measured and how, in one sentence."""
    protocol = results["protocol"]
    features = protocol.get("features") or {}
    on = f"{features['name']} features" if features.get("name") else "features"
    if features.get("dim") is not None:
        on = f"{features['dim']:,} {on}"
    if features.get("accuracy") is not None:
        on += f" ({features['accuracy']:.2%} accurate)"
    seeds = sorted({row["seed"] for row in results["rows"] if row["group"] != REFERENCE})
    parts = [f"{protocol['n']:,} samples of each against {protocol['real']}", f"on {on}"]
    if protocol.get("budget"):
        parts.append(f"budget {protocol['budget']}")
    if seeds:
        parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    return "; ".join([" ".join(parts[:2]), *parts[2:]]) + "."
