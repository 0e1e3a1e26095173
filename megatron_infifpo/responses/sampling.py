"""A sampling job: shards of prompts, each finished whole, joined when all are there."""

import hashlib
import json
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
from megatron_infifpo.storage.aside import whole_file
from megatron_infifpo.storage.sharded_job import ShardedJob


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
        UserError: shards of another job are there, or their folder cannot be made.
    """
    content = json.dumps([asdict(prompt) for prompt in prompts], default=str)
    plan = {**plan, **asdict(wanted), "prompts": len(prompts), "shard_prompts": shard_prompts}
    plan["prompts_sha256"] = hashlib.sha256(content.encode()).hexdigest()
    job = ShardedJob(output, ".jsonl")
    job.claim(plan)
    shards = [prompts[i : i + shard_prompts] for i in range(0, len(prompts), shard_prompts)]
    missing = job.missing(len(shards))
    if done := len(shards) - len(missing):
        print(f"{done} of {len(shards)} shards are there already")
    todo = [number for number in missing if number % part[1] == part[0]]
    with tqdm(total=sum(len(shards[n]) for n in todo), unit="prompt", desc="sample") as bar:
        for number in todo:
            answers = complete(engine, shards[number], wanted, (plan["seed"], number))
            with job.writing(number) as file:
                for prompt, found in zip(shards[number], answers, strict=True):
                    line = to_line(prompt, found, wanted, plan["model"])
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            bar.update(len(shards[number]))
    if job.missing(len(shards)):
        return False
    _join(job, len(shards), output)
    job.remove()
    return True


def _join(job: ShardedJob, count: int, output: Path) -> None:
    """Write the output; several parts may do so at once, with the same bytes."""
    try:
        with whole_file(output, by_process=True) as aside, aside.open("wb") as whole:
            for shard in job.files(count):
                shutil.copyfileobj(shard, whole)
    except UserError:
        if not output.exists():  # else another part has joined the shards, and removed them
            raise


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
