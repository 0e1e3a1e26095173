"""The pivot's token dataset: prompt and response ids of every record, memory-mapped.

    PREFIX.bin, PREFIX.idx           int32, one document a record: prompt, chosen, rejected[, ...]
    PREFIX_ids.bin, PREFIX_ids.idx   uint8, one document a record: its id in UTF-8
    PREFIX_domains.npy               uint16, one code a record into the manifest's "domains"
    PREFIX.json                      the manifest, written last

Nothing is truncated or left out, so record i here is record i of every log-prob dataset.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo import __version__
from megatron_infifpo.cli import UserError
from megatron_infifpo.data.documents import (
    Documents,
    DocumentWriter,
    publish,
    read_array,
    read_manifest,
    write_manifest,
)
from megatron_infifpo.data.records import RESPONSES, PreferenceRecord, canonical_bytes
from megatron_infifpo.data.tokenization import ChatTokenizer

FORMAT = "megatron_infifpo token dataset"
VERSION = 2
MADE_BY = "tools/prepare_preferences.py"
TOKENIZER_SCHEMA: dict[str, Any] = dict.fromkeys(
    ("path", "tokenizer_sha256", "chat_template_sha256", "chat_template"), (str, type(None))
)
SCHEMA: dict[str, Any] = {
    "count": int,
    "responses": [str],
    "domains": [str],
    "records_sha256": str,
    "tokenizer": TOKENIZER_SCHEMA,
    "source_files": [str],
}
BATCH = 256  # records tokenized at once; fast tokenizers use threads within a batch


def write_token_dataset(
    records: Iterable[PreferenceRecord],
    tokenizer: ChatTokenizer,
    prefix: str | Path,
    *,
    source_files: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Tokenize records and write the dataset.

    Args:
        records: in the order that every log-prob dataset has; consumed once.
        tokenizer: the pivot's.
        prefix: of the files to write; an older dataset of this name is replaced.
        source_files: where the records came from, for the manifest.

    Returns:
        The manifest.

    Raises:
        UserError: no records, some with and some without `pivot_chosen`, or a prompt that the chat
            template refuses.
    """
    prefix = str(prefix)
    tokens, ids = DocumentWriter(prefix, np.int32), DocumentWriter(f"{prefix}_ids", np.uint8)
    domains: dict[str, int] = {}
    codes: list[int] = []
    digest = hashlib.sha256()
    width = 0
    try:
        for batch in itertools.batched(records, BATCH):
            for record, encoded in zip(batch, tokenizer.encode_batch(batch), strict=True):
                width = width or len(encoded.response_ids)
                if len(encoded.response_ids) != width:
                    raise UserError(
                        f"record {record.id!r} has {len(encoded.response_ids)} responses and the "
                        f"first record has {width}, expected 'pivot_chosen' in all records or in "
                        "none"
                    )
                tokens.add([encoded.prompt_ids, *encoded.response_ids])
                ids.add([np.frombuffer(record.id.encode(), dtype=np.uint8)])
                codes.append(domains.setdefault(record.domain, len(domains)))
                digest.update(canonical_bytes(record))
        if not codes:
            raise UserError(f"there are no records to write to {prefix}, expected at least one")
        if len(domains) > 1 << 16:
            raise UserError(f"found {len(domains)} domains, expected at most 65536")
    except BaseException:
        tokens.discard()
        ids.discard()
        raise
    # While files are replaced there is no manifest, so a mix of old and new cannot be opened.
    Path(f"{prefix}.json").unlink(missing_ok=True)
    for documents in (tokens, ids):
        documents.close()
        documents.publish()
    _write_codes(prefix, codes)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "count": len(codes),
        "responses": list(RESPONSES[:width]),
        "domains": list(domains),
        "records_sha256": digest.hexdigest(),
        "tokenizer": tokenizer.describe(),
        "source_files": [str(path) for path in source_files],
        "megatron_infifpo": __version__,
    }
    write_manifest(prefix, manifest)
    return manifest


def _write_codes(prefix: str, codes: list[int]) -> None:
    with open(f"{prefix}_domains.npy.partial", "wb") as stream:
        np.save(stream, np.asarray(codes, dtype=np.uint16))
    publish(f"{prefix}_domains.npy")


class TokenDataset:
    """Reads a token dataset; opening does not loop over the records.

    Attributes:
        manifest: the content of `PREFIX.json`.
        responses: names of the R responses.
        domains: names of the domains, by code.
        records_sha256: fingerprint of the records, see `records.records_fingerprint`.
        prompt_lengths: int32 `[N]`.
        response_lengths: int32 `[N, R]`, end of turn included.
        domain_codes: uint16 `[N]`.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open a dataset.

        Raises:
            UserError: a file is missing, incomplete or of another format.
        """
        self.prefix = prefix = str(prefix)
        self.manifest = read_manifest(
            prefix, format_name=FORMAT, version=VERSION, made_by=MADE_BY, schema=SCHEMA
        )
        self.responses = tuple(self.manifest["responses"])
        self.domains = tuple(self.manifest["domains"])
        self.records_sha256: str = self.manifest["records_sha256"]
        self._tokens = Documents(prefix, np.int32, 1 + len(self.responses))
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
                    f"{prefix}.json; write the dataset again with {MADE_BY}"
                )

    def _read_domain_codes(self) -> np.ndarray:
        path = f"{self.prefix}_domains.npy"
        codes = read_array(path, f"write the dataset again with {MADE_BY}")
        if codes.dtype != np.uint16 or codes.ndim != 1 or (codes >= len(self.domains)).any():
            raise UserError(
                f"{path} does not hold codes of {len(self.domains)} domains; write the dataset "
                f"again with {MADE_BY}"
            )
        return codes

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._tokens)

    def ids(self, index: int) -> str:
        """Return the id of a record."""
        return self._ids.document(index).tobytes().decode()

    def find(self, record_id: str) -> int | None:
        """Return the index of the record with this id, or None."""
        return self._ids.find(np.frombuffer(record_id.encode(), dtype=np.uint8))

    def domain(self, index: int) -> str:
        """Return the domain of a record."""
        return self.domains[int(self.domain_codes[index])]

    def sequences(self, index: int) -> list[np.ndarray]:
        """Return prompt ids and each response's ids, int32."""
        return self._tokens.sequences(index)

    def prompt_ids(self, index: int) -> np.ndarray:
        """Return the prompt's ids, int32 `[P]`."""
        return self.sequences(index)[0]

    def response_ids(self, index: int) -> list[np.ndarray]:
        """Return the ids of each response, R arrays of int32."""
        return self.sequences(index)[1:]
