"""What `infifpo fuse-targets` accepts and refuses, and what it makes of real text."""

import json
import shutil
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.commands.main import main
from megatron_infifpo.errors import UserError
from megatron_infifpo.fusing.coverage import ALL
from megatron_infifpo.fusing.fuse import FUSIONS
from megatron_infifpo.fusing.job import FusingJob, fuse_targets
from megatron_infifpo.records.records import read_records
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support.fusing import RECORDS, K, Said, dense, sparse, write_top_k


def test_complete_output_is_left(models, capsys):
    store = models.fuse("again", "bytes")
    before = (models.folder / "again.json").stat().st_mtime_ns
    capsys.readouterr()
    models.fuse("again", "bytes")
    assert capsys.readouterr().out == f"{store.prefix} is complete already\n"
    assert (models.folder / "again.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("names", "options", "difference"),
    [
        (("bytes", "other"), {}, "its models is|its other is None|sources"),
        (("bytes",), {"fusion": "mean"}, "its fusion is 'mince', this one's is 'mean'"),
        (("bytes",), {"top_k": 2}, "its top_k is 4, this one's is 2"),
        (("bytes",), {"ambiguous": "tail"}, "its ambiguous is 'digits'"),
        (("bytes",), {"ce_per": "token"}, "its ce_per is 'byte'"),
    ],
)
def test_output_of_another_job(models, names, options, difference):
    models.fuse("taken", "bytes")
    with pytest.raises(
        UserError, match=f"taken.json exists and is of another job: .*({difference})"
    ):
        models.fuse("taken", *names, **options)


def test_log_probs_of_another_model_are_another_job(models):
    """The same names with other numbers; where they lie does not matter."""
    size = len(models.chat["bytes"].token_bytes.pieces)
    for name, seed in (("moved", 5), ("copy", 5), ("other-one", 6)):
        write_top_k(models.folder / f"{name}-logps", RECORDS, models.chat["bytes"],
                    dense(size, seed), vocab_size=size, model="m")  # fmt: skip
    yaml = models.folder / "moving.yaml"
    for name in ("moved", "copy", "other-one"):
        yaml.write_text(f"initial: none\nsources: [{{name: s, logprobs: {name}-logps}}]\n")
        if name == "other-one":
            with pytest.raises(UserError, match="another job: its logprobs_sha256"):
                models.fuse("moving", yaml=yaml)
        else:
            models.fuse("moving", yaml=yaml)


def test_nothing_half_written(models, monkeypatch):
    """An interruption leaves no file."""
    from megatron_infifpo.fusing import job

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "fuse", stop)
    with pytest.raises(KeyboardInterrupt):
        models.fuse("stopped", "bytes")
    assert not list(models.folder.glob("stopped*"))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown source": ({"only": ["qwen"]}, "--only names 'qwen', expected sources of .*: bytes"),
    "initial by name": ({"only": ["initial"]}, r"--include-initial takes the initial pivot"),
    "more than there is": ({"top_k": 9}, r"\(bytes\) has the 4 most .* expected 9 by --top-k"),
    "folder of nobody": ({"source_tokenizer": {"x": "y"}}, "--source-tokenizer names 'x'"),
    "no folder": ({"source_tokenizer": {"bytes": "/nowhere"}}, "--source-tokenizer bytes=DIR says"),
    "no pivot's folder": ({"tokenizer": "/nowhere"}, "no such folder.*; --tokenizer DIR says"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(models, name):
    options, message = REFUSALS[name]
    with pytest.raises(UserError, match=message):
        models.fuse("refused", "bytes", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "none", "ambiguous": "tail"}, "--ambiguous has no effect with --fusion none"),
        (
            {"fusion": "none", "source_tokenizer": {"a": "b"}},
            "--source-tokenizer has no effect with --fusion none",
        ),
        ({"fusion": "x"}, "--fusion is 'x', expected one of mince, average-ce, mean, none"),
        ({"ambiguous": "x"}, "--ambiguous is 'x', expected one of digits"),
        ({"top_k": 0}, "--top-k is 0"),
        ({"ce_per": "word"}, "--ce-per is 'word'"),
    ],
)
def test_values_of_flags(options, message):
    with pytest.raises(UserError, match=message):
        FusingJob("a", "b", "c", **options)


def test_other_tokenizer(models):
    folder = str(models.folder / "other")
    with pytest.raises(UserError, match="has tokenizer_sha256 .*give the one .*bytes=DIR"):
        models.fuse("refused", "bytes", source_tokenizer={"bytes": folder})
    moved = models.folder / "elsewhere"
    shutil.copytree(models.folder / "bytes", moved, dirs_exist_ok=True)
    found = models.fuse("moved-tokenizer", "bytes", source_tokenizer={"bytes": str(moved)})
    assert found.fingerprint == models.fuse("unmoved", "bytes").fingerprint


