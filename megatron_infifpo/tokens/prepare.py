"""Prepare a training run's data: preference records in the pivot's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_files, check_types
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import ON_BAD, iter_records
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.options import TokenizerOptions, open_tokenizer
from megatron_infifpo.tokens.writer import write_token_dataset


@dataclass(frozen=True)
class PreparationJob:
    """Preference records to tokenize; fields named as the flags of `infifpo prepare`.

    Attributes:
        input: files of preference records, in order.
        tokenizer: folder of the pivot's tokenizer.
        output: prefix of the token dataset to write; an older one of this name is replaced.
        on_bad_record: "error": stop at the first record that is malformed or that the chat
            template refuses; "skip": leave out malformed ones, and keep the place of refused ones
            without tokens.
        lists: where records rate several responses take all of them, not the best and the worst.
        tokenizer_options: how the tokenizer is used, and what of a reply is scored.
    """

    input: Sequence[str]
    tokenizer: str
    output: str
    on_bad_record: str = "error"
    lists: bool = False
    tokenizer_options: TokenizerOptions = TokenizerOptions()

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: an unknown choice, or no files.
        """
        check_files(self, "input")
        check_choice("on_bad_record", self.on_bad_record, ON_BAD)
        check_types(self)


def prepare(job: PreparationJob) -> TokenDataset:
    """Tokenize preference records with the pivot's tokenizer, into a token dataset.

    Nothing is truncated: pairs that are too long for a training run are left out by that run.
    Says on stderr what was left out.

    Returns:
        The dataset, opened.

    Raises:
        UserError: bad records, or a tokenizer that cannot be used.
    """
    tokenizer = open_tokenizer(job.tokenizer, job.tokenizer_options)
    report = ReadReport()
    records = iter_records(job.input, on_bad=job.on_bad_record, lists=job.lists, report=report)
    try:
        write_token_dataset(
            tqdm(records, desc="tokenize", unit=" records"),
            tokenizer,
            job.output,
            source_files=job.input,
            on_refused="mask" if job.on_bad_record == "skip" else "error",
        )
    except UserError:
        report.show()  # it may be why nothing is left
        raise
    report.show()
    return TokenDataset(job.output)
