"""What a run's soft targets were fused from: how much each source could teach, by domain."""

from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.report.html import Page


def soft_targets(page: Page, prefix: str) -> None:
    """Say what soft targets were fused from.

    Args:
        page: to write on.
        prefix: of the soft targets; where they are gone, the page says so.
    """
    page.heading(
        "What the sources could teach",
        "Comparable: tokens of the pivot that the source has a distribution for, in the same "
        "context. Mass: of a distribution, what the pivot has ids for; the rest is beyond the top "
        "k, or of tokens without a twin. Wins: responses that the source predicts best.",
    )
    try:
        manifest = SoftTargetStore(prefix).manifest
    except UserError as error:
        page.note(f"Not shown: {error}")
        return
    page.table(
        {
            "soft targets": prefix,
            "sources": ", ".join(manifest["sources"]),
            "fusion": manifest["fusion"],
            "ids a token": manifest["top_k"],
            "ambiguous ids": manifest["ambiguous"] or "-",
        }
    )
    table = [
        {"domain": domain or "all", "source": source} | row
        for domain, sources in manifest["coverage"].items()
        for source, row in sources.items()
    ]
    if table:
        heads = [name.replace("_", " ") for name in table[0]]
        page.table([heads, *([_cell(name, row) for name in row] for row in table)])
    masked = [
        [source, reason, count]
        for source, reasons in manifest["masked"].items()
        for reason, count in reasons.items()
    ]
    if masked:
        page.table([["masked source", "because", "responses"], *masked])


def _cell(name: str, row: dict[str, Any]) -> object:
    """A number of the table: shares and wins in percent."""
    value = row[name]
    if name == "wins":
        value = value / row["responses"] if row["responses"] else None
    if value is None:
        return "-"
    share = isinstance(value, float) and not name.startswith("nats")
    return f"{value:.2%}" if share else value
