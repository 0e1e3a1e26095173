"""The seed of tests that try something else each day; it is printed with a failure."""

import datetime
import os


def seed() -> int:
    """Return INFIFPO_SEED, or the number of this day."""
    number = int(os.environ.get("INFIFPO_SEED") or datetime.date.today().toordinal())
    print(f"INFIFPO_SEED={number} repeats this")
    return number
