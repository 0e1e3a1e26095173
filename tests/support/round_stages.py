"""Stand-ins for the commands of rounds: quick, and what they write follows from what they read."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def flags(words: list[str]) -> dict[str, str]:
    """Flags of a command, each with its first value."""
    found, follow = {}, [*words[1:], "--"]
    for word, value in zip(words, follow, strict=True):
        if word.startswith("--"):
            found[word[2:]] = "" if value.startswith("--") else value
    return found


def digest(path: Path) -> str:
    """What a file or a folder holds, as a word."""
    inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    assert inside, path
    return hashlib.sha256(b"".join(p.read_bytes() for p in inside)).hexdigest()[:12]


class StandIn:
    """Starts stages that read and write as the real ones do, and dies where it is told.

    Attributes:
        ran: names of the commands that were started.
        die_at: number of the command that is killed; its output is there already with `late`.
    """

    def __init__(self, die_at: int | None = None, *, late: bool = False) -> None:
        self.ran: list[str] = []
        self.die_at, self.late = die_at, late

    def __call__(self, words: list[str], log: Path) -> int:
        name, *rest = words[words.index("megatron_infifpo") + 1 :]
        given = flags(rest)
        self.ran.append(name)
        dying = len(self.ran) - 1 == self.die_at
        log.write_text(f"{name}\n")
        if dying and not self.late:
            raise Killed
        getattr(self, name.replace("import", "import_"))(given)
        if dying:
            raise Killed
        return 0

    def import_(self, given: dict[str, str]) -> None:
        save = Path(given["save"])
        save.mkdir()
        (save / "weights").write_text(f"imported {digest(Path(given['hf']))}")
        (save / "latest_checkpointed_iteration.txt").write_text("release")

    def sample(self, given: dict[str, str]) -> None:
        model, output = digest(Path(given["model"])), Path(given["output"])
        assert not output.exists()
        lines = []
        for row in map(json.loads, Path(given["input"]).read_text().splitlines()):
            texts = [f"{model} {given['seed']} {i}" for i in range(int(given["count"]))]
            reasons = ["stop"] * (len(texts) - 1) + ["length"]
            lines.append(json.dumps({**row, "responses": texts, "finish_reasons": reasons}) + "\n")
        if given.get("check") != "0":
            Path(f"{output}.measured").write_text(model)
        output.write_text("".join(lines))

    def label(self, given: dict[str, str]) -> None:
        output = Path(given["output"])
        assert not output.exists()
        rows = [json.loads(line) for line in Path(given["input"]).read_text().splitlines()]
        lines = []
        for number, row in enumerate(rows):
            scores = [float(number + i) for i in range(len(row["responses"]))]
            lines.append(json.dumps({k: row[k] for k in ("id", "responses")} | {"scores": scores}))
        Path(f"{output}.scores").write_text("\n".join(lines))
        output.write_text("\n".join([*lines, given.get("list", "pairs")]))

    def prepare(self, given: dict[str, str]) -> None:
        Path(given["output"] + ".json").write_text(digest(Path(given["input"])))

    def score(self, given: dict[str, str]) -> None:
        seen = digest(Path(given["input"])) + digest(Path(given["model"]))
        Path(given["output"] + ".json").write_text(seen)

    def train(self, given: dict[str, str]) -> None:
        save, tracker = Path(given["save"]), "latest_checkpointed_iteration.txt"
        save.mkdir(exist_ok=True)
        own = (save / tracker).exists()
        at = int((save / tracker).read_text()) if own else 0
        start = save / f"iter_{at:07d}" if own else Path(given["pretrained-checkpoint"])
        step = int(given.get("stop-at", given["train-iters"]))
        (save / f"iter_{step:07d}").mkdir()
        sources = Path(given["preference-sources"])
        seen = [digest(start), digest(Path(given["preference-data"] + ".json")), digest(sources)]
        seen += [digest(p) for p in sorted((sources.parent / "logprobs").glob("*"))]
        (save / f"iter_{step:07d}" / "weights").write_text(" ".join(seen))
        (save / tracker).write_text(str(step))
        (save / "run.json").write_text("what it says of itself")

    def export(self, given: dict[str, str]) -> None:
        load, save = Path(given["load"]), Path(given["save"])
        save.mkdir()
        step = int((load / "latest_checkpointed_iteration.txt").read_text())
        (save / "config.json").write_text(digest(load / f"iter_{step:07d}"))


OWN = ("stages", "logs", "round.json", "rounds.jsonl", ".run.lock")  # have times, or paths


def content(folder: Path) -> dict[str, str]:
    """All files that stages wrote, by path."""
    files = (p for p in folder.rglob("*") if p.is_file() and not set(p.parts) & set(OWN))
    return {str(path.relative_to(folder)): digest(path) for path in files}


def write_inputs(folder: Path) -> None:
    """Write a pivot, two sources, ten prompts, sources.yaml and a judge."""
    (folder / "judge.py").write_text("def score(prompt, response):\n    return 0.0\n")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    for name in ("one", "two"):
        (folder / name).write_text(name)
    with (folder / "prompts.jsonl").open("w") as file:
        for i in range(10):
            domain = "code" if i % 5 == 0 else "general"
            file.write(json.dumps({"id": f"p{i}", "domain": domain, "prompt": f"say {i}"}) + "\n")
    (folder / "sources.yaml").write_text(
        "initial: {logprobs: elsewhere, weight: 0.5}\nsources:\n"
        "  - {name: one, logprobs: x/one, weight: 0.3,\n"
        "     score: {model: one, backend: transformers}}\n"
        "  - {name: two, logprobs: x/two, weight: 0.2, domains: [code],\n"
        "     score: {model: two, tensor-model-parallel-size: 4}}\n"
    )


def hold(path: Path) -> None:
    """Say that the training is there, and end as Megatron does at SIGTERM: with 0, not done."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    path.touch()
    signal.pause()


def main() -> None:
    """Stand in for one command of a job on a cluster; HOLD names what the first one to train in
    the second round writes before it waits."""
    words = sys.argv[1:]
    if "megatron_infifpo.rounds.inputs" in words:  # what it looks for is no stand-in's
        return
    waits = Path(os.environ["HOLD"])
    if os.environ.get("SLURM_PROCID", "0") == "0":
        if "train" in words and str(waits.parent) in " ".join(words) and not waits.exists():
            hold(waits)
        StandIn()(words, Path(os.devnull))


if __name__ == "__main__":
    main()
