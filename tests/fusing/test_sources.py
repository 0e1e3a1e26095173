"""Sources that have little to say: without their tokenizers, with nothing comparable."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.fusing import source
from megatron_infifpo.fusing.coverage import ALL
from megatron_infifpo.fusing.fuse import FUSIONS
from megatron_infifpo.fusing.job import FusingJob, fuse_targets
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support.fusing import RECORDS, Models, Said, dense, write_top_k


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
    row = values.manifest["coverage"][ALL]["gone-bytes"]
    assert row["no_twin"] == pytest.approx(0, abs=1e-3) and 0 < row["mass"] < 1
    with pytest.raises(UserError, match="--source-tokenizer gone-bytes=DIR says where"):
        models.fuse("gone-ids", "gone-bytes")


@pytest.mark.parametrize("fusion", ["none", "mince"])
def test_the_same_tokenizer_is_known_by_its_hash(models, monkeypatch, fusion):
    """Whether ids are mapped or not: its tokens are then the pivot's, special ones, too."""
    asked, align = set(), source.align_response

    def spy(pivot, own, **how):
        asked.add((own.lengths.tobytes() == pivot.lengths.tobytes(), how["same_ids"]))
        return align(pivot, own, **how)

    monkeypatch.setattr(source, "align_response", spy)
    models.fuse(f"known-{fusion}", "pivot", "bytes", fusion=fusion)
    assert asked == {(True, True), (False, False)}


def write_other_texts(models: Models, name: str, *, read: bool = False) -> None:
    """Log-probs of a model that has read other texts, or is sure of ids that no pivot has."""
    chat, size = models.chat["bytes"], len(models.chat["bytes"].token_bytes.pieces) + 8

    def outside(index: int, response: int, ids: np.ndarray) -> Said:
        logps = np.log(np.full((len(ids), 1), 0.5))
        return Said(logps[:, 0], np.full((len(ids), 1), size - 1), logps)

    teacher, k = (outside, 1) if read else (dense(size, 0), 4)
    prefix = models.folder / f"{name}-logps"
    masked = {0: "too long", 1: "too long"}
    write_top_k(prefix, RECORDS, chat, teacher, vocab_size=size, k=k, masked=masked)
    if not read:
        texts = np.load(f"{prefix}_texts.npy")
        texts["whole"] += 1
        texts["inner"] += 1
        np.save(f"{prefix}_texts.npy", texts)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_nothing_comparable_is_not_published(models, fusion):
    write_other_texts(models, "strange")
    yaml = models.sources("strange", "bytes", bytes=", domains: [code]")
    with pytest.raises(UserError) as error:
        models.fuse("nothing", yaml=yaml, fusion=fusion, only=["strange"])
    assert (
        "no token of " in str(error.value)
        and "strange: 2 responses masked (too long), "
        "6 responses masked (its text is not the pivot's, byte for byte); expected"
        in str(error.value)
    )
    assert not list(models.folder.glob("nothing*"))


def test_a_source_with_nothing_comparable_is_named(models, capsys):
    """The others teach: the targets are theirs."""
    write_other_texts(models, "strange")
    models.fuse("beside", "strange", "bytes")
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning")] == [
        "warning: strange has no comparable token: 2 responses masked (too long), 6 responses "
        "masked (its text is not the pivot's, byte for byte)"
    ]


def test_ids_of_no_pivot_teach_nothing(models):
    """All mass in the tail, and no text that is cut differently: by itself."""
    write_other_texts(models, "outside", read=True)
    store = models.fuse("outside", "outside")
    assert not any(models.take(store, i).sources.any() for i in range(len(RECORDS)))
    assert sum(len(models.take(store, i).chunks) for i in range(len(RECORDS)))
    chat = models.chat["pivot"]
    size = len(chat.token_bytes.pieces) + 8

    def padding(index: int, response: int, ids: np.ndarray) -> Said:
        logps = np.log(np.full((len(ids), 1), 0.5))
        return Said(logps[:, 0], np.full((len(ids), 1), size - 1), logps)

    prefix = models.folder / "padding-logps"
    write_top_k(prefix, RECORDS, chat, padding, vocab_size=size, k=1)
    with pytest.raises(UserError, match="padding: none of its ids is one of the pivot"):
        models.fuse("padding-out", "padding")


def test_a_domain_called_all(models, tmp_path):
    """The total stands apart."""
    records = [replace(r, domain="all" if i % 2 else "math") for i, r in enumerate(RECORDS)]
    chat = models.chat["bytes"]
    size = len(chat.token_bytes.pieces)
    write_token_dataset(records, chat, tmp_path / "data")
    write_top_k(tmp_path / "s", records, chat, dense(size, 0), vocab_size=size)
    (tmp_path / "s.yaml").write_text("initial: none\nsources: [{name: s, logprobs: s}]\n")
    fuse_targets(FusingJob(str(tmp_path / "data"), str(tmp_path / "s.yaml"), str(tmp_path / "out")))
    table = SoftTargetStore(tmp_path / "out").manifest["coverage"]
    assert {name: row["s"]["responses"] for name, row in table.items()} == {
        "math": 4, "all": 4, ALL: 8
    }  # fmt: skip
