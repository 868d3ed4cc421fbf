"""Writes the README's performance table from the profile receipts of the repository.

python -m ivl_export.benchmarks.readme
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ivl_export.files.json import read_json
from ivl_export.profiles.measure.baseline import BACKEND
from ivl_export.profiles.measure.cases import Case
from ivl_export.profiles.measure.chat_latency import ANSWER, FIRST, NEXT, OTHER, token_ms
from ivl_export.profiles.measure.receipt import SCHEMA, Profile, read

ROOT = Path(__file__).resolve().parents[1]
RECEIPTS = ROOT / "profiles" / "receipts"
README = ROOT / "README.md"
BEGIN = "<!-- begin: written by benchmarks/readme.py from profiles/receipts -->"
END = "<!-- end -->"
COLUMNS = (
    "bundle", "on", "batch", "image, C ms", "image, G ms", "text ms", "caption ms", "images/s, C",
    "of the ceiling", "pairs, G, over PyTorch bf16",
)  # fmt: skip
CHAT_COLUMNS = (
    "chat bundle", "on", "first token ms", "next question ms", "other chat, same image ms",
    "each further token ms", "tokens/s",
)  # fmt: skip
CALLS = ("encode_image InternVL-C", "encode_image InternVL-G", "encode_text", "caption")


def render(text: str, profiles: Sequence[Profile]) -> str:
    """``text`` with the table of ``profiles`` between its two marks.

    Raises:
        ValueError: not one pair of marks in that order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after:
        raise ValueError(f"{BEGIN!r} and {END!r} must each occur once, in this order.")
    chats = [profile for profile in profiles if _is_chat(profile)]
    others = [profile for profile in profiles if not _is_chat(profile)]
    blocks = [_lines(table(others)), caption(others)]
    blocks += [_lines(chat_table(chats)), chat_caption(chats)] if chats else []
    joined = "\n\n".join(blocks)
    return f"{before}{BEGIN}\n{joined}\n{END}{after}"


def receipts(folder: Path = RECEIPTS) -> list[Profile]:
    """The profile receipts in ``folder`` by name; receipts of something else are passed over."""
    return [
        read(path)
        for path in sorted(folder.glob("*.json"))
        if isinstance(data := read_json(path), dict) and data.get("schema") == SCHEMA
    ]


def table(profiles: Sequence[Profile]) -> Iterator[Sequence[str]]:
    """Header, rule, then a row for each batch size of each profile."""
    yield COLUMNS
    yield ("---", "---", *("---:",) * (len(COLUMNS) - 2))
    for profile in profiles:
        chained = profile.of_kind("chained")
        for batch in profile.settings.batches:
            by_name = {case.name: case for case in chained if case.batch == batch}
            times = [_ms(by_name.get(name)) for name in CALLS]
            first = by_name.get(CALLS[0])
            share = None if first is None else first.of_floor
            yield (
                profile.subject.name,
                f"{profile.settings.backend} {profile.subject.recipe}",
                str(batch),
                *times,
                "" if first is None else f"{first.per_second:,.0f}",
                "" if share is None else f"{share:.0%}",
                _ratio(profile, batch),
            )


def chat_table(profiles: Sequence[Profile]) -> Iterator[Sequence[str]]:
    """Header, rule, then a row for each profile of a chat bundle."""
    yield CHAT_COLUMNS
    yield ("---", "---", *("---:",) * (len(CHAT_COLUMNS) - 2))
    for profile in profiles:
        by_name = {case.name: case for case in profile.of_kind("chained")}
        further, answer = token_ms(profile.cases), by_name.get(ANSWER)
        yield (
            profile.subject.name,
            f"{profile.settings.backend} {profile.subject.recipe}",
            *(_ms(by_name.get(name)) for name in (FIRST, NEXT, OTHER)),
            "" if further is None else f"{further:.3g}",
            "" if answer is None else f"{answer.per_second:,.0f}",
        )


def chat_caption(profiles: Sequence[Profile]) -> str:
    """Explanation of the numbers of chats, and their machines."""
    machines = dict.fromkeys(_where(profile) for profile in profiles)
    tokens = dict.fromkeys(f"{c.items}" for p in profiles for c in p.of_kind("chained") if c.name == ANSWER)
    return (
        f"Medians from pixels and a question to one token's text, on {'; '.join(machines)}: of a new "
        "image; of one known to this conversation; of one known to another conversation. Tokens per "
        f"second of a whole answer ({', '.join(tokens)} tokens) to a next question."
    )


def caption(profiles: Sequence[Profile]) -> str:
    """Explanation of the numbers, and their machines."""
    if not profiles:
        return "No profile receipt is there."
    machines = dict.fromkeys(_where(profile) for profile in profiles)
    said = (
        f"Medians of a call on {'; '.join(machines)}; captions of 30 tokens. Of the ceiling: the share of "
        "the median that products and copies would take at their measured best. Over PyTorch: modules with "
        "the same weights in bf16, in the same run; above 1 is faster."
    )
    shown = [case for p in profiles for case in p.of_kind("chained") if case.name in CALLS]
    unsteady = sum(not case.measurement.stable for case in shown)
    return said + (f" {unsteady} of these times had not settled within 2%: marked ~." if unsteady else "")


def _lines(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _is_chat(profile: Profile) -> bool:
    return any(case.name == FIRST for case in profile.of_kind("chained"))


def _where(profile: Profile) -> str:
    threads = profile.settings.threads or profile.machine.cores
    return f"{profile.machine.cpu}, {threads} thread{'s' if threads > 1 else ''}, {profile.created[:10]}"


def _ms(case: Case | None) -> str:
    if case is None:
        return ""
    return f"{'' if case.measurement.stable else '~'}{case.measurement.summary.p50_ms:.3g}"


def _ratio(profile: Profile, batch: int) -> str:
    """The speed-up of a pair in Table 19's last line of this model; only the batch that the table is of."""
    if profile.table19 is None:
        return ""
    columns = profile.table19.columns
    baselines = [
        ratio
        for line in profile.table19.lines
        for column, ratio in zip(columns, line.ratios, strict=True)
        if line.method == "InternVL-G" and column.backend != BACKEND and column.batch == batch and ratio
    ]
    return f"{baselines[-1]:.2f}x" if baselines else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table, or with ``--check`` say whether it is as the receipts have it."""
    parser = argparse.ArgumentParser(description="Write the README's performance table from the receipts.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if the table is stale")
    options = parser.parse_args(arguments)
    old = README.read_text(encoding="utf-8")
    new = render(old, receipts())
    if not options.check:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        print("README.md is stale: run python -m ivl_export.benchmarks.readme", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
