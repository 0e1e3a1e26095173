"""The sections of a report."""

from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import flag
from megatron_infifpo.losses import TOKEN_LOSSES
from megatron_infifpo.records.records import RESPONSES
from megatron_infifpo.report import plots
from megatron_infifpo.report.collect import Curve, Pairs
from megatron_infifpo.report.html import Page
from megatron_infifpo.tokens.tokenization import ChatTokenizer

# Metrics of pairs, of lists and of tokens whose first and last value the summary has.
_SUMMED = (
    "loss", "rewards/accuracy", "rewards/margin", "logps/accuracy", "logps/margin", "reward",
    "residual/std", "length", "no-end-of-turn", "ce", "distance", "chunk", "taught",
)  # fmt: skip
# Figures of training: what they show, and for each panel its title and a prefix of metrics, with
# the metrics; without any all of that prefix.
_OF_PAIRS = (
    (
        "loss, accuracy and margin over steps",
        (
            ("loss", "", "loss"),
            ("accuracy", "", "rewards/accuracy", "logps/accuracy"),
            ("margin", "", "rewards/margin", "logps/margin"),
        ),
    ),
    (
        "rewards and log-probs of responses over steps",
        (("rewards", "rewards/", *RESPONSES), ("log-probs", "logps/", *RESPONSES)),
    ),
)
_OF_LISTS = (
    (
        "loss, residuals and rewards over steps",
        (
            ("loss", "", "loss"),
            ("spread of the residuals", "", "residual/std"),
            ("mean reward", "", "reward"),
        ),
    ),
    (
        "KL, length and responses without an end over steps",
        (
            ("kl", "kl/"),
            ("tokens of a response", "", "length"),
            ("share without an end of turn", "", "no-end-of-turn"),
        ),
    ),
)
_OF_TOKENS = (
    ("loss and cross-entropy over steps", (("loss", "", "loss"), ("cross-entropy", "", "ce"))),
    (
        "distance to the sources, and tokens with a target, over steps",
        (
            ("distance to the sources", "", "distance", "chunk"),
            ("share of tokens with a target", "", "taught"),
        ),
    ),
)


def summary(page: Page, found: dict[str, Any], curves: dict[str, Curve]) -> None:
    """Say in a few lines what was trained and where it ended."""
    method = found["identity"]["method"]
    rows: dict[str, object] = {"objective": method["objective"]}
    if method["objective"] in TOKEN_LOSSES:
        options = TOKEN_LOSSES[method["objective"]].options
        given = {name: method.get(name) for name in options}
        rows |= {
            flag(name): option.default if given[name] is None else given[name]
            for name, option in options.items()
        }
    else:
        rows |= {"reference": method["reference"], "beta": method["beta"]}
    rows["started from"] = found["started_from"]["checkpoint"]
    rows["attempts"] = len(found["attempts"])
    if method["reference"] == "fused":
        rows["fusion"] = f"{method['fusion']}, {'clipped' if method['clip'] else 'not clipped'}"
    for tag in (*_SUMMED, *sorted(tag for tag in curves if tag.startswith("kl/"))):
        if tag in curves:
            steps, values, _ = curves[tag]
            rows[tag] = f"{values[0]:.4f} at step {steps[0]}, {values[-1]:.4f} at step {steps[-1]}"
    page.table(rows)


