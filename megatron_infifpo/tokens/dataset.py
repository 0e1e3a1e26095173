"""The pivot's token dataset: prompt and response ids of every record, memory-mapped.

    PREFIX.bin, PREFIX.idx           int32, one document a record: prompt, chosen, rejected[, ...],
                                     or of a list prompt and responses, R at most;
                                     a response token that is not scored is there as its complement
    PREFIX_scored.npy                int32 [N, R], scored tokens of each response; 0: no such one
    PREFIX_scores.npy                float64 [N, R], a judge's, NaN where there is none; or no file
    PREFIX_ids.bin, PREFIX_ids.idx   uint8, one document a record: its id in UTF-8
    PREFIX_domains.npy               uint16, one code a record into the manifest's "domains"
    PREFIX.json                      the manifest, written last

Nothing is truncated or left out, so record i here is record i of every log-prob dataset. A masked
record, which the chat template refuses, has no tokens; the manifest's notes say why.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import RESPONSES
from megatron_infifpo.storage.documents import Documents, read_array
from megatron_infifpo.storage.manifests import Format
from megatron_infifpo.storage.notes import find_notes, noted
from megatron_infifpo.tokens.tokenization import TokenizedRecord

OLDER = "older ones may hold replies behind a prefix that the chat template never renders"
MADE_BY = "infifpo prepare"
TOKENIZER_SCHEMA: dict[str, Any] = dict.fromkeys(
    (
        "path",
        "tokenizer_sha256",
        "chat_template_sha256",
        "chat_template",
        "score",
        "score_reasoning",
    ),
    (str, type(None)),
) | {"chat_template_options": (dict, type(None))}
FORMAT = Format(
    name="megatron_infifpo token dataset",
    version=3,
    made_by=MADE_BY,
    older=OLDER,
    schema={
        "count": int,
        "responses": [str],
        "domains": [str],
        "records_sha256": str,
        "tokens_sha256": str,
        "tokenizer": TOKENIZER_SCHEMA,
        "source_files": [str],
        "notes": dict,
        "note_counts": dict,
        "remarks": dict,
        "remark_counts": dict,
    },
)
_AGAIN = f"write the dataset again with {MADE_BY}"


def scores_fingerprint(scores: np.ndarray) -> str:
    """Return the sha256 (hex) of scores `[N, R]`."""
    return hashlib.sha256(scores.tobytes()).hexdigest()


class TokenDataset:
    """Reads a token dataset; opening does not loop over the records.

    Attributes:
        manifest: the content of `PREFIX.json`.
        responses: names of the R responses.
        listed: the records are lists of up to R responses; else pairs.
        scores: float64 `[N, R]`, a judge's, NaN where there is none; None without any.
        domains: names of the domains, by code.
        records_sha256: fingerprint of the records, see `records.records_fingerprint`.
        prompt_lengths: int32 `[N]`.
        response_lengths: int32 `[N, R]`, end of turn included; 0 where a list is shorter.
        scored_lengths: int32 `[N, R]`, how many of them are scored; 0 where masked.
        masked_records: bool `[N]`, records that have no tokens.
        domain_codes: uint16 `[N]`.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open a dataset.

        Raises:
            UserError: a file is missing, incomplete or of another format.
        """
        self.prefix = prefix = str(prefix)
        self.manifest = FORMAT.read(prefix)
        self.responses = tuple(self.manifest["responses"])
        self.listed = self.responses[0] not in RESPONSES
        self.domains = tuple(self.manifest["domains"])
        self.records_sha256: str = self.manifest["records_sha256"]
        self._tokens = Documents(prefix, np.int32, 1 + len(self.responses), fewer=self.listed)
        self._ids = Documents(f"{prefix}_ids", np.uint8, 1)
        self.prompt_lengths = np.ascontiguousarray(self._tokens.lengths[:, 0])
        self.response_lengths = np.ascontiguousarray(self._tokens.lengths[:, 1:])
        self.domain_codes = self._read_domain_codes()
        counts = {
            f"{prefix}.idx": len(self._tokens),
            f"{prefix}_ids.idx": len(self._ids),
            f"{prefix}_domains.npy": len(self.domain_codes),
        }
        for path, count in counts.items():
            if count != self.manifest["count"]:
                raise UserError(
                    f"{path} holds {count} records, expected {self.manifest['count']} by "
                    f"{prefix}.json; {_AGAIN}"
                )
        self.scored_lengths = self._read_scored_lengths()
        self.masked_records: np.ndarray = ~self.scored_lengths.any(axis=1)
        self._check_masked()
        self.scores = self._read_scores()

    def _read_domain_codes(self) -> np.ndarray:
        path = f"{self.prefix}_domains.npy"
        codes = read_array(path, _AGAIN)
        if codes.dtype != np.uint16 or codes.ndim != 1 or (codes >= len(self.domains)).any():
            raise UserError(f"{path} does not hold codes of {len(self.domains)} domains; {_AGAIN}")
        return codes

    def _read_scored_lengths(self) -> np.ndarray:
        path, lengths = f"{self.prefix}_scored.npy", self.response_lengths
        scored = read_array(path, _AGAIN)
        if scored.dtype != np.int32 or scored.shape != lengths.shape:
            raise UserError(
                f"{path} holds {scored.dtype} {list(scored.shape)}, expected int32 "
                f"{list(lengths.shape)}; {_AGAIN}"
            )
        if ((scored < 0) | (scored > lengths)).any():
            raise UserError(f"{path} and {self.prefix}.idx disagree about responses; {_AGAIN}")
        return scored

    def _read_scores(self) -> np.ndarray | None:
        expected = self.manifest.get("scores_sha256")
        if expected is None:
            return None
        path = f"{self.prefix}_scores.npy"
        scores = read_array(path, _AGAIN)
        if scores.dtype != np.float64 or scores.shape != self.response_lengths.shape:
            raise UserError(
                f"{path} holds {scores.dtype} {list(scores.shape)}, expected float64 "
                f"{list(self.response_lengths.shape)}; {_AGAIN}"
            )
        if scores_fingerprint(scores) != expected:
            raise UserError(f"{path} has other scores than {self.prefix}.json says; {_AGAIN}")
        return scores

    def _check_masked(self) -> None:
        """Check that a record has tokens, scored ones in each response, or a note and none."""
        masked = self.masked_records
        nothing = masked & (self._tokens.lengths == 0).all(axis=1)
        scored = self.scored_lengths > 0
        whole = (scored == (self.response_lengths > 0)).all(axis=1) & (self.prompt_lengths > 0)
        # What a list lacks is at its end; of a pair all are there.
        least = 2 if self.listed else len(self.responses)
        whole &= scored[:, :least].all(axis=1) & (scored[:, :-1] >= scored[:, 1:]).all(axis=1)
        wrong = ~(nothing | whole)
        if wrong.any():
            raise UserError(
                f"{self.prefix}: record {self.ids(int(wrong.argmax()))!r} has a prompt or a "
                f"response without a scored token, expected all of them or no token; {_AGAIN}"
            )
        if not np.array_equal(
            noted(self.manifest["notes"], len(self), f"{self.prefix}.json"), masked
        ):
            raise UserError(
                f"{self.prefix}.json has notes about other records than the ones without tokens; "
                f"{_AGAIN}"
            )

    def __len__(self) -> int:
        """Return the number of records, masked ones included."""
        return len(self._tokens)

    def largest_id(self) -> int:
        """Return the largest token id; without the manifest's, one pass over the mapped file."""
        known = self.manifest.get("largest_id")
        return self._tokens.largest() if known is None else int(known)

    def ids(self, index: int) -> str:
        """Return the id of a record."""
        return self._ids.document(index).tobytes().decode()

    def find(self, record_id: str) -> int | None:
        """Return the index of the record with this id, or None."""
        return self._ids.find(np.frombuffer(record_id.encode(), dtype=np.uint8))

    def domain(self, index: int) -> str:
        """Return the domain of a record."""
        return self.domains[int(self.domain_codes[index])]

    def note(self, index: int) -> str | None:
        """Return why a record is masked; None if it is not."""
        return next(iter(find_notes(self.manifest["notes"], index)), None)

    def remarks(self, index: int) -> list[str]:
        """Return what the template does to a record that one would not think."""
        return find_notes(self.manifest["remarks"], index)

    def record(self, index: int) -> TokenizedRecord:
        """Return a record's tokens, and which of them are scored; none of a masked record.

        A list's responses are as many as it has; of a masked record there are R without tokens.

        Raises:
            UserError: other tokens are scored than `PREFIX_scored.npy` says.
        """
        prompt, *responses = self._tokens.sequences(index)
        if not self.masked_records[index]:
            responses = [ids for ids in responses if len(ids)]
        masks = tuple(ids >= 0 for ids in responses)
        counts = [int(mask.sum()) for mask in masks]
        expected = self.scored_lengths[index][: len(counts)].tolist()
        if counts != expected or (prompt < 0).any():
            raise UserError(
                f"record {self.ids(index)!r} has {counts} scored tokens in {self.prefix}.bin, "
                f"expected {expected} by {self.prefix}_scored.npy: the "
                f"files were changed or damaged; {_AGAIN}"
            )
        if all(mask.all() for mask in masks):
            return TokenizedRecord(prompt, tuple(responses))
        # What is not scored is stored as its complement.
        ids = (np.where(mask, ids, ~ids) for ids, mask in zip(responses, masks, strict=True))
        return TokenizedRecord(prompt, tuple(ids), masks)

    def sequences(self, index: int) -> list[np.ndarray]:
        """Return prompt ids and the ids of each response that is there, int32."""
        tokens = self.record(index)
        return [tokens.prompt_ids, *tokens.response_ids]

    def prompt_ids(self, index: int) -> np.ndarray:
        """Return the prompt's ids, int32 `[P]`."""
        return self.record(index).prompt_ids

    def response_ids(self, index: int) -> list[np.ndarray]:
        """Return the ids of each response, R arrays of int32."""
        return list(self.record(index).response_ids)
