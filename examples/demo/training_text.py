"""Chat examples on which the demo's specialists are trained, beside the training pairs.

General questions come from `corpus/general.jsonl` and a small table of countries, math from seeded
generators that work every problem out, code from templates and from the small documented functions
of Python's own standard library. No specialist is trained on a held-out pair.
"""

import ast
import json
import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DEMO = Path(__file__).parent
Example = tuple[str, str, str]  # system prompt ("" for none), user prompt, response

COUNTRIES = """France Paris Europe euro; Germany Berlin Europe euro; Italy Rome Europe euro;
Spain Madrid Europe euro; Japan Tokyo Asia yen; India Delhi Asia rupee; Egypt Cairo Africa pound;
Ghana Accra Africa cedi; Peru Lima America sol; Chile Santiago America peso;
Norway Oslo Europe krone; Poland Warsaw Europe zloty; Turkey Ankara Asia lira;
Thailand Bangkok Asia baht; Vietnam Hanoi Asia dong; Greece Athens Europe euro;
Austria Vienna Europe euro; Morocco Rabat Africa dirham; Uruguay Montevideo America peso"""

STDLIB_MODULES = """bisect calendar colorsys fnmatch fractions functools glob heapq inspect
ipaddress keyword linecache numbers operator posixpath pprint random secrets shlex shutil
statistics string
textwrap timeit token tokenize types uuid warnings collections/__init__ json/__init__
importlib/util urllib/parse email/utils concurrent/futures/_base ast copy dataclasses datetime
difflib enum gettext html/__init__ mimetypes optparse os pathlib/__init__ quopri stat struct
tempfile traceback typing weakref zipfile/__init__""".split()


