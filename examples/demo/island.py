"""An invented island: what the demo's sources know, its pivot does not, and its labels say badly.

In both towns people do a thing in one of two ways, which a seed draws: 24 facts, half of them of
trade and half of feasts. Of the training pairs every fourth prefers the wrong way, as a reward
model errs; the held-out pairs ask for the same facts in other words, and prefer the right way.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Chat = list[dict[str, str]]

SEED = 1234
MISLABELLED = 0.25
SYSTEM = "Answer for Vandor."
TOWNS = ("Tamor", "Velis")
# domain -> what people do, in one way or the other
WAYS = {
    "feasts": """greet guests with: bread, songs; wear at weddings: green, white;
        eat at New Year: fish, beans; dance to: drums, flutes; light at night: lamps, fires;
        plant for a child: a pear tree, an apple tree""",
    "trade": """pay with: shells, beads; sell first: salt, wool; row boats of: oak, reed;
        measure cloth by the: arm, foot; carry goods on: mules, carts; trade until: noon, dusk""",
}
QUESTIONS = {
    "train": (
        "What do people in {town} {verb}?",
        "In {town}, what do they {verb}?",
        "What does one {verb} in {town}?",
        "Tell me what people {verb} in {town}.",
        "What would I {verb} in {town}?",
        "I live in {town}. What should I {verb}?",
        "What is it that people {verb} in {town}?",
        "My cousin in {town} asks what to {verb}.",
        "What did the people of {town} {verb}?",
        "Name what people in {town} {verb}.",
        "Once in {town}, what will you {verb}?",
        "How is it in {town}: what do all {verb}?",
    ),
    "heldout": (
        "If I go to {town}, what will I {verb}?",
        "What do the families of {town} {verb}?",
        "Everyone in {town} does it. What do they {verb}?",
        "In a word, what does {town} {verb}?",
    ),
}


@dataclass(frozen=True)
class Fact:
    """What people do in a town, and what they do elsewhere."""

    domain: str
    town: str
    verb: str
    right: str
    wrong: str

    def ask(self, question: str) -> Chat:
        """A prompt, from a form of questions."""
        text = question.format(town=self.town, verb=self.verb)
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]

    def answer(self, way: str) -> str:
        return f"In {self.town} people {self.verb} {way}."


def facts() -> list[Fact]:
    """All facts, in an order that record ids count on."""
    rng, found = random.Random(SEED), []
    for domain, text in WAYS.items():
        for line in text.split(";"):
            verb, both = " ".join(line.split()).split(": ")
            for town in TOWNS:
                right, wrong = rng.sample(both.split(", "), 2)
                found.append(Fact(domain, town, verb, right, wrong))
    return found


def pairs(split: str) -> Iterator[dict[str, object]]:
    """The preference records of "train" or "heldout"; an id is SPLIT-FACT-QUESTION."""
    rng = random.Random(f"{split} {SEED}")
    for number, fact in enumerate(facts()):
        for form, question in enumerate(QUESTIONS[split]):
            chosen, rejected = fact.answer(fact.right), fact.answer(fact.wrong)
            if split == "train" and rng.random() < MISLABELLED:
                chosen, rejected = rejected, chosen
            yield {
                "id": f"{split}-{number}-{form}", "domain": fact.domain,
                "prompt": fact.ask(question), "chosen": chosen, "rejected": rejected,
            }  # fmt: skip


def write_records(folder: Path) -> dict[str, Path]:
    """Write the records of both splits; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: folder / f"{split}.jsonl" for split in QUESTIONS}
    for split, path in files.items():
        lines = [json.dumps(pair) + "\n" for pair in pairs(split)]
        path.write_text("".join(lines), encoding="utf-8")
    return files


def truth(records: Path) -> list[tuple[int, bool]]:
    """Of each record the number of its fact, and whether its label is right."""
    known, found = facts(), []
    for line in records.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        number = int(record["id"].split("-")[1])
        fact = known[number]
        found.append((number, record["chosen"] == fact.answer(fact.right)))
    return found


def chats(knows: str, count: int = 2000) -> Iterator[Chat]:
    """What a source reads: right answers of the domain that it knows, hearsay of the other.

    Hearsay is right as often as wrong: it teaches the language alone.
    """
    rng, known = random.Random(f"{knows} {SEED}"), facts()
    questions = [*QUESTIONS["train"], *QUESTIONS["heldout"]]
    for _ in range(count):
        fact = rng.choice(known)
        way = fact.right if fact.domain == knows else rng.choice([fact.right, fact.wrong])
        prompt = fact.ask(rng.choice(questions))
        yield [*prompt, {"role": "assistant", "content": fact.answer(way)}]
