"""What came of a run: models on held-out records, and where everything is."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.run.checks import PIVOT, name_of
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.schema import Run
from megatron_infifpo.run.stage import Stage
from megatron_infifpo.storage.aside import write_text


def outcome(run: Run, stages: Sequence[Stage]) -> str:
    """Say what came of a run whose stages are done; OUT/heldout.json has the numbers."""
    names, lines = Names(Path(run.output)), list[str]()
    if run.data.heldout:
        rows = heldout(run, names)
        write_text(names.heldout, json.dumps(rows, indent=1) + "\n")
        lines += ["", f"held-out records: {names.heldout}", *_table(rows)]
    for stage in stages:
        if (
            stage.job.arguments[0] in ("export", "merge", "report", "evaluate")
            and stage.made is not None
        ):
            made = stage.made.parent if stage.made.name == "config.json" else stage.made
            lines.append(f"{stage.name}: {made}")
    return "\n".join(lines)


def heldout(run: Run, names: Names) -> list[dict[str, Any]]:
    """Compare models on held-out records: how often they prefer the chosen response.

    It is preferred where its mean log-prob is the higher one.

    Records that one of the models is masked for (a text exceeds its context) are left out for all.

    Returns:
        Of each model name, records, accuracy, accuracy by domain, margin (the mean difference, in
        nats a token), and the means of both responses.
    """
    from megatron_infifpo.references.logprob_store import LogprobStore
    from megatron_infifpo.tokens.dataset import TokenDataset

    logging.getLogger("megatron.core").setLevel(logging.WARNING)  # of every file that it opens
    models = [source.name for source in run.sources if run.evaluation.sources]
    models += [PIVOT, *(name_of(one) for one in run.train), *(each.name for each in run.merge)]
    stores = {name: LogprobStore(names.logprobs("heldout", name)) for name in models}
    domains = {source.name: source.domains for source in run.sources}
    tokens = TokenDataset(names.tokens("heldout"))
    # A source with domains is masked outside of them, which is no reason to leave records out.
    whole = [store.masked_records for name, store in stores.items() if not domains.get(name)]
    kept = np.flatnonzero(~np.any([tokens.masked_records, *whole], axis=0))
    where = np.array([tokens.domains[code] for code in tokens.domain_codes])
    rows = list[dict[str, Any]]()
    for name, store in stores.items():
        own = np.array([i for i in kept if not store.masked_records[i]], dtype=int)
        if not len(own):
            continue
        mean = np.array([store.sums(i)[:2] / store.counts(i)[:2] for i in own])
        gap = mean[:, 0] - mean[:, 1]
        by_domain = {
            str(each): float((gap[where[own] == each] > 0).mean())
            for each in sorted(set(where[own]))
        }
        rows.append(
            {"model": name, "records": len(own), "accuracy": float((gap > 0).mean()),
             "domains": by_domain, "margin": float(gap.mean()),
             "chosen": float(mean[:, 0].mean()), "rejected": float(mean[:, 1].mean())}
        )  # fmt: skip
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    domains = sorted({domain for row in rows for domain in row["domains"]})
    domains = domains if len(domains) > 1 else []
    width = max([8, *(len(row["model"]) for row in rows)]) + 2
    heads = [*domains, "all", "margin", "chosen", "rejected"]
    widths = [max(10, len(head) + 2) for head in heads]
    lines = [f"{'accuracy':<{width}}" + "".join(map(str.rjust, heads, widths))]
    for row in rows:
        shares = [row["domains"].get(domain) for domain in domains] + [row["accuracy"]]
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        cells += [f"{row['margin']:+.3f}", f"{row['chosen']:.3f}", f"{row['rejected']:.3f}"]
        lines.append(f"{row['model']:<{width}}" + "".join(map(str.rjust, cells, widths)))
    return lines
