"""One model's log-prob dataset: a float32 for every scored response token of every record.

    PREFIX_sums.npy, PREFIX_counts.npy   [N, R]: all that training reads
    PREFIX.bin, PREFIX.idx   float32, one document a record: chosen, rejected[, pivot_chosen], or
                             a list's responses, R at most
    PREFIX.json              the manifest, written last: whose log-probs these are, and of what

and, where it was scored with `--top-k`, the files of `top_k`.

A masked record (its text does not fit the model, say) has no tokens; a response of any other has
some, but those that a shorter list lacks. Imported log-probs may lack the values (.bin and .idx).
"""

from functools import cached_property
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import RESPONSES
from megatron_infifpo.references.top_k import TopK, TopKFiles
from megatron_infifpo.storage.documents import Documents, read_array
from megatron_infifpo.storage.manifests import Format
from megatron_infifpo.storage.notes import find_notes
from megatron_infifpo.tokens.dataset import OLDER, TOKENIZER_SCHEMA, TokenDataset

MADE_BY = "infifpo score"
FORMAT = Format(
    name="megatron_infifpo log-prob dataset",
    version=3,
    made_by=MADE_BY,
    older=OLDER,
    schema={
        "count": int,
        "responses": [str],
        "values": bool,
        "model": str,
        "weights_sha256": (str, type(None)),
        "tokenizer": TOKENIZER_SCHEMA,
        "records_sha256": str,
        "backend": str,
        "dtype": (str, type(None)),
        "notes": dict,
        "note_counts": dict,
        "remarks": dict,
        "remark_counts": dict,
    },
)
# Of two descriptions of a tokenizer: where it lies, and whether a template was given by hand.
_MAY_DIFFER = ("path", "chat_template")


