"""Sources that have little to say: without their tokenizers, with nothing comparable."""

import shutil

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.fusing import RECORDS, dense, write_top_k


def test_values_need_no_tokenizers_of_sources(models, tmp_path):
    """Ids are not used: the sources' tokenizers may be gone, the same one is known by its hash."""
    gone = tmp_path / "gone"
    for name in ("pivot", "bytes"):
        shutil.copytree(models.folder / name, gone / name)
        chat = ChatTokenizer.from_pretrained(gone / name)
        size = len(chat.token_bytes.pieces)
        prefix = models.folder / f"gone-{name}-logps"
        write_top_k(prefix, RECORDS, chat, dense(size, 3), vocab_size=size)
    shutil.rmtree(gone)
    values = models.fuse("gone-values", "gone-pivot", "gone-bytes", fusion="none")
    for index in range(len(RECORDS)):
        here = models.take(values, index).values
        assert here is not None and not np.isnan(here[:, 0]).any()
        assert np.isnan(here[:, 1]).any() and not np.isnan(here[:, 1]).all()
    row = values.manifest["coverage"]["all"]["gone-bytes"]
    assert row["no_twin"] == pytest.approx(0, abs=1e-3) and 0 < row["mass"] < 1
    with pytest.raises(UserError, match="--source-tokenizer gone-bytes=DIR says where"):
        models.fuse("gone-ids", "gone-bytes")
