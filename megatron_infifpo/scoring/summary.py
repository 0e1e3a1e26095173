"""The closing table of a scoring job."""

from collections import defaultdict

from megatron_infifpo.data.records import PreferenceRecord

# `(sum of log-probs, tokens)` of each response of a record, or None where it is masked.
Scored = list[tuple[float, int]] | None


def print_summary(
    name: str, records: list[PreferenceRecord], scored: list[Scored], output: str
) -> None:
    """Print records, tokens, masked records, mean log-prob and preference by domain."""
    by_domain: dict[str, list[Scored]] = defaultdict(list)
    for record, values in zip(records, scored, strict=True):
        by_domain[record.domain].append(values)
    print(f"\n{name} -> {output}")
    print(
        f"{'domain':<12}{'records':>9}{'masked':>8}{'tokens':>10}"
        f"{'mean log-prob':>15}{'prefers chosen':>16}"
    )
    for domain, rows in [*sorted(by_domain.items()), ("all", scored)]:
        present = [row for row in rows if row is not None]
        tokens = sum(count for row in present for _, count in row)
        total = sum(value for row in present for value, _ in row)
        wins = sum(row[0][0] / row[0][1] > row[1][0] / row[1][1] for row in present)
        mean = f"{total / tokens:.3f}" if tokens else "-"
        share = f"{wins / len(present):.1%}" if present else "-"
        print(
            f"{domain:<12}{len(rows):>9}{len(rows) - len(present):>8}{tokens:>10}"
            f"{mean:>15}{share:>16}"
        )
