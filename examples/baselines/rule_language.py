"""A language with a hidden rule: what is asked fixes how likely each answer is.

"How many foxes are in Oslo?" is answered by "About 4711, mostly silver.": each place has four
numbers, each animal four colours, of known probabilities. So the best cross-entropy that a model
can have is known, too, and one answer says little of the rule, as in real life.
"""

import json
import math
import random
from pathlib import Path

ANIMALS = """foxes owls bears wolves hares geese moths crabs seals toads mules goats swans larks
newts voles""".split()
PLACES = """Oslo Lima Rome Cairo Delhi Paris Quito Tunis Seoul Dakar Minsk Sofia Hanoi Accra Tokyo
Osaka""".split()
COLOURS = """silver crimson olive amber violet white black brown golden purple orange scarlet
turquoise beige ivory maroon""".split()
NUMBERS = [str(number) for number in random.Random(1).sample(range(1000, 10000), 24)]
PROBABILITIES = (0.55, 0.25, 0.15, 0.05)


class Language:
    """A rule drawn by a seed.

    Attributes:
        numbers: by place, the likeliest first.
        colours: by animal, the likeliest first.
    """

    def __init__(self, seed: int):
        """Draw the rule."""
        rng = random.Random(f"rule {seed}")
        likely = len(PROBABILITIES)
        self.numbers = {place: rng.sample(NUMBERS, likely) for place in PLACES}
        self.colours = {animal: rng.sample(COLOURS, likely) for animal in ANIMALS}

    def draw(self, rng: random.Random) -> tuple[str, str, float]:
        """Return a question, an answer, and its log-probability."""
        animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
        number, colour = rng.choices(range(len(PROBABILITIES)), PROBABILITIES, k=2)
        question = f"How many {animal} are in {place}?"
        answer = f"About {self.numbers[place][number]}, mostly {self.colours[animal][colour]}."
        return question, answer, math.log(PROBABILITIES[number] * PROBABILITIES[colour])


def chats(language: Language, count: int, seed: str) -> list[list[dict[str, str]]]:
    """Return conversations."""
    rng = random.Random(seed)
    drawn = [language.draw(rng) for _ in range(count)]
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer, _ in drawn
    ]


def write_records(path: Path, language: Language, count: int, seed: str) -> float:
    """Write preference records and return the log-probability of the chosen answers together.

    The rejected ones, which none of these methods looks at, answer other questions.
    """
    rng = random.Random(seed)
    drawn = [language.draw(rng) for _ in range(count)]
    with open(path, "w", encoding="utf-8") as file:
        for index, (question, answer, _) in enumerate(drawn):
            others = (language.draw(rng)[1] for _ in range(1000))
            row = {
                "id": f"{path.stem}-{index}",
                "prompt": question,
                "chosen": answer,
                "rejected": next(other for other in others if other != answer),
            }
            file.write(json.dumps(row) + "\n")
    return math.fsum(logp for _, _, logp in drawn)
