"""What a reader of records left out, and how a command says so."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SHOWN = 20
# Among what is ignored: of more than two rated responses all but the best and the worst.
RATED = "(rated responses)"


@dataclass
class ReadReport:
    """What became of everything that a reader did not use.

    Attributes:
        skipped: one message a bad record.
        ignored: field -> how many records have it; `(messages) KEY` is a key of their messages,
            and `RATED` are responses.
    """

    skipped: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def show(self, used: Iterable[str] = ()) -> None:
        """Print on stderr what was left out; `used` are fields that the command itself reads."""
        report_skipped(self.skipped)
        if rated := self.ignored[RATED]:
            print(
                f"{rated:,} record{'s' * (rated > 1)} with more than two rated responses: the best "
                "and the worst of each are read; --lists reads all",
                file=sys.stderr,
            )
        hidden = {RATED, *used}
        left = {name: count for name, count in self.ignored.items() if name not in hidden}
        if left:
            print(f"ignored fields: {_listing(left)}", file=sys.stderr)


def report_skipped(skipped: Sequence[str]) -> None:
    """Print the bad records that were left out: all of a few, the first ones of many."""
    if not skipped:
        return
    print(f"skipped {len(skipped)} bad records:", file=sys.stderr)
    for message in skipped[:SHOWN]:
        print(f"  {message}", file=sys.stderr)
    if len(skipped) > SHOWN:
        print(f"  ... and {len(skipped) - SHOWN} more", file=sys.stderr)


def _listing(ignored: dict[str, int]) -> str:
    """Return "name (1,234 records), name (12), ..." with the most frequent fields first."""
    most = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    texts = [
        f"{name or repr(name)} ({count:,}{'' if i else ' record' + 's' * (count > 1)})"
        for i, (name, count) in enumerate(most[: 2 * SHOWN])
    ]
    more = len(most) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "")
