"""Write the pivot's token dataset; `dataset` says what its files hold."""

import hashlib
import itertools
import math
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_infifpo import __version__
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord, canonical_bytes, response_names
from megatron_infifpo.storage.aside import Aside, make_folder
from megatron_infifpo.storage.documents import DocumentWriter, write_array
from megatron_infifpo.storage.notes import Notes, counted
from megatron_infifpo.tokens.dataset import FORMAT, scores_fingerprint
from megatron_infifpo.tokens.encoding import encode_or_refuse
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord

BATCH = 256  # records tokenized at once; fast tokenizers use threads within a batch


def write_token_dataset(
    records: Iterable[PreferenceRecord],
    tokenizer: ChatTokenizer,
    prefix: str | Path,
    *,
    source_files: Sequence[str | Path] = (),
    on_refused: Literal["error", "mask"] = "error",
) -> dict[str, Any]:
    """Tokenize records and write the dataset.

    Args:
        records: in the order that every log-prob dataset has; consumed once.
        tokenizer: the pivot's.
        prefix: of the files to write; an older dataset of this name is replaced.
        source_files: where the records came from, for the manifest.
        on_refused: what to do with a record that the chat template refuses: stop, or keep its
            place without tokens, so that training leaves it out.

    Returns:
        The manifest.

    Raises:
        UserError: no records, or none with tokens; records of several kinds; or a record that the
            chat template refuses.
    """
    writer = _Writer(str(prefix))
    try:
        for batch in itertools.batched(records, BATCH):
            for record, found in zip(batch, encode_or_refuse(batch, tokenizer), strict=True):
                if isinstance(found, str) and on_refused == "error":
                    raise UserError(
                        f"record {record.id!r} cannot be scored: {found}; --on-bad-record skip "
                        "keeps the place of such records without tokens, so that training leaves "
                        "them out"
                    )
                writer.add(record, found)
        writer.check()
        files = [str(path) for path in source_files]
        return writer.finish({"tokenizer": tokenizer.describe(), "source_files": files})
    except BaseException:
        writer.discard()
        raise


class _Writer:
    """The files of a token dataset in the making."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.files = prefix, Aside()
        make_folder(Path(prefix).parent)
        self.tokens = DocumentWriter(prefix, np.int32, self.files)
        self.ids = DocumentWriter(f"{prefix}_ids", np.uint8, self.files)
        self.domains: dict[str, int] = {}
        # Arrays of C numbers: a million records must not become millions of Python objects.
        self.codes, self.scored, self.widths = array("i"), array("i"), array("i")
        self.scores = array("d")
        self.kind: tuple[bool, int] | None = None  # a list, or so many responses
        self.records_digest, self.tokens_digest = hashlib.sha256(), hashlib.sha256()
        self.notes, self.remarks, self.largest_id = Notes(), Notes(), -1

    def add(self, record: PreferenceRecord, found: TokenizedRecord | str) -> None:
        """Append a record, or its place and why it is masked."""
        width = len(record.responses)
        first, self.kind = self.kind, (record.listed, not record.listed and width)
        if first not in (None, self.kind):
            raise UserError(
                f"record {record.id!r} has the responses {', '.join(record.names)}, expected "
                "records of one kind: lists, or pairs, with 'pivot_chosen' in all or in none"
            )
        if isinstance(found, str):
            self.notes.add(len(self.codes), found)
            parts = [np.empty(0, dtype=np.int32)] * (1 + width)
        else:
            parts = [found.prompt_ids, *_stored(found)]
            for remark in found.notes:
                self.remarks.add(len(self.codes), remark)
        self.tokens.add(parts)
        self.widths.append(width)
        self.scored.extend(int((ids >= 0).sum()) for ids in parts[1:])
        self.scores.extend(record.scores or (math.nan for _ in range(width)))
        self.ids.add([np.frombuffer(record.id.encode(), dtype=np.uint8)])
        self.codes.append(self.domains.setdefault(record.domain, len(self.domains)))
        self.records_digest.update(canonical_bytes(record))
        self.tokens_digest.update(np.array([len(ids) for ids in parts], dtype=np.int32).tobytes())
        joined = np.concatenate(parts)
        self.tokens_digest.update(joined.tobytes())
        if len(joined):  # of an id that is not scored its complement is there
            self.largest_id = max(self.largest_id, int(joined.max()), -1 - int(joined.min()))

    def check(self) -> None:
        """Check that there is something to write."""
        if not self.codes:
            raise UserError(
                f"there are no records to write to {self.prefix}, expected at least one"
            )
        if not any(self.scored):
            reasons = counted(self.notes.counts())
            raise UserError(f"none of the {len(self.codes)} records can be scored: {reasons}")
        if len(self.domains) > 1 << 16:
            raise UserError(f"found {len(self.domains)} domains, expected at most 65536")

    def discard(self) -> None:
        """Delete what was written aside."""
        self.tokens.abandon()
        self.ids.abandon()
        self.files.discard()

    def finish(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Give all files their names, and return the manifest."""
        assert self.kind is not None, "there are no records"
        for documents in (self.tokens, self.ids):
            documents.close()
        widths = np.frombuffer(self.widths, np.int32)
        present = np.arange(widths.max()) < widths[:, None]
        scored, scores = np.zeros(present.shape, np.int32), np.full(present.shape, np.nan)
        scored[present] = np.frombuffer(self.scored, np.int32)
        scores[present] = np.frombuffer(self.scores, np.float64)
        codes = np.frombuffer(self.codes, np.int32).astype(np.uint16)
        write_array(f"{self.prefix}_scored.npy", scored, self.files)
        judged = bool(np.isfinite(scores).any())
        if judged:
            write_array(f"{self.prefix}_scores.npy", scores, self.files)
        write_array(f"{self.prefix}_domains.npy", codes, self.files)
        manifest = {
            **FORMAT.fields,
            "count": len(self.codes),
            "responses": list(response_names(present.shape[1], listed=self.kind[0])),
            "domains": list(self.domains),
            "records_sha256": self.records_digest.hexdigest(),
            "tokens_sha256": self.tokens_digest.hexdigest(),
            "scores_sha256": scores_fingerprint(scores) if judged else None,
            "largest_id": self.largest_id,
            **fields,
            **self.notes.fields("note"),
            **self.remarks.fields("remark"),
            "megatron_infifpo": __version__,
        }
        FORMAT.write(self.prefix, manifest, self.files)
        self.files.publish()
        if not judged:  # there may be scores of an older dataset of this name
            Path(f"{self.prefix}_scores.npy").unlink(missing_ok=True)
        return manifest


def _stored(tokens: TokenizedRecord) -> list[np.ndarray]:
    """Return the responses' ids as they are stored: complements where they are not scored."""
    if tokens.scored is None:
        return list(tokens.response_ids)
    pairs = zip(tokens.response_ids, tokens.scored, strict=True)
    return [np.where(mask, ids, ~ids) for ids, mask in pairs]