def test_groups_of_several_sources(models):
    with pytest.raises(UserError, match="groups of several sources overlap"):
        models.fuse("refused", "bytes", "other", fusion="mean", ambiguous="group")
    assert models.fuse("one-group", "bytes", "other", ambiguous="group").groups
    assert models.fuse("mean-group", "bytes", fusion="mean", ambiguous="group").groups


def test_no_source(models):
    with pytest.raises(UserError, match="has 0 sources to fuse, expected 1 to 254"):
        models.fuse("refused")
    yaml = models.sources(
        "bytes", initial="{logprobs: pivot-logps, weight: 1}", bytes=", weight: 0"
    )
    for fusion in FUSIONS:
        with pytest.raises(UserError, match="has 0 sources to fuse"):
            models.fuse("refused", yaml=yaml, fusion=fusion)


@pytest.mark.parametrize("fusion", ["mince", "average-ce", "none"])
def test_a_weight_of_0_is_absent(models, capsys, fusion):
    """In every fusion, though other weights are of a mean alone, which is said."""
    entry = "{logprobs: pivot-logps, weight: 0}"
    yaml = models.sources("other", "bytes", initial=entry, other=", weight: 2", bytes=", weight: 0")
    store = models.fuse(f"absent-{fusion}", yaml=yaml, fusion=fusion, include_initial=True)
    assert store.sources == ("other",) and not store.manifest["include_initial"]
    assert "no effect" not in capsys.readouterr().out
    entry = "{logprobs: pivot-logps, weight: 1}"
    two = models.sources("other", "bytes", initial=entry, other=", weight: 2", bytes=", weight: 1")
    models.fuse(f"idle-{fusion}", yaml=two, fusion=fusion)
    said = f"the weights in {two} (other 2, bytes 1) have no effect: --fusion is {fusion}\n"
    assert said in capsys.readouterr().out


def test_weights_of_a_mean(models):
    """A weight of 0 is the source's absence; others are shares."""
    entry = "{logprobs: pivot-logps, weight: 1}"
    three = models.sources(
        "other", "bytes", initial=entry, other=", weight: 3", bytes=", weight: 0"
    )
    two = models.sources("other", initial=entry, other=", weight: 3")
    found = [models.fuse(f"weights-{i}", yaml=yaml, fusion="mean", include_initial=True)
             for i, yaml in enumerate((three, two))]  # fmt: skip
    assert found[0].fingerprint == found[1].fingerprint
    targets = models.take(found[0], 0)
    assert set(targets.chunk_weights.tolist()) <= {0.75}


def test_log_probs_without_top_k(models, tmp_path):
    from support.datasets import write_scores

    write_scores(models.folder / "plain-logps", RECORDS, models.tokens.scored_lengths,
                 records_sha256=models.tokens.records_sha256)  # fmt: skip
    with pytest.raises(UserError, match=r"\(plain\) has no distributions .* --top-k K"):
        models.fuse("refused", "plain")


def test_other_records(models, tmp_path):
    chat = models.chat["bytes"]
    size = len(chat.tokenizer)
    write_top_k(models.folder / "short-logps", RECORDS[:5], chat, dense(size, 0), vocab_size=size)
    with pytest.raises(UserError, match="the count is 5 records, expected 8"):
        models.fuse("refused", "short")


def test_command_line(models, capsys):
    yaml = models.sources("bytes", "other")
    words = ["--data", models.data, "--sources", yaml, "--output", models.folder / "line"]
    with pytest.raises(SystemExit) as end:
        main(["fuse-targets", *map(str, words), "--only", "other", "--top-k", "3",
              "--source-tokenizer", f"other={models.folder / 'other'}"])  # fmt: skip
    assert not end.value.code
    store = SoftTargetStore(models.folder / "line")
    assert store.sources == ("other",) and store.top_k == 3 and store.fusion == "mince"
    with pytest.raises(SystemExit) as end:
        main(["fuse-targets", *map(str, words), "--source-tokenizer", "other"])
    assert end.value.code == 2 and "expected NAME=DIR" in capsys.readouterr().err


def test_cut_and_other_texts(models, tmp_path):
    """A source that has read another text takes no part, and its note says why."""
    chat, size = models.chat["bytes"], len(models.chat["bytes"].tokenizer)

    class Cut:
        """Scores all but the last 4 tokens of a response of record 2."""

        def __getattr__(self, name):
            return getattr(chat, name)

        def encode(self, record):
            tokens = chat.encode(record)
            if record.id == "r-2":
                short = tuple(ids[:-4] for ids in tokens.response_ids)
                return type(tokens)(tokens.prompt_ids, short, tokens.scored)
            return tokens

    reader: Any = Cut()
    write_top_k(models.folder / "cut-logps", RECORDS, reader, dense(size, 0), vocab_size=size)
    path = models.folder / "cut-logps.json"
    store = models.fuse("cut-unsaid", "cut")
    text = "its text is not the pivot's, byte for byte"
    assert store.manifest["masked"] == {"cut": {text: 1}}
    assert not models.take(store, 2).sources.any()
    manifest = json.loads(path.read_text()) | {"notes": {"cut to fit": "2"}}
    path.write_text(json.dumps(manifest | {"note_counts": {"cut to fit": 1}}))
    assert models.fuse("cut-said", "cut").manifest["masked"] == {"cut": {"cut to fit": 1}}


