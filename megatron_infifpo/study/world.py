"""A country of dialects: a prompt has two plausible answers, and its village says which is right.

Three domains, each with one rule of two forms: sums (carry the ten, or drop it), turns (of three
letters to the left or to the right), plurals (one of two endings). 30 villages ask questions of a
domain, and each has one form of its rule: 90 cells. A model knows some, is unsure of some, and is
wrong about others. So there is something that preferences can teach, and that a source may know.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.responses.prompts import Prompt

DOMAINS = ("sums", "turns", "plurals")
_PAIRS = [(a, e) for a in "bcdfghklmnprstvwyz" for e in "aeiou"]
# The first two letters tell all villages apart: so do the first tokens of most tokenizers.
_NAMES = [a + e + "nd ft lm mp rk st".split()[i % 6] for i, (a, e) in enumerate(_PAIRS)]
VILLAGES = {domain: tuple(_NAMES[place::3]) for place, domain in enumerate(DOMAINS)}
LETTERS, VOWELS = "bdfgklmnprst", "aeiou"
ENDINGS = ("ek", "um")
PARTS = {
    "pretraining": 0.45, "sft": 0.15, "preference": 0.15, "verification": 0.03, "tuning": 0.07,
    "heldout": 0.15,
}  # fmt: skip
"""Shares of the questions. Settings are chosen on the part tuning, sources judged on verification.
"""


@dataclass(frozen=True)
class Question:
    """A prompt and its two answers.

    Attributes:
        domain, village: its cell.
        text: the prompt.
        forms: the answer under each form of the rule.
    """

    domain: str
    village: str
    text: str
    forms: tuple[str, str]

    @property
    def right(self) -> str:
        """The answer that is right in the village."""
        return self.forms[form(self.domain, self.village)]

    @property
    def other(self) -> str:
        """The answer that would be right elsewhere."""
        return self.forms[1 - form(self.domain, self.village)]

    @property
    def id(self) -> str:
        """Unique among all questions."""
        return self.text.replace(" ", "-")

    def record(self) -> dict[str, Any]:
        """As a prompt of a file; programs that judge read the answer."""
        extra = {"answer": self.right, "forms": self.forms}
        return {"id": self.id, "domain": self.domain, "prompt": self.text, "extra": extra}


def _share(*words: object) -> float:
    """A number in [0, 1) that is drawn by words alone."""
    digest = hashlib.sha256("|".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def form(domain: str, village: str) -> int:
    """Which form of a domain's rule a village has."""
    return int(_share("form", domain, village) < 0.5)


def ask(domain: str, village: str, rng: random.Random) -> Question:
    """Draw a question of a cell."""
    if domain == "sums":
        ones = rng.randint(1, 9)
        a, b = 10 * rng.randint(1, 4) + ones, 10 * rng.randint(1, 4) + rng.randint(10 - ones, 9)
        return Question(domain, village, f"{village} {a}+{b}", (str(a + b), str(a + b - 10)))
    if domain == "turns":
        x, y, z = rng.sample(LETTERS, 3)
        text = f"{village} turn {x}-{y}-{z}"
        return Question(domain, village, text, (f"{y}-{z}-{x}", f"{z}-{x}-{y}"))
    stem = rng.choice(LETTERS) + rng.choice(VOWELS) + rng.choice(LETTERS)
    return Question(
        domain, village, f"{village} many {stem}", (stem + ENDINGS[0], stem + ENDINGS[1])
    )


def part(question: Question) -> str:
    """Which part of the prompts a question belongs to; no two parts share one."""
    left = _share("part", question.text)
    for name, share in PARTS.items():
        left -= share
        if left < 0:
            return name
    return name


def draw(which: str, count: int, seed: object, domains: Sequence[str] = DOMAINS) -> list[Question]:
    """Draw different questions of a part, as many of each domain."""
    rng = random.Random(f"{which} {seed}")
    found: dict[str, Question] = {}
    while len(found) < count:
        domain = domains[len(found) % len(domains)]
        question = ask(domain, rng.choice(VILLAGES[domain]), rng)
        if part(question) == which:
            found.setdefault(question.text, question)
    return list(found.values())


# Judges for `infifpo label --program`. They know the answer, and all but the exact one err: on a
# share of the responses, or about whole villages.


def exact(prompt: Prompt, response: str) -> float:
    """1 for the right answer, else 0."""
    return float(response.strip() == prompt.extra["answer"])


def noise10(prompt: Prompt, response: str) -> float:
    """Err on a tenth of the responses."""
    return _erring(prompt, response, 0.1)


def noise25(prompt: Prompt, response: str) -> float:
    """Err on a quarter of the responses."""
    return _erring(prompt, response, 0.25)


def biased(prompt: Prompt, response: str) -> float:
    """Hold the other answer for the right one in a fifth of the villages; err on a tenth, too."""
    village = prompt.id.partition("-")[0]
    if misjudged(village) and response.strip() in prompt.extra["forms"]:
        return 1 - _erring(prompt, response, 0.1)
    return _erring(prompt, response, 0.1)


def misjudged(village: str) -> bool:
    """Whether the biased judge holds the other answers for the right ones there."""
    return _share("bias", village) < 0.2


def _erring(prompt: Prompt, response: str, rate: float) -> float:
    wrong = _share("error", prompt.id, response.strip()) < rate
    return 1 - exact(prompt, response) if wrong else exact(prompt, response)


JUDGES: dict[str, Callable[[Prompt, str], float]] = {
    "exact": exact, "noise10": noise10, "noise25": noise25, "biased": biased,
}  # fmt: skip


def verdict(row: Mapping[str, Any], judge: str) -> float:
    """Judge a row of samples with one response."""
    prompt = Prompt(row["id"], row["domain"], (), row["extra"])
    return JUDGES[judge](prompt, row["responses"][0] if row["responses"] else "")