def training(page: Page, curves: dict[str, Curve]) -> None:
    """Draw what training logged."""

    def named(prefix: str, *names: str) -> dict[str, Curve]:
        tags = names or sorted(t.removeprefix(prefix) for t in curves if t.startswith(prefix))
        return {name: curves[prefix + name] for name in tags if prefix + name in curves}

    def draw(what: str, *panels: tuple[str, dict[str, Curve]]) -> None:
        filled = [panel for panel in panels if panel[1]]
        if filled:
            page.figure(plots.curves(filled), what)

    page.heading("Training")
    lists = "residual/std" in curves
    if lists:
        page.note(
            "Residual: what the loss makes equal for all responses to a prompt; its spread is 0 at "
            "the optimum. kl: the policy's log-prob of a response less the model's, in nats."
        )
    tokens = "distance" in curves
    if tokens:
        page.note(
            "ce, distance and chunk: the loss's parts before they are weighted, means over the "
            "tokens or chunks that have them."
        )
    for what, panels in _OF_LISTS if lists else _OF_TOKENS if tokens else _OF_PAIRS:
        draw(what, *((title, named(prefix, *names)) for title, prefix, *names in panels))

    def by_domain(metric: str) -> dict[str, Curve]:
        found = {t: c for t, c in curves.items() if t.startswith("domain/")}
        return {
            tag.removeprefix("domain/").removesuffix(f"/{metric}"): curve
            for tag, curve in found.items()
            if tag.endswith(f"/{metric}")
        }

    draw(
        "by domain over steps",
        ("loss by domain", by_domain("loss")),
        ("accuracy by domain", by_domain("rewards/accuracy")),
        ("reward by domain", by_domain("reward")),
        ("distance by domain", by_domain("distance")),
    )
    if named("share/"):
        page.heading(
            "Sources over time",
            "Share: of the tokens with a target, how many have one of this source."
            if tokens
            else "Share: a source's weight in the references of a step. Clip rate: share of its "
            "values that clipping replaced by the initial pivot's.",
        )
        clips = named("clip-rate/") or named("", "clip-rate")
        draw("sources over steps", ("share", named("share/")), ("clip rate", clips))


def models(page: Page, pairs: Pairs) -> None:
    """Draw what the models say of the pairs, and who makes the references."""
    codes = pairs.dataset.domain_codes[pairs.indices]
    groups = {pairs.dataset.domains[code]: codes == code for code in np.unique(codes)}
    lengths = pairs.dataset.segment_lengths[pairs.indices]
    borders = np.unique(np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1.0]).astype(int))
    for low, high in zip(borders[:-1], borders[1:], strict=True):
        inside = (lengths >= low) & ((lengths < high) | (high == borders[-1]))
        if inside.any():
            groups[f"{low} to {high} tokens"] = inside
    for weights, when in ((pairs.selected, "at step 0"), (pairs.selected_after, "after training")):
        if weights is not None:
            page.heading(f"Which source is the reference, {when}", "By domain, then by length.")
            page.figure(plots.selection(pairs, weights, groups), f"selected sources {when}")
    page.heading("What the models say of the responses")
    page.figure(plots.distributions(pairs), "distributions of mean log-probs")
    what = "two responses to a prompt" if pairs.lists else "pairs"
    page.heading(
        "Agreement", f"Share of {what} on which two models give the same response the larger mean."
    )
    page.figure(plots.agreements(pairs), "agreement between models")
    if pairs.lists:
        return
    accuracy = [["model", f"prefers the {pairs.roles[0]} response"]]
    for model, name in enumerate(pairs.models):
        margins = pairs.margins(model)
        known = np.isfinite(margins)
        accuracy.append([name, f"{(margins[known] > 0).mean():.3f} of {known.sum()} pairs"])
    page.table(accuracy)


