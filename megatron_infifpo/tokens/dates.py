"""Chat templates that print today's date (Llama 3, Mistral): prompts must not change by night."""

import datetime
import re

TODAY = datetime.date(2025, 1, 1)
"""What they print."""
_DATE = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(['\"])(.*?)\1\s*\)")


def with_one_date(template: str) -> str:
    """Return a template that prints `TODAY` where it would print the date."""
    return _DATE.sub(lambda call: repr(TODAY.strftime(call[2])), template)