@pytest.mark.parametrize(("name", "least"), [("qwen2.5", 0.987), ("mistral-small", 0.939)])
def test_real_replies(shared_data, tmp_path, capsys, name, least):
    """300 real conversations, prepared for Phi-4 and read by another model's template."""
    folder = shared_data / "tokenizers"
    records = read_records([str(shared_data / "dpo_en_demo.json")])
    phi, other = (ChatTokenizer.from_pretrained(folder / n) for n in ("phi-4", name))
    write_token_dataset(records, phi, tmp_path / "data")
    size = len(other.token_bytes.pieces) + 400
    write_top_k(tmp_path / "source", records, other, sparse(size, 0, k=8), k=8, vocab_size=size)
    (tmp_path / "s.yaml").write_text("initial: none\nsources: [{name: s, logprobs: source}]\n")
    fuse_targets(FusingJob(str(tmp_path / "data"), str(tmp_path / "s.yaml"), str(tmp_path / "out")))
    store, tokens = SoftTargetStore(tmp_path / "out"), TokenDataset(tmp_path / "data")
    row = store.manifest["coverage"][ALL]["s"]
    with capsys.disabled():
        print(f"\nphi-4 <- {name}: {row['comparable']:.4%} of {row['tokens']} tokens comparable")
    assert row["comparable"] >= least and row["masked"] == 0
    for index in range(len(tokens)):
        targets = store.take(index, 0, int(tokens.scored_lengths[index, 0]))
        np.testing.assert_allclose(targets.probs.sum(1) + targets.tail, 1, atol=1e-6)
        assert targets.sources[-1] == 1  # the end of turn
        assert targets.ids.max() < len(phi.token_bytes.pieces) and K < store.top_k == 8


def test_domains_are_of_the_job(models):
    """Other domains are another job, though the files are the same."""
    models.fuse("by-domain", yaml=models.sources("bytes", bytes=", domains: [code]"))
    with pytest.raises(UserError, match=r"its domains is \['code'\], this one's is \['math'\]"):
        models.fuse("by-domain", yaml=models.sources("bytes", bytes=", domains: [math]"))


def test_names_that_mean_something_else(models):
    yaml = models.folder / "named.yaml"
    for name in ("initial", "several"):
        yaml.write_text(
            f"initial: pivot-logps\nsources: [{{name: {name}, logprobs: bytes-logps}}]\n"
        )
        for include in (True, False):
            with pytest.raises(UserError, match=f"a source of the name '{name}', expected another"):
                models.fuse("refused", yaml=yaml, include_initial=include)


def test_damaged_ids(models):
    """Ids that the model does not have are damage, not the tail."""
    chat, size = models.chat["bytes"], len(models.chat["bytes"].tokenizer)
    prefix = models.folder / "damaged-logps"
    write_top_k(prefix, RECORDS, chat, dense(size, 0), vocab_size=size)
    ids = np.fromfile(f"{prefix}_topk_ids.bin", np.int32)
    ids[1] = size
    ids.tofile(f"{prefix}_topk_ids.bin")
    with pytest.raises(UserError, match=f"record 0 has token ids .* to {size}, expected them"):
        models.fuse("refused", "damaged")


def test_the_pivots_tokenizer_with_another_end_of_turn(models):
    """The manifest says what ends the source's turns; its mass there is the pivot's end's."""
    chat, size = models.chat["pivot"], len(models.chat["pivot"].tokenizer)
    (end,) = chat.end_of_turn_ids
    other = next(i for i, piece in enumerate(chat.token_bytes.pieces) if i != end and not piece)

    def teacher(index, response, ids):
        """Sure of the end that it knows, after some doubt whether it is the pivot's."""
        top = np.tile(np.array([other, end], np.int32), (len(ids), 1))
        logps = np.log(np.tile([0.75, 0.125], (len(ids), 1)))
        return Said(logps[:, 0], top, logps)

    prefix = models.folder / "ends-logps"
    write_top_k(prefix, RECORDS, chat, teacher, vocab_size=size, k=2)
    path = models.folder / "ends-logps.json"
    manifest = json.loads(path.read_text())
    manifest["top_k"]["end_of_turn_ids"] = [other]
    path.write_text(json.dumps(manifest))
    targets = models.take(models.fuse("ends", "ends"), 0)
    assert targets.ids[-1].tolist() == [end, -1]
    np.testing.assert_allclose([targets.probs[-1, 0], targets.tail[-1]], [0.75, 0.25], atol=1e-3)
