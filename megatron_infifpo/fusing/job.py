"""Fuse sources' distributions into soft targets: open, check, align, map, fuse, write."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_infifpo import __version__
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_positive, check_types
from megatron_infifpo.fusing.align import Response
from megatron_infifpo.fusing.chosen import choose_sources, idle_weights
from megatron_infifpo.fusing.coverage import Coverage
from megatron_infifpo.fusing.fuse import FUSIONS, Candidate, fuse
from megatron_infifpo.fusing.source import Found, FusingSource
from megatron_infifpo.fusing.tokenizers import map_sources, reopen
from megatron_infifpo.fusing.vocabulary import AMBIGUOUS
from megatron_infifpo.references.reference import Reference
from megatron_infifpo.references.soft_target_writer import SoftTargetWriter
from megatron_infifpo.references.soft_targets import (
    GROUPED,
    VALUES,
    SoftTargets,
    SoftTargetStore,
)
from megatron_infifpo.references.sources import INITIAL, check_domains, read_sources
from megatron_infifpo.references.top_k import text_identity
from megatron_infifpo.storage.sharded_job import accept_finished
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.token_bytes import TokenBytes
from megatron_infifpo.tokens.tokenization import ChatTokenizer

CE_PER = ("byte", "token")
_IDLE = f"has no effect with --fusion {VALUES}, which uses no ids"
# The same tokenizer and log-probs may lie elsewhere now.
MAY_DIFFER = ("path", "logprobs", "numpy")


@dataclass(frozen=True)
class FusingJob:
    """What is fused, and how; fields named as the flags of `infifpo fuse-targets`.

    Attributes:
        data: prefix of the pivot's token data set.
        sources: sources.yaml.
        output: prefix of the soft-target data set to write.
        fusion: a key of `FUSIONS`.
        include_initial: the initial pivot is a source, too.
        only: names of the sources that take part; None: all.
        ce_per: cross-entropies are compared by "byte", or by "token" of each source.
        ambiguous: what becomes of ids that stand for several of the pivot's, one of `AMBIGUOUS`;
            None: "digits", or with the fusion "none" nothing, since ids are not used.
        top_k: ids of a row; None: as many as every source has.
        tokenizer: where the pivot's tokenizer is now; None: where the data set was made with it.
        source_tokenizer: the same of sources, by name.
        trust_remote_code: run code that comes with the tokenizers.
    """

    data: str
    sources: str
    output: str
    fusion: str = "mince"
    include_initial: bool = False
    only: Sequence[str] | None = None
    ce_per: str = "byte"
    ambiguous: str | None = None
    top_k: int | None = None
    tokenizer: str | None = None
    source_tokenizer: Mapping[str, str] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: a value out of its range, or one without effect.
        """
        check_types(self)
        check_choice("fusion", self.fusion, FUSIONS)
        check_choice("ce_per", self.ce_per, CE_PER)
        check_positive(self, "top_k")
        if self.ambiguous is not None:
            check_choice("ambiguous", self.ambiguous, AMBIGUOUS)
            if self.fusion == VALUES:
                raise UserError(f"--ambiguous {_IDLE}")
        if self.source_tokenizer and self.fusion == VALUES:
            raise UserError(f"--source-tokenizer {_IDLE}")


def fuse_targets(job: FusingJob) -> None:
    """Fuse what sources say of every token into one soft target, and print what they can teach.

    Reads and writes record by record. Output that is complete already is left as it is.

    Args:
        job: what is fused. `SoftTargetStore(job.output)` opens the result.

    Raises:
        UserError: log-probs of other records, without distributions or with too few tokens;
            a tokenizer that is not there; output of another job; or no token has a target.
    """
    tokens = TokenDataset(job.data)
    sources = _open_sources(job, tokens)
    fields = _fields(job, tokens, sources)
    if Path(f"{job.output}.json").exists():
        _check_finished(job, tokens, fields)
        return
    pivot = reopen(
        tokens.manifest["tokenizer"], job.tokenizer, "--tokenizer DIR", job.trust_remote_code
    )
    groups = _map_ids(job, sources, pivot)
    _announce(job, tokens, fields)
    coverage, taught = Coverage(tokens.domains, fields["sources"], job.ce_per), False
    with (
        SoftTargetWriter(
            job.output,
            responses=tokens.responses,
            fusion=job.fusion,
            groups=groups,
            manifest=fields,
        ) as writer,
        tqdm(desc="fuse", total=len(tokens), unit=" records") as bar,
    ):
        for index in range(len(tokens)):
            targets = [
                fuse(
                    _ask(sources, index, response, read, tokens, coverage),
                    len(read.lengths),
                    fusion=job.fusion,
                    top_k=fields["top_k"],
                    sources=len(sources),
                )
                for response, read in enumerate(_responses(tokens, index, pivot.token_bytes))
            ]
            writer.add(targets)
            taught |= any(map(_teaches, targets))
            bar.update()
        silent = coverage.nothing(chunks=job.fusion != VALUES)
        if not taught:
            raise UserError(_nothing(job, fields["sources"], silent))
        writer.fields |= coverage.fields()
    print(f"\n{', '.join(fields['sources'])} -> {job.output}")
    print("\n".join(coverage.lines()))
    for name, why in silent.items():
        print(f"warning: {name} has no comparable token: {why}", file=sys.stderr)