class LogprobStore:
    """Reads a log-prob dataset; opening does not loop over the records.

    Attributes:
        manifest: the content of `PREFIX.json`.
        responses: names of the R responses.
        listed: the records are lists of up to R responses; else pairs.
        all_sums: float64 `[N, R]`, sums of the responses' log-probs, 0 where masked; mapped.
        token_counts: int32 `[N, R]`, scored tokens in the model's own, 0 where masked.
        masked_records: bool `[N]`.
        top_k: how many most probable tokens there are of each scored one; None: none.
    """

    def __init__(self, prefix: Any) -> None:
        """Open a dataset.

        Raises:
            UserError: a file is missing, truncated or of another format.
        """
        self.prefix = prefix = str(prefix)
        self.manifest = FORMAT.read(prefix)
        self.responses = tuple(self.manifest["responses"])
        # As a plain array: each look into a `memmap` makes another one, slowly.
        self.all_sums = np.asarray(self._array("_sums.npy", np.float64))
        self.token_counts = np.array(self._array("_counts.npy", np.int32))
        self.masked_records: np.ndarray = ~self.token_counts.any(axis=1)
        self.listed = self.responses[0] not in RESPONSES
        there = self.token_counts > 0
        least = 2 if self.listed else len(self.responses)
        empty = ~there[:, :least].all(axis=1) | (there[:, :-1] < there[:, 1:]).any(axis=1)
        empty &= ~self.masked_records
        if empty.any():
            raise UserError(
                f"{prefix}_counts.npy has no tokens for one response of record "
                f"{int(empty.argmax())}, expected all responses or none; {self._again}"
            )

        self._top: TopKFiles | None = None
        if (fields := self.manifest.get("top_k")) is not None:
            self._top = TopKFiles(prefix, self.token_counts, fields, listed=self.listed)
        self.top_k: int | None = None if self._top is None else self._top.k

    @property
    def _again(self) -> str:
        return f"write it again with {self.manifest.get('made_by', MADE_BY)}"

    def _array(self, suffix: str, dtype: type[np.number]) -> np.ndarray:
        """Map one file of the summary."""
        path, shape = f"{self.prefix}{suffix}", (self.manifest["count"], len(self.responses))
        array = read_array(path, self._again, mapped=True)
        if array.dtype != dtype or array.shape != shape:
            raise UserError(
                f"{path} holds {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} "
                f"{list(shape)} by {self.prefix}.json; {self._again}"
            )
        return array

    def __len__(self) -> int:
        """Return the number of records, masked ones included."""
        return len(self.token_counts)

    def sums(self, index: int) -> np.ndarray:
        """Return the sum of each response's log-probs, float64 `[R]`; 0 where masked."""
        return np.array(self.all_sums[index])

    def counts(self, index: int) -> np.ndarray:
        """Return the number of scored tokens of each response, int32 `[R]`; 0 where masked."""
        return self.token_counts[index]

    def masked(self, index: int) -> bool:
        """Whether the model has no log-probs for this record."""
        return bool(self.masked_records[index])

    def note(self, index: int) -> str | None:
        """Return why a record is masked, or what was done to its text; else None."""
        return next(iter(find_notes(self.manifest["notes"], index)), None)

    def remarks(self, index: int) -> list[str]:
        """Return what the model's template does to a record that one would not think."""
        return find_notes(self.manifest["remarks"], index)

    @property
    def has_values(self) -> bool:
        """Whether there is a log-prob for every scored token, and not their sums only."""
        return self.manifest["values"]

    def logprobs(self, index: int, response: int) -> np.ndarray:
        """Return the log-probs of one response's scored tokens, float32; empty where masked.

        Raises:
            UserError: the dataset holds sums only, or its values are broken.
        """
        return self._documents.sequences(index)[response]

    def top(self, index: int, response: int) -> TopK:
        """Return the most probable tokens at each scored token; `[0, k]` where masked.

        Raises:
            UserError: the dataset has none, or its files are broken.
        """
        return self._top_files.top(index, response)

    def byte_lengths(self, index: int, response: int) -> np.ndarray:
        """Return the bytes of each scored token, uint16 `[L]`: 0 of special ones.

        Raises:
            UserError: the dataset was scored without `--top-k`, or its files are broken.
        """
        return self._top_files.byte_lengths(index, response)

    @property
    def texts(self) -> np.ndarray:
        """Which text each response is, `[N, R]` of `top_k.TEXT`; mapped.

        Raises:
            UserError: the dataset was scored without `--top-k`, or its files are broken.
        """
        return self._top_files.texts

    def open_all(self) -> None:
        """Open every file, and so see that it is there and whole."""
        self.logprobs(0, 0)
        if self._top is not None:
            self._top.open_all()

    @property
    def _top_files(self) -> TopKFiles:
        if self._top is None:
            raise UserError(
                f"{self.prefix} has no most probable tokens beside its log-probs: score its "
                f"records again with {MADE_BY} --top-k 16"
            )
        return self._top

    @cached_property
    def _documents(self) -> Documents:
        if not self.has_values:
            raise UserError(
                f"{self.prefix} holds sums and counts only, expected a log-prob for every token; "
                "it was imported without them"
            )
        width = len(self.responses)
        documents = Documents(self.prefix, np.float32, width, fewer=self.listed)
        if not np.array_equal(documents.lengths, self.token_counts):
            raise UserError(
                f"{self.prefix}.idx and {self.prefix}_counts.npy disagree about the number of "
                f"tokens; {self._again}"
            )
        return documents

    def check_against(self, tokens: TokenDataset, *, same_tokenizer: bool) -> None:
        """Check that these log-probs are of the token dataset's records.

        Args:
            tokens: the pivot's token dataset.
            same_tokenizer: the model is the pivot, so every response has the same tokens there.

        Raises:
            UserError: the fingerprint of the records, the count, the responses, which messages
                are scored or, for the pivot, the tokenizer or the length of a response disagrees;
                says which.
        """
        where = f"{self.prefix} ({self.manifest['model']}) does not fit {tokens.prefix}"
        fix = f"score the records of {tokens.manifest['source_files']} again"
        self._check_same_records(tokens, where, fix)
        rule, expected = (d.manifest["tokenizer"].get("score") for d in (self, tokens))
        if None not in (rule, expected) and rule != expected:  # None: imported without a word
            raise UserError(
                f"{where}: it has log-probs by --score {rule}, the token dataset is of --score "
                f"{expected}: all models must score the same messages of a reply; score the "
                f"records with --score {expected}, or prepare them with --score {rule}"
            )
        # Read apart: pages of the mapped file would stay in memory.
        sums = read_array(f"{self.prefix}_sums.npy", self._again)
        bad = ~(np.isfinite(sums) & (sums <= 0)).all(axis=1)
        if bad.any():
            index = int(bad.argmax())
            values = sums[index][~(np.isfinite(sums[index]) & (sums[index] <= 0))]
            raise UserError(
                f"{self.prefix}: record {tokens.ids(index)!r} has the log-prob {values[0]} "
                f"({int(bad.sum())} such records), expected finite numbers of at most 0: the file "
                f"was changed or damaged; {self._again}"
            )
        if same_tokenizer:
            self._check_same_tokens(tokens, where)

    def _check_same_records(self, tokens: TokenDataset, where: str, fix: str) -> None:
        """Check that these are the same records, with the same responses."""
        if len(self) != len(tokens):
            raise UserError(
                f"{where}: the count is {len(self)} records, expected {len(tokens)}; {fix}"
            )
        if self.listed != tokens.listed:
            found, expected = ("lists" if d.listed else "pairs" for d in (self, tokens))
            raise UserError(
                f"{where}: it is of {found}, expected {expected}: give --lists to all commands "
                f"that read the records, or to none; {fix}"
            )
        if self.manifest["records_sha256"] != tokens.records_sha256:
            raise UserError(
                f"{where}: its fingerprint of the records is "
                f"{self.manifest['records_sha256'][:12]}, expected {tokens.records_sha256[:12]}: "
                f"these are log-probs of other records or of another order; {fix}"
            )
        if self.responses != tokens.responses:
            raise UserError(
                f"{where}: its responses are {list(self.responses)}, expected "
                f"{list(tokens.responses)}; {fix}"
            )
        here, there = self.token_counts > 0, tokens.response_lengths > 0
        other = (here != there).any(axis=1) & ~(self.masked_records | tokens.masked_records)
        if other.any():
            index = int(other.argmax())
            raise UserError(
                f"{where}: record {tokens.ids(index)!r} has {int(here[index].sum())} responses, "
                f"expected {int(there[index].sum())}; {fix}"
            )

    def _check_same_tokens(self, tokens: TokenDataset, where: str) -> None:
        """Check that a response has the same tokens here and there."""
        for name, expected in tokens.manifest["tokenizer"].items():
            # None: imported without a word about the tokenizer; the lengths must speak.
            found = self.manifest["tokenizer"].get(name)
            if name not in _MAY_DIFFER and found is not None and found != expected:
                raise UserError(
                    f"{where}: its {name} is {_short(found)}, expected {_short(expected)}: the "
                    f"initial pivot must have the tokenizer and the chat template of "
                    f"{tokens.prefix}, used in the same way"
                )
        both = ~(self.masked_records | tokens.masked_records)
        wrong = (self.token_counts != tokens.scored_lengths).any(axis=1) & both
        if wrong.any():
            index = int(wrong.argmax())
            raise UserError(
                f"{where}: the lengths of the responses of record {tokens.ids(index)!r} are "
                f"{self.token_counts[index].tolist()} scored tokens, expected "
                f"{tokens.scored_lengths[index].tolist()} ({int(wrong.sum())} such records): the "
                "initial pivot's log-probs must be of the tokens that training sees, whole; score "
                f"the pivot with {MADE_BY}"
            )


def _short(value: Any) -> str:
    """Show a value of a manifest; of a hash its first characters."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