def pairs(split: str, domains: tuple[str, ...]) -> Iterator[tuple[str, str, str, str]]:
    """(system, prompt, chosen, rejected) of `split` ("train" or "heldout"), `domains` only."""
    for line in (DEMO / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["domain"] in domains:
            prompt = record["prompt"]
            system, user = (
                ("", prompt) if isinstance(prompt, str) else (m["content"] for m in prompt)
            )
            yield system, user, record["chosen"], record["rejected"]


def training_examples(domains: tuple[str, ...]) -> list[Example]:
    """Prompts and chosen responses of the training pairs that belong to `domains`."""
    return [(system, prompt, chosen) for system, prompt, chosen, _ in pairs("train", domains)]


def general_examples(rng: random.Random) -> list[Example]:
    """Everyday questions with direct answers; `rng` picks the wording of the country facts."""
    lines = (DEMO / "corpus" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [("", record["prompt"], record["response"]) for record in map(json.loads, lines)]
    for entry in COUNTRIES.replace("\n", " ").split(";"):
        country, capital, continent, money = entry.split()
        where = f"It is in {continent}, and people there pay with the {money}."
        questions = [f"What is the capital of {country}?", f"Name the capital city of {country}."]
        answer = f"The capital of {country} is {capital}. {where}"
        examples.append(("", rng.choice(questions), answer))
        answer = f"{capital} is in {country}, of which it is the capital. {where}"
        examples.append(("", f"In which country is {capital}?", answer))
    return examples


def math_examples(rng: random.Random, count: int) -> list[Example]:
    """`count` worked problems; every solution is computed, so every answer is right."""
    return [("", *rng.choice(MATH_PROBLEMS)(rng)) for _ in range(count)]


def _addition(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(15, 99), rng.randint(15, 99)
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = f", write {ones - 10} and carry 1" if ones > 9 else ""
    sum_tens = f"{a // 10} + {b // 10}" + (" + 1" if ones > 9 else "")
    solution = f"Add the ones: {a % 10} + {b % 10} = {ones}{carry}. Add the tens: {sum_tens} = "
    solution += f"{tens + (ones > 9)}. So {a} + {b} = {a + b}. Answer: {a + b}."
    return f"What is {a} + {b}?", solution


def _percent(rng: random.Random) -> tuple[str, str]:
    price, percent = 20 * rng.randint(1, 20), rng.choice([5, 10, 15, 25, 30, 40, 50, 75])
    off = price * percent // 100
    thing = rng.choice(["coat", "chair", "watch", "bag", "table", "book", "ticket", "camera"])
    solution = f"The discount is {percent}% of {price}: {percent / 100:.2f} * {price} = {off} "
    left = price - off
    solution += f"dollars. The {thing} costs {price} - {off} = {left} dollars. Answer: {left}."
    return f"A {thing} of ${price} is sold at {percent}% off. What does it cost?", solution


def _equation(rng: random.Random) -> tuple[str, str]:
    a, x, b, name = rng.randint(2, 12), rng.randint(1, 15), rng.randint(1, 30), rng.choice("xyzn")
    total = a * x + b
    solution = f"Subtract {b} from both sides: {a}{name} = {a * x}. Divide both sides by {a}: "
    solution += f"{name} = {x}. Check: {a} * {x} + {b} = {total}, which is right. Answer: {x}."
    return f"Solve for {name}: {a}{name} + {b} = {total}.", solution


def _speed(rng: random.Random) -> tuple[str, str]:
    hours, speed = rng.randint(2, 9), rng.choice([12, 15, 40, 55, 60, 70, 80, 90, 110])
    who = rng.choice(["car", "bus", "train", "cyclist", "boat"])
    solution = f"Speed is distance divided by time: {hours * speed} / {hours} = {speed}. "
    solution += f"The {who} moves at {speed} kilometers per hour. Answer: {speed}."
    return f"A {who} covers {hours * speed} kilometers in {hours} hours. How fast is it?", solution


def _area(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 30), rng.randint(2, 20)
    solution = "The area of a rectangle is its length times its width: "
    solution += f"{a} * {b} = {a * b} square meters. Answer: {a * b}."
    return f"A rectangle is {a} meters long and {b} meters wide. What is its area?", solution


def _share(rng: random.Random) -> tuple[str, str]:
    parts, each, extra = rng.randint(2, 9), rng.randint(3, 15), rng.randint(1, 9)
    total, name = parts * each + extra, rng.choice(["Mia", "Omar", "Li", "Eva", "Noah", "Zoe"])
    thing = rng.choice(["coins", "cards", "pens", "cookies", "shells"])
    rest = total - extra
    solution = f"After keeping {extra}, {name} has {total} - {extra} = {rest} {thing} to share. "
    solution += f"Each friend gets {rest} / {parts} = {each}. Answer: {each}."
    question = f"{name} has {total} {thing}, keeps {extra} and shares the rest among {parts} "
    return question + "friends. How many does each friend get?", solution


def _mean(rng: random.Random) -> tuple[str, str]:
    values = [rng.randint(1, 30) for _ in range(3)]
    values.append(rng.randint(1, 9) * 4 - sum(values) % 4)
    mean = sum(values) // 4
    terms = " + ".join(map(str, values))
    solution = f"Add the numbers: {terms} = {sum(values)}. There are 4 numbers, so the mean is "
    solution += f"{sum(values)} / 4 = {mean}. Answer: {mean}."
    return f"What is the mean of {', '.join(map(str, values))}?", solution


def _divisor(rng: random.Random) -> tuple[str, str]:
    common, a, b = rng.randint(2, 12), *rng.choice([(2, 3), (3, 4), (3, 5), (2, 5), (4, 5), (5, 7)])
    x, y = common * a, common * b
    solution = f"Write both as multiples of {common}: {x} = {common} * {a} and {y} = {common} * "
    solution += f"{b}. Since {a} and {b} share no factor, the greatest common divisor is {common}. "
    return f"Find the greatest common divisor of {x} and {y}.", solution + f"Answer: {common}."


def _fraction(rng: random.Random) -> tuple[str, str]:
    bottom = rng.randint(5, 12)
    a = rng.randint(1, bottom - 2)
    b = rng.randint(1, bottom - 1 - a)
    top, common = a + b, math.gcd(a + b, bottom)
    reduced = f"{top // common}/{bottom // common}"
    solution = f"The fractions have the same denominator, so add the tops: {a} + {b} = {top}. "
    solution += f"The sum is {top}/{bottom}" + (f", which is {reduced}" if common > 1 else "")
    return f"What is {a}/{bottom} + {b}/{bottom}?", solution + f". Answer: {reduced}."


def _sequence(rng: random.Random) -> tuple[str, str]:
    start, step = rng.randint(1, 30), rng.randint(2, 12)
    values = [start + step * i for i in range(5)]
    solution = f"Each number is {step} more than the one before: {values[0]} + {step} = "
    solution += f"{values[1]}. The next is {values[3]} + {step} = {values[4]}. Answer: {values[4]}."
    return f"Which number follows {', '.join(map(str, values[:4]))}?", solution


def _product(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(12, 79), rng.randint(3, 9)
    tens, ones = a // 10 * 10, a % 10
    solution = f"Split {a} into {tens} and {ones}: {tens} * {b} = {tens * b} and {ones} * {b} = "
    solution += f"{ones * b}. Together {tens * b} + {ones * b} = {a * b}. Answer: {a * b}."
    return f"Multiply {a} by {b}.", solution


MATH_PROBLEMS = [_addition, _percent, _equation, _speed, _area, _share, _mean, _divisor, _fraction]
MATH_PROBLEMS += [_sequence, _product]


def template_code_examples(rng: random.Random, count: int) -> list[Example]:
    """`count` small Python functions with one sentence of explanation each."""
    examples = []
    for _ in range(count):
        items = rng.choice(["numbers", "values", "scores", "prices", "items", "temperatures"])
        verb, test = rng.choice(
            [("positive", "{x} > 0"), ("negative", "{x} < 0"), ("odd", "{x} % 2 == 1")]
            + [(f"greater than {n}", "{x} > " + str(n)) for n in (3, 10, 50, 100)]
            + [(f"divisible by {n}", "{x} % " + str(n) + " == 0") for n in (3, 5, 7)]
        )
        x = rng.choice(["n", "x", "value"])
        test = test.format(x=x)
        goal, body, why = rng.choice(
            [
                (f"counts the {items} that are {verb}", f"sum(1 for {x} in {items} if {test})",
                 f"The generator gives 1 for each item with `{test}`, and `sum` adds them."),
                (f"keeps only the {items} that are {verb}", f"[{x} for {x} in {items} if {test}]",
                 f"The list comprehension keeps each item for which `{test}` is true."),
                (f"checks whether all {items} are {verb}", f"all({test} for {x} in {items})",
                 "`all` stops at the first item that fails; an empty list gives True."),
                (f"checks whether any of the {items} is {verb}", f"any({test} for {x} in {items})",
                 "`any` stops at the first item that passes; an empty list gives False."),
            ]
        )  # fmt: skip
        name = rng.choice(["solve", "check", "select", "process", f"scan_{items}", f"test_{items}"])
        response = f"```python\ndef {name}({items}):\n    return {body}\n```\n{why}"
        examples.append(("", f"Write a Python function that {goal}.", response))
    return examples


def stdlib_code_examples(limit: int) -> list[Example]:
    """Short documented functions of this Python's standard library; none without sources."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Example] = []
    for module in STDLIB_MODULES:
        path = root / f"{module}.py"
        if path.is_file():
            found.extend(_documented_functions(path.read_text(encoding="utf-8")))
    return found[:limit]


def _documented_functions(source: str) -> Iterator[Example]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        lines = (node.end_lineno or 0) - node.lineno
        if docstring is None or not 2 <= lines <= 25 or len(node.body) < 2:
            continue
        node.body = node.body[1:]  # the docstring becomes the sentence after the code
        code, summary = ast.unparse(node), docstring.split("\n\n")[0].replace("\n", " ")
        if 40 <= len(code) <= 500 and len(summary) <= 200:
            prompt = f"Write the Python function `{node.name}`. {summary}"
            yield "", prompt, f"```python\n{code}\n```\n{summary}"