def _map_ids(
    job: FusingJob, sources: Sequence[FusingSource], pivot: ChatTokenizer
) -> list[np.ndarray] | None:
    """Map the sources' ids where they are used, and return the groups that are kept."""
    if job.fusion == VALUES:
        return None
    ambiguous, trust = job.ambiguous or AMBIGUOUS[0], job.trust_remote_code
    groups = map_sources(sources, pivot, ambiguous, job.source_tokenizer, trust_remote_code=trust)
    return groups if ambiguous == GROUPED else None


def _teaches(targets: SoftTargets | None) -> bool:
    """Whether a response has a target, a value or a chunk."""
    if targets is None:
        return False
    values = targets.values is not None and not np.isnan(targets.values).all()
    return bool(values or targets.sources.any() or len(targets.chunks))


def _nothing(job: FusingJob, sources: Sequence[str], silent: Mapping[str, str]) -> str:
    """Say why no token of any record has a target."""
    why = [f"{name}: {silent.get(name, 'none of its ids is one of the pivot')}" for name in sources]
    return (
        f"{job.output} is not written: no token of {job.data} would have a target; "
        f"{'; '.join(why)}; expected log-probs of the same texts, in domains of {job.data}"
    )


def _responses(tokens: TokenDataset, index: int, token_bytes: TokenBytes) -> Iterator[Response]:
    """Yield the pivot's scored tokens of what is trained on: a pair's chosen response, or a list's
    responses; none of a masked record."""
    if tokens.masked_records[index]:
        return
    record = tokens.record(index)
    for number, ids in enumerate(record.response_ids[: None if tokens.listed else 1]):
        scored = ids if record.scored is None else ids[record.scored[number]]
        text = text_identity(token_bytes.join(scored.tolist()))
        yield Response(token_bytes.lengths[scored].astype(np.int64), *text)


def _ask(
    sources: Sequence[FusingSource],
    index: int,
    response: int,
    read: Response,
    tokens: TokenDataset,
    coverage: Coverage,
) -> list[Candidate]:
    """Return what the sources say of a response, and count it."""
    domain, found = int(tokens.domain_codes[index]), list[Found]()
    for source in sources:
        said = source.take(index, response, read)
        if isinstance(said, str):
            coverage.mask(domain, source.number, said)
        else:
            found.append(said)
    coverage.add(domain, len(read.lengths), found)
    return [one.candidate for one in found]


def _open_sources(job: FusingJob, tokens: TokenDataset) -> list[FusingSource]:
    """Open the sources that take part, the initial pivot as the last one."""
    config = read_sources(job.sources)
    check_domains(config, tokens.domains)
    chosen = choose_sources(config, job.only, include_initial=job.include_initial)
    if idle := idle_weights(chosen, job.sources, job.fusion):
        print(idle)
    if job.ambiguous == GROUPED and job.fusion != "mince" and len(chosen) > 1:
        raise UserError(
            f"--ambiguous {GROUPED} with --fusion {job.fusion}: groups of several sources overlap, "
            "expected --fusion mince, or one source (--only NAME)"
        )
    sources: list[FusingSource] = []
    for source in chosen:
        pivot = source.name == INITIAL
        reference = Reference.open(
            source.name, source.logprobs, tokens, domains=source.domains, pivot=pivot
        )
        opened = FusingSource(
            source,
            reference,
            tokens,
            number=len(sources),
            per_byte=job.ce_per == CE_PER[0],
            pivot=pivot,
        )
        opened.check(job.top_k, listed=tokens.listed)
        sources.append(opened)
    return sources


def _fields(
    job: FusingJob, tokens: TokenDataset, sources: Sequence[FusingSource]
) -> dict[str, Any]:
    """Return what the manifest says of the job: all that its result depends on."""
    least = min(source.store.top_k or 0 for source in sources)
    return {
        "fusion": job.fusion,
        "top_k": job.top_k or least,
        "sources": [source.name for source in sources],
        "include_initial": sources[-1].name == INITIAL,
        "ce_per": job.ce_per,
        "ambiguous": None if job.fusion == VALUES else job.ambiguous or AMBIGUOUS[0],
        "records_sha256": tokens.records_sha256,
        "tokens_sha256": tokens.manifest["tokens_sha256"],
        "tokenizer": tokens.manifest["tokenizer"],
        "models": {source.name: source.describe() for source in sources},
        "versions": {"megatron_infifpo": __version__, "numpy": np.__version__},
    }


def _check_finished(job: FusingJob, tokens: TokenDataset, fields: dict[str, Any]) -> None:
    """Accept output that this very job has written, and refuse any other."""
    store = SoftTargetStore(job.output)
    length = int(tokens.scored_lengths[0, 0])
    accept_finished(
        job.output, fields, store.manifest, lambda: store.take(0, 0, length), MAY_DIFFER
    )


def _announce(job: FusingJob, tokens: TokenDataset, fields: dict[str, Any]) -> None:
    """Say what is going to be written, and how large it is."""
    lengths = tokens.scored_lengths if tokens.listed else tokens.scored_lengths[:, :1]
    count, total, k = int((lengths > 0).sum()), int(lengths.sum(dtype=np.int64)), fields["top_k"]
    each = 2 * k * len(fields["sources"]) if job.fusion == VALUES else 6 * k + 3
    what = "values" if job.fusion == VALUES else f"soft targets ({job.fusion})"
    print(
        f"{job.output}: {what} of {count} responses, {total} tokens, from "
        f"{', '.join(fields['sources'])}: {each} bytes a token for {k} ids, at most "
        f"{each * total / 1e9:.2f} GB"
        + ("" if job.fusion == VALUES else ", and 16 bytes a chunk that is not one to one")
    )
