"""The demo's judge: a program. Short answers are better, and those that begin as a sentence does.

It stands for a reward model or for unit tests, which `infifpo label` takes as well.
"""


def brief(prompt, response: str) -> float:
    """From 1 for six words or fewer down to 0 for thirty; half of it without a capital first."""
    words = len(response.split())
    score = min(1.0, max(0.0, (30 - words) / 24))
    return score if response[:1].isupper() else score / 2
