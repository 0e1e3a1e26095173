"""A sampling job: shards of prompts, each finished whole, joined when all are there."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.responses.answers import CUT, UNKNOWN
from megatron_infifpo.responses.completing import Wanted, complete, to_line
from megatron_infifpo.responses.engines import Engine
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.storage.documents import publish


def run_job(
    prompts: Sequence[Prompt],
    engine: Engine,
    output: Path,
    plan: dict[str, Any],
    wanted: Wanted,
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
        wanted: how many responses of which kind.
        shard_prompts: prompts of a shard.
        part: (i, n): this process does every n-th shard from the i-th on.

    Returns:
        Whether the output is complete.

    Raises:
        UserError: shards of another job are there.
    """
    folder = Path(f"{output}.shards")
    content = json.dumps([asdict(prompt) for prompt in prompts], default=str)
    plan = {**plan, **asdict(wanted), "prompts": len(prompts), "shard_prompts": shard_prompts}
    plan["prompts_sha256"] = hashlib.sha256(content.encode()).hexdigest()
    _claim(folder, plan)
    shards = [prompts[i : i + shard_prompts] for i in range(0, len(prompts), shard_prompts)]
    paths = [folder / f"{number:06d}.jsonl" for number in range(len(shards))]
    todo = [n for n in range(part[0], len(shards), part[1]) if not paths[n].exists()]
    done = sum(path.exists() for path in paths)
    if done:
        print(f"{done} of {len(shards)} shards are there already")
    with tqdm(total=sum(len(shards[n]) for n in todo), unit="prompt", desc="sample") as bar:
        for number in todo:
            answers = complete(engine, shards[number], wanted, (plan["seed"], number))
            lines = [
                json.dumps(to_line(prompt, found, wanted, plan["model"]), ensure_ascii=False)
                for prompt, found in zip(shards[number], answers, strict=True)
            ]
            aside = Path(f"{paths[number]}.partial")
            aside.write_text("\n".join([*lines, ""]), encoding="utf-8")
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


def outcome(output: Path, max_tokens: int) -> list[str]:
    """Say in sentences what the output has: how many responses, and why others are not there."""
    prompts = responses = asked = unknown = repeated = 0
    missing: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    short, model = [], ""
    with output.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            found, model = line["responses"], line["model"]
            prompts, responses, asked = prompts + 1, responses + len(found), asked + line["asked"]
            missing.update(line.get("missing", {}))
            left_out.update(line.get("left_out", {}))
            unknown += line["finish_reasons"].count(UNKNOWN)
            texts = [text.strip() for text in found if text.strip()]
            repeated += len(texts) - len(set(texts))
            if len(found) < line["asked"]:
                short.append(f"{line['id']!r} {len(found)} of {line['asked']}")

    def words(faults: Mapping[str, int]) -> str:
        at = {CUT: f"{CUT} at --max-tokens {max_tokens}"}
        return ", ".join(f"{n} {at.get(fault, fault)}" for fault, n in faults.items() if n)

    said = f"{output}: {prompts} prompts, {responses} responses of {asked} asked, of {model}"
    lines = [f"{said}: {words(missing)}" if missing else said]
    if short:
        more = f" and {len(short) - 20} more" if len(short) > 20 else ""
        lines.append(f"  fewer than asked for, by prompt: {', '.join(short[:20])}{more}")
    if left_out != missing and left_out:
        lines.append(f"  left out while asking: {words(left_out)}")
    if unknown:
        lines.append(f"  {unknown} responses have no finish reason: some may be cut")
    if repeated:
        lines.append(f"  {repeated} responses repeat another one of their prompt")
    return lines
