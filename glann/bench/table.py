"""What was measured, as text."""

from typing import Any

OTHERS = ("plain", "faiss", "scikit-learn")


def as_text(found: dict[str, Any]) -> str:
    """What `bench` found: the machine, the table in Markdown, and what a reader has to know."""
    notes = {row["name"]: row["note"] for row in reversed(found["rows"]) if row["note"]}
    notes = {name: notes[name] for name in dict.fromkeys(_names(found)) if name in notes}
    return "\n".join(
        [
            *(["Quick sizes: this measures nothing.", ""] if found["quick"] else []),
            *_machine(found),
            "",
            _table(found["rows"]),
            "Median rate (slowest–fastest round). × other: ours is so many times as fast. Of the",
            "limit: the share of our time that the operations would take at the machine's best",
            "rate, of bfloat16 where they are in bfloat16. Memory: the process's peak, libraries",
            "included; on a GPU, its memory.",
            *(f"{name}: {note}." for name, note in notes.items()),
            *(f"not measured: {why}" for why in found["failed"]),
            "",
        ]
    )


def _names(found: dict[str, Any]) -> list[str]:
    return [row["name"] for row in found["rows"]]


def _machine(found: dict[str, Any]) -> list[str]:
    about = found["environment"]
    versions = about["versions"] | about["libraries"]
    limits = found["machine"]
    most = [
        f"{limits[name]['rate'] / 1e9:,.4g} G{unit}/s {text}"
        for name, unit, text in (
            ("float32", "FLOP", "float32"),
            ("bfloat16", "FLOP", "bfloat16"),
            ("copy", "B", "copied (read and written)"),
        )
        if name in limits
    ]
    return [
        f"on        {about['gpu'] or about['processor']} ({about['device']})",
        f"threads   {about['threads']} of {about['cores']} cores",
        f"with      {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"at best   {', '.join(most)}",
        f"rounds    {found['rounds']}",
    ]


def _table(rows: list[dict[str, Any]]) -> str:
    others = [other for other in OTHERS if any(other in row["ratios"] for row in rows)]
    lines = [
        ["what", "rate", *(f"× {other}" for other in others), "of the limit", "memory"]
        + (["plain's"] if "plain" in others else [])
    ]
    for row in rows:
        ours = row["ways"]["ours"]
        spread = f" ({_short(ours['slowest'])}–{_short(ours['fastest'])})"
        cells = [f"– {row['part']}" if row["part"] else row["what"]]
        cells.append(f"{_short(ours['rate'])} {row['unit']}/s{spread}")
        cells += [_short(row["ratios"].get(other)) for other in others]
        cells.append("" if row["of_limit"] is None else f"{row['of_limit']:.0%}")
        cells.append(_megabytes(ours))
        if "plain" in others:
            cells.append(_megabytes(row["ways"].get("plain")))
        lines.append(cells)
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "".join(
        f"| {' | '.join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])} |\n"
        for cells in [lines[0], rules, *lines[1:]]
    )


def _short(number: float | None) -> str:
    """Three digits."""
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _megabytes(way: dict[str, Any] | None) -> str:
    return (
        "" if way is None or not way["memory_bytes"] else f"{way['memory_bytes'] / 2**20:,.0f} MB"
    )
