"""Generated parts of documentation pages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows, in the order in which they appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


def markdown(rows: Sequence[Any], titles: Sequence[str] = ()) -> str:
    """A table; None is an empty cell.

    Args:
        rows: Mappings, whose keys are the titles, or sequences of cells.
        titles: Those of sequences.
    """
    titles = titles or columns_of(rows)
    cells = [
        [row.get(title) for title in titles] if isinstance(row, Mapping) else row for row in rows
    ]
    lines = [
        f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |"
        for line in (titles, *cells)
    ]
    lines.insert(1, "|---" * len(titles) + "|")
    return "\n".join(lines)


def replace_part(page: Path, name: str, text: str, *, whole: bool = True) -> None:
    """Replace the text between the markers ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Args:
        page: The Markdown file.
        name: Of the part.
        text: The new text.
        whole: False: replace only the rows of the table that ``text`` has, see
            :func:`merge_tables`.

    Raises:
        ValueError: The page lacks the markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, has_begin, rest = page.read_text().partition(begin)
    old, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise ValueError(f"{page} has no {begin} ... {end}")
    if not whole:
        text = merge_tables(old.strip("\n"), text)
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def merge_tables(old: str, new: str) -> str:
    """Table ``old`` with rows replaced by those of table ``new``, matched by config.

    A row that is missing in ``old`` is inserted after its predecessor in ``new``, or at the top;
    the lists of operators without a rule are merged. Rows without a config are unchanged.
    """
    (*lines, _, old_skipped), (*added, _, new_skipped) = old.splitlines(), new.splitlines()
    place = 2  # after titles and rule
    for line in added[2:]:
        link = line.split("|")[-2]
        if not link.strip():
            continue
        found = [i for i, known in enumerate(lines) if known.split("|")[-2] == link]
        if found:
            lines[found[0]] = line
        else:
            lines.insert(place, line)
        place = (found[0] if found else place) + 1
    ops = {op for text in (old_skipped, new_skipped) for op in re.findall("`.+?`", text)}
    names = ", ".join(sorted(ops, key=lambda op: op.strip("`").lower()))
    return "\n".join([*lines, "", f"{old_skipped.partition(':')[0]}: {names or 'none'}."])


def spread(values: Sequence[float], spec: str = ".1f") -> str:
    """Mean ± standard deviation, of one value the value alone; ``spec`` may ask for a sign."""
    deviation = f" ± {stdev(values):{spec.lstrip('+')}}" if len(values) > 1 else ""
    return f"{mean(values):{spec}}{deviation}"


def last_values(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By seed, the first metric at the end of each run of a row in docs/results.json."""
    return {seed: run["curve"][-1][1][0] for seed, run in sorted(runs.items())}


def gains(
    runs: Mapping[str, Mapping[str, Any]], plain: Mapping[str, Mapping[str, Any]]
) -> list[float]:
    """What the runs of a row reach above the plain network's with the same seeds."""
    of_plain = last_values(plain)
    return [v - of_plain[seed] for seed, v in last_values(runs).items() if seed in of_plain]
