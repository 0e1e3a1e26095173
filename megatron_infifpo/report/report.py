"""One HTML page about a training run, or about rounds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_positive, check_types, flag
from megatron_infifpo.report.collect import method_of, read_curves, read_pairs
from megatron_infifpo.report.html import Page
from megatron_infifpo.storage.aside import make_folder, write_text
from megatron_infifpo.training.provenance import read_run

ROUNDS = "rounds.jsonl"


@dataclass(frozen=True)
class ReportJob:
    """What a report is about.

    Attributes:
        run: --save folder of the run, or --output folder of rounds.
        output: file to write; None is report.html in that folder.
        tensorboard_dir: None is the folder `tensorboard` in it.
        trained: prefix of the trained pivot's log-probs, if it was scored.
        tokenizer: its folder, if it is no longer where it was.
        shown: pairs of each kind with their texts.
        trust_remote_code: run code that comes with the tokenizer.
    """

    run: Path
    output: Path | None = None
    tensorboard_dir: Path | None = None
    trained: str | None = None
    tokenizer: str | None = None
    shown: int = 8
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: a field of another type, or a number that is none.
        """
        check_types(self)
        check_positive(self, "shown")


def write_report(job: ReportJob) -> Path:
    """Write the page; return its file.

    Raises:
        UserError: there is no such run, something that the page is made of is missing, or
            matplotlib is.
    """
    found = read_run(job.run)
    if found is None and not (job.run / ROUNDS).is_file():
        raise UserError(
            f"{job.run} has no run.json: expected the --save folder of a training run, or the "
            "--output folder of infifpo rounds"
        )
    try:
        from megatron_infifpo.report import rounds
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        raise UserError("matplotlib is missing: pip install megatron-infifpo[report]") from None
    if found is None:
        for given in ("tensorboard_dir", "trained", "tokenizer"):
            if getattr(job, given) is not None:
                raise UserError(
                    f"{flag(given)} has no effect: {job.run} is of rounds, not of a run"
                )
        page = rounds.rounds_page(job.run, rounds.read_rounds(job.run / ROUNDS))
    else:
        page = _run_page(job, found)
    output = job.output or job.run / "report.html"
    make_folder(output.parent)
    write_text(output, page.render())
    return output


def _run_page(job: ReportJob, found: dict[str, Any]) -> Page:
    """The page about a run that run.json describes."""
    from megatron_infifpo.report import judge, sections, tokens

    curves = read_curves(job.tensorboard_dir or job.run / "tensorboard")
    page = Page(f"Training run {job.run}")
    sections.summary(page, found, curves)
    sections.training(page, curves)
    files = found["attempts"][-1]["files"]
    if files["preference_sources"] is not None:
        pairs = read_pairs(
            files["preference_data"],
            files["preference_sources"],
            method_of(found),
            found["identity"]["seq_length"],
            job.trained,
        )
        sections.models(page, pairs)
        judge.judge(page, pairs)
        sections.texts(
            page,
            pairs,
            tokenizer=job.tokenizer,
            shown=job.shown,
            trust_remote_code=job.trust_remote_code,
        )
    elif job.trained is not None:
        raise UserError("--trained has no effect: the run was made without preference sources")
    if files.get("soft_targets") is not None:  # older runs have no such key
        tokens.soft_targets(page, files["soft_targets"])
    sections.speed(page, curves)
    sections.provenance(page, found)
    return page
