"""What must stay the same from the first step of a run to its last, and how two of it differ."""

from dataclasses import asdict
from typing import Any

from megatron_infifpo import pair_weights
from megatron_infifpo.reference import FUSIONS
from megatron_infifpo.references.reference import logprobs_identity
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.training.experts import BALANCING
from megatron_infifpo.training.resharding import KEPT
from megatron_infifpo.training.resume import schedule_identity
from megatron_infifpo.training.settings import Run

SCHEDULE_KEY = "schedule"  # of an identity; flags say by which one a run goes on


def identity(run: Run, train: PreferenceDataset) -> dict[str, Any]:
    """What must stay the same from the first step of a run to its last, or change knowingly."""
    method, arguments = run.config.method, run.arguments
    found: dict[str, Any] = {
        "method": method.describe(),
        "seed": run.batch.seed,
        "seq_length": run.batch.max_tokens,
        "global_batch_size": run.batch.pairs,
        "dtype": run.precision.dtype,
        "fp8": arguments["fp8"],
        "clip_grad": arguments["clip_grad"],
        "optimizer": {name: arguments[name] for name in KEPT},
        SCHEDULE_KEY: schedule_identity(arguments),
        "data": data_identity(train, scores=method.uses_scores(listed=train.tokens.listed)),
    }
    if run.lora is not None:
        found["lora"] = {**asdict(run.lora), "targets": list(run.lora.targets)}
    if train.references is not None and "source_weights" in FUSIONS[method.fusion].reads:
        names = (*train.source_names, "initial")
        weights = train.references.weights.tolist()
        found["source_weights"] = dict(zip(names, weights, strict=True))
    if train.references is not None and method.pair_weights is not None:
        if "accuracy" in pair_weights.reads(method.pair_weights):
            # As they are given, not by the records' domains: rounds need not have the same ones.
            found["source_accuracies"] = train.references.given_accuracies
    if arguments["num_experts"]:
        names = ("moe_router_dtype", *BALANCING)
        found["experts"] = {name: arguments[name] for name in names}
    if method.several_pairs:  # which pairs share a row is a part of the loss
        found["micro_batch_size"] = run.batch.micro
        found["data_parallel_size"] = arguments["data_parallel_size"]
    return found


def data_identity(dataset: PreferenceDataset, *, scores: bool = False) -> dict[str, Any]:
    """What the records, their tokens, their log-probs and, where they matter, their scores are."""
    manifest = dataset.tokens.manifest
    found: dict[str, Any] = {name: manifest[name] for name in ("records_sha256", "tokens_sha256")}
    found |= {
        name: manifest["tokenizer"][name] for name in ("tokenizer_sha256", "chat_template_sha256")
    }
    if scores:
        found["scores_sha256"] = manifest.get("scores_sha256")
    if dataset.targets is not None:
        models = dataset.targets.manifest["models"].items()
        found["soft_targets"] = {
            "targets_sha256": dataset.targets.fingerprint,
            "sources": {name: model["weights_sha256"] for name, model in models},
        }
    if dataset.references is not None:
        found["initial"] = logprobs_identity(dataset.references.initial.store)
        found["sources"] = {
            source.name: logprobs_identity(source.store)
            | {"takes_part_in": int(source.takes_part.sum())}
            for source in dataset.references.sources
        }
    return found


def changed_identity(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say where a run differs from what it was, one text a value; its data are compared by rounds.

    The schedule is settled elsewhere, and files of older versions lack some of the values.
    """
    known = before.keys() - {SCHEDULE_KEY, "data"}
    return differences({k: before[k] for k in known}, {k: v for k, v in now.items() if k in known})


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """Say where two identities differ, one text a value."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name, old, new = f"{path}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} is {_short(new)}, but was {_short(old)}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "there"
    is_hash = isinstance(value, str) and len(value) == 64
    return value[:12] if is_hash else "missing" if value is None else repr(value)
