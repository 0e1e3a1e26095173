"""The paper's eleven benchmarks as tasks of lm-evaluation-harness, and one table of their scores.

The paper does not publish its prompts and few-shot settings, and used other harnesses: numbers from
here compare with each other, not with the paper's table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        task: of lm-evaluation-harness; None where it has none.
        metrics: accepted keys of its result, the first one there counts.
        shots: examples in the prompt; None: the task's own.
        runs_code: runs what the model writes.
        note: how it differs from what one would expect.
    """

    task: str | None
    metrics: tuple[str, ...] = ()
    shots: int | None = None
    runs_code: bool = False
    note: str = ""


BENCHMARKS = {
    "GSM8K": Benchmark("gsm8k", ("exact_match,flexible-extract", "exact_match"), 5),
    "MATH": Benchmark("minerva_math", ("math_verify,none", "exact_match,none"), 4),
    "TheoremQA": Benchmark(None, note="the harness has no such task"),
    "MBPP": Benchmark("mbpp_instruct", ("pass_at_1,extract_code", "pass_at_1,none"), 3, True),
    "HumanEval": Benchmark(
        "humaneval_instruct", ("pass@1,create_test", "pass_at_1,create_test"), 0, True
    ),
    "BBH": Benchmark("bbh_cot_fewshot", ("exact_match,get-answer",), 3),
    "ARC-C": Benchmark("arc_challenge_chat", ("exact_match,remove_whitespace",), 0),
    "MMLU": Benchmark("mmlu", ("acc,none",), 5, note="by the choices' likelihood"),
    "HellaSwag": Benchmark("hellaswag", ("acc_norm,none",), 10, note="by the choices' likelihood"),
    "DROP": Benchmark("drop", ("f1,none",), 3, note="F1"),
    "IFEval": Benchmark("ifeval", ("prompt_level_strict_acc,none",), 0, note="strict, by prompt"),
}


def score_of(name: str, results: Mapping[str, Any]) -> float:
    """Find a benchmark's score among its task's results, in percent.

    Raises:
        UserError: none of the metrics is there.
    """
    benchmark = BENCHMARKS.get(name)
    metrics = benchmark.metrics if benchmark else ()
    if not metrics:  # a task of the user's: its first metric
        numbers = (k for k, v in results.items() if _is_number(v) and not _is_beside(k))
        metrics = tuple(numbers)[:1]
    for metric in metrics:
        if _is_number(results.get(metric)):
            return 100 * float(results[metric])
    expected = " or ".join(metrics) or "a metric"
    raise UserError(f"{name}: the harness reports {', '.join(results)}, expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_beside(key: str) -> bool:
    """Whether a result is no metric: a count, an error, or of one of several tasks."""
    return "stderr" in key or key.startswith("sample_") or ": " in key


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Format scores by model and benchmark as Markdown, with means over what all models have.

    Args:
        scores: model -> benchmark -> percent.
    """
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    common = [name for name in names if all(name in found for found in scores.values())]
    models = " | ".join(name.replace("|", "\\|") for name in scores)
    lines = [f"| benchmark | {models} |", "|---" * (1 + len(scores)) + "|"]
    for name in names:
        cells = (f"{f[name]:.2f}" if name in f else "" for f in scores.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if common:
        means = (sum(f[name] for name in common) / len(common) for f in scores.values())
        lines.append(f"| mean of {len(common)} | {' | '.join(f'{m:.2f}' for m in means)} |")
    return "\n".join(lines)
