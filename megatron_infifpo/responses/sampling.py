"""A sampling job: shards of prompts, each finished whole, joined when all are there."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.documents import publish
from megatron_infifpo.responses.engines import Engine
from megatron_infifpo.responses.prompts import Prompt


def run_job(
    prompts: Sequence[Prompt],
    engine: Engine,
    output: Path,
    plan: dict[str, Any],
    *,
    shard_prompts: int,
    part: tuple[int, int] = (0, 1),
) -> bool:
    """Sample what is missing, and join the shards once all are there.

    Args:
        prompts: all of them.
        engine: samples the responses of a shard.
        output: `.jsonl` to write; shards lie in `OUTPUT.shards` until then.
        plan: what the job is; shards of another one are refused.
        shard_prompts: prompts of a shard.
        part: (i, n): this process does every n-th shard from the i-th on.

    Returns:
        Whether the output is complete.

    Raises:
        UserError: shards of another job are there.
    """
    folder = Path(f"{output}.shards")
    ids = hashlib.sha256(json.dumps([[p.id, p.messages] for p in prompts]).encode()).hexdigest()
    plan = {**plan, "prompts": len(prompts), "prompts_sha256": ids, "shard_prompts": shard_prompts}
    _claim(folder, plan)
    shards = [prompts[i : i + shard_prompts] for i in range(0, len(prompts), shard_prompts)]
    paths = [folder / f"{number:06d}.jsonl" for number in range(len(shards))]
    todo = [n for n in range(part[0], len(shards), part[1]) if not paths[n].exists()]
    done = sum(path.exists() for path in paths)
    if done:
        print(f"{done} of {len(shards)} shards are there already")
    with tqdm(total=sum(len(shards[n]) for n in todo), unit="prompt", desc="sample") as bar:
        for number in todo:
            answers = engine(shards[number], plan["seed"] * 1_000_003 + number)
            lines = _lines(shards[number], answers, plan["model"])
            aside = Path(f"{paths[number]}.partial")
            aside.write_text("".join(lines), encoding="utf-8")
            publish(str(paths[number]))
            bar.update(len(shards[number]))
    if not all(path.exists() for path in paths):
        return False
    _join(paths, output)
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _join(paths: Sequence[Path], output: Path) -> None:
    """Write the output; several parts may do so at once, with the same bytes."""
    aside = Path(f"{output}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as whole:
            for path in paths:
                with path.open("rb") as shard:
                    shutil.copyfileobj(shard, whole)
            whole.flush()
            os.fsync(whole.fileno())
        os.replace(aside, output)
    except FileNotFoundError:
        aside.unlink(missing_ok=True)
        if not output.exists():  # else another part has joined them, and removed the shards
            raise


def _claim(folder: Path, plan: dict[str, Any]) -> None:
    """Write down what the shards in a folder are, or compare."""
    path = folder / "plan.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in plan:
            if before.get(name) != plan[name]:
                raise UserError(
                    f"{folder} holds shards of another job: its {name} is {before.get(name)!r}, "
                    f"this one's is {plan[name]!r}; delete it or choose another --output"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{path}.{os.getpid()}.partial")
    aside.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _lines(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], model: str
) -> Iterator[str]:
    for prompt, responses in zip(prompts, answers, strict=True):
        record: dict[str, Any] = {
            "id": prompt.id,
            "domain": prompt.domain,
            "prompt": list(prompt.messages),
        }
        record |= {"model": model, "responses": list(responses), "extra": prompt.extra}
        yield json.dumps(record, ensure_ascii=False) + "\n"
