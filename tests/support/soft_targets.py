"""Random soft targets of a token data set, as sources might give them."""

from pathlib import Path

import numpy as np

from megatron_infifpo.methods import Method
from megatron_infifpo.references.soft_target_writer import SoftTargetWriter
from megatron_infifpo.references.soft_targets import SoftTargets
from megatron_infifpo.tokens.dataset import TokenDataset

NAMES = ("qwen", "initial")
TOP = 4


def write_soft_targets(
    data: Path,
    prefix: Path,
    method: Method,
    *,
    groups: list[np.ndarray] | None = None,
    names: tuple[str, ...] = NAMES,
) -> Path:
    """Write targets of every record's first response; the last record has none.

    Args:
        data: prefix of the token data set.
        prefix: of the files to write.
        method: that learns from them.
        groups: of ids, which then stand among the targets.
        names: of the sources.
    """
    tokens, rng = TokenDataset(data), np.random.default_rng(7)
    fused = "top_values" not in method.reads
    fields = {
        "top_k": TOP, "sources": list(names), "include_initial": "initial" in names,
        "ce_per": "byte", "ambiguous": "digits" if groups is None else "group",
        "tokenizer": tokens.manifest["tokenizer"],
        "models": {}, "masked": {}, "coverage": {}, "versions": {},
    }  # fmt: skip
    fields |= {name: tokens.manifest[name] for name in ("records_sha256", "tokens_sha256")}
    with SoftTargetWriter(
        prefix,
        responses=tokens.responses,
        fusion="mince" if fused else "none",
        groups=groups,
        manifest=fields,
    ) as writer:
        for index in range(len(tokens)):
            length = int(tokens.scored_lengths[index, 0])
            if index == len(tokens) - 1:
                writer.add([None])
                continue
            observed = tokens.record(index).response_ids[0]
            found = _targets(rng, observed, length, len(groups or ()))
            if not fused:
                found.values = _values(rng, length, len(names))
            writer.add([found])
    return prefix


def _targets(rng: np.random.Generator, ids: np.ndarray, length: int, groups: int) -> SoftTargets:
    """Targets of two thirds of the tokens, and texts of two of the others; vocabularies of 90."""
    sources = rng.choice(3, size=length, p=[0.35, 0.45, 0.2]).astype(np.uint8)
    chosen = np.stack([rng.permutation(90)[:TOP] for _ in range(length)]).astype(np.int32)
    chosen[:, 0] = np.where(np.isin(ids, chosen) | (rng.random(length) < 0.5), chosen[:, 0], ids)
    if groups:
        chosen[:, 1] = -2 - rng.integers(0, groups, length)
    probs = rng.dirichlet([0.5] * (TOP + 1), length).astype(np.float32)
    chosen[::3, -1], probs[::3, 0], probs[::3, -2] = -1, probs[::3, 0] + probs[::3, -2], 0
    nothing = sources == 0
    chosen[nothing], probs[nothing] = -1, [0] * TOP + [1]
    starts = np.flatnonzero(nothing[:-1] & nothing[1:])
    starts = starts[np.diff(starts, prepend=-2) > 1]
    chunks = np.stack([starts, starts + 2], axis=1).astype(np.int32)
    logps = -rng.uniform(0.5, 9, len(chunks)).astype(np.float32)
    weights = np.ones(len(chunks), np.float32)
    return SoftTargets(chosen, probs[:, :-1], probs[:, -1], sources, chunks, logps, weights)


def _values(rng: np.random.Generator, length: int, sources: int) -> np.ndarray:
    values = np.log(rng.dirichlet([0.5] * 9, (length, sources)).astype(np.float32) + 1e-4)
    values = -np.sort(-values, axis=-1)[..., :TOP]
    values[rng.random((length, sources)) < 0.3] = np.nan
    return values