def texts(
    page: Page,
    pairs: Pairs,
    *,
    tokenizer: str | None = None,
    shown: int = 8,
    trust_remote_code: bool = False,
) -> None:
    """Show the hardest pairs, and those that training changed most, with their texts.

    Args:
        page: to write on.
        pairs: of the run.
        tokenizer: its folder, if it is no longer where the manifest says.
        shown: pairs of each kind.
        trust_remote_code: run code that comes with the tokenizer.
    """
    tokens = pairs.dataset.tokens
    try:
        chat = ChatTokenizer.reopen(
            tokens.manifest["tokenizer"], tokenizer, trust_remote_code=trust_remote_code
        )
    except UserError as error:
        page.heading("Pairs")
        page.note(f"Texts are not shown: {error}")
        return

    def show(order: np.ndarray, value: np.ndarray, what: str) -> None:
        for at in order[:shown].tolist():
            index = int(pairs.indices[at])
            title = f"{tokens.ids(index)} ({tokens.domain(index)}): {what} {value[at]:.3f}"
            page.details(title, _texts(pairs, at, chat))

    trained = "trained pivot" in pairs.models
    if pairs.lists:
        page.heading("The hardest lists", "Largest loss at step 0.")
        show(np.argsort(-pairs.losses), pairs.losses, "loss")
        if trained:
            moved = np.abs(pairs.means[..., -1] - pairs.means[..., 0]).max(
                axis=1, where=pairs.valid, initial=0.0
            )
            page.heading("The most changed lists", "Largest change of a response's mean log-prob.")
            show(np.argsort(-moved), moved, "mean log-prob changed by")
        return
    margins = pairs.margins(0)
    page.heading("The hardest pairs", "Lowest margin of the initial pivot, nats a token.")
    show(np.argsort(margins), margins, "margin")
    if trained:
        moved = pairs.margins(len(pairs.models) - 1) - margins
        page.heading("The most changed pairs", "Largest change of the margin, nats a token.")
        show(np.argsort(-np.abs(moved)), moved, "margin changed by")


def _texts(pairs: Pairs, at: int, chat: ChatTokenizer) -> dict[str, str]:
    """Prompt and responses of a record by their names, with the judge's scores of lists."""
    index = int(pairs.indices[at])
    record, columns = pairs.dataset.tokens.record(index), pairs.dataset.columns[index]
    found = {"prompt": chat.tokenizer.decode(record.prompt_ids.tolist())}
    for r in np.flatnonzero(pairs.valid[at]).tolist():
        name = pairs.dataset.tokens.responses[columns[r]]
        if pairs.dataset.tokens.listed and pairs.scores is not None:
            score = pairs.scores[at, r]
            name = f"{name}, {'no score' if np.isnan(score) else f'score {score:g}'}"
        found[name] = chat.tokenizer.decode(record.response_ids[columns[r]].tolist())
    return found


def speed(page: Page, curves: dict[str, Curve]) -> None:
    """Draw seconds a step and the wasted share."""
    steps, _, clock = curves.get("loss") or next(iter(curves.values()))
    panels: list[tuple[str, dict[str, Curve]]] = []
    if len(steps) > 2:
        seconds = np.diff(clock) / np.diff(steps)
        panels.append(("seconds a step", {"seconds": (steps[1:], seconds, clock[1:])}))
    waste = {tag.removeprefix("waste/"): c for tag, c in curves.items() if tag.startswith("waste/")}
    panels += [("wasted share of a step", waste)] if waste else []
    if panels:
        page.heading("Throughput and waste")
        page.figure(plots.curves(panels), "seconds a step and waste over steps")


def provenance(page: Page, found: dict[str, Any]) -> None:
    """List what the run is made of."""
    page.heading("Provenance", "From run.json beside the checkpoints.")
    data = found["identity"]["data"]
    rows = [["what", "weights", "log-probs", "data type", "records"]]
    stores = {"initial pivot": data.get("initial"), **data.get("sources", {})}
    for name, store in stores.items():
        if store is not None:
            weights = (store["weights_sha256"] or "unknown")[:12]
            values = [weights, store["logprobs_sha256"][:12], store["dtype"]]
            rows.append([name, *values, store.get("takes_part_in", "all")])
    known = {"records": data["records_sha256"][:12], "seed": found["identity"]["seed"]}
    if "soft_targets" in data:
        known["soft targets"] = data["soft_targets"]["targets_sha256"][:12]
    page.table(known)
    page.table(rows)
    for attempt in found["attempts"]:
        versions = ", ".join(f"{name} {v}" for name, v in attempt["versions"].items())
        ranks = f"{attempt['layout']['world_size']} ranks on {attempt['device']}"
        page.details(
            f"{attempt['started']}, from step {attempt['iteration']}, {ranks}",
            {
                "command": " ".join(attempt["command"]),
                "versions": f"{versions}; revision {attempt['git_revision']}",
                "layout": str(attempt["layout"]),
            },
        )
