"""infifpo inspect of soft targets: the numbers that are stored, the tokens of each tokenizer."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.checks import token_table
from megatron_infifpo.checks.inspection import InspectionJob, inspect_record
from megatron_infifpo.checks.token_table import _Text
from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.references.top_k import TEXT, text_identity
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.token_job import TokenJob, word_tokenizer

Row = tuple[str, str, str, str]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = TokenJob(tmp_path_factory.mktemp("tokens"))
    job.fuse("one", only=["a"])
    job.fuse("groups", only=["a"], ambiguous="group")
    job.fuse("mean", fusion="mean", include_initial=True)
    job.fuse("values", fusion="none")
    return job


def table(job, name: str, number: int, *, sources: bool = True) -> tuple[list[Row], str]:
    """The table's rows, cut at its head's columns, and its last line."""
    given: Any = {"data": str(job.data), "id": f"q{number}", "soft_targets": str(job.folder / name)}
    given["sources"] = str(job.sources) if sources else None
    lines = "\n".join(inspect_record(InspectionJob(**given))).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("token "))
    places = [lines[head].index(word) for word in ("token", "source", "its tokens", "target")]
    rows = []
    for line in lines[head + 1 : -1]:
        cells = [line[a:b].strip() for a, b in zip(places, [*places[1:], None], strict=True)]
        rows.append((cells[0], cells[1], cells[2], cells[3]))
    return rows, lines[-1]


def pieces(chat: ChatTokenizer, text: str) -> list[str]:
    """What the tokenizer makes of a text, each token as the text that it is."""
    found = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [repr(text[a:b]) for a, b in found["offset_mapping"]]


@pytest.mark.parametrize("number", range(6))
def test_tokens_of_pivot_and_source(job, number):
    """'201' is one token of the pivot, and three of the source; all others are the same."""
    text = f"so be it 201{' the' * number} so"
    rows, last = table(job, "one", number)
    assert [row[0] for row in rows] == [*pieces(job.chats["pivot"], text), "'<|im_end|>'"]
    theirs = " ".join(row[2] for row in rows[:-1])
    assert theirs == " ".join(pieces(job.chats["a"], text)) and rows[-1][2] == "(special)"
    for token, source, its, said in rows:
        whole = token == "'201'"
        assert (its == "'2' '0' '1'") == whole and source == ("-" if whole else "a")
        assert said.startswith("cross-entropy alone; 1 token as one chunk: log-prob -") == whole
    assert last == f"{len(rows) - 1} of {len(rows)} tokens have a target; chunks beside: 1"


@pytest.mark.parametrize("number", range(6))
def test_numbers_of_one_source(job, number):
    """Probabilities of the source's own top k, by the pivot's names; the chunk's is a sum."""
    rows, _ = table(job, "one", number)
    source = LogprobStore(job.folder / "a")
    top, values = source.top(number, 0), source.logprobs(number, 0)
    own, at = job.chats["a"].token_bytes.pieces, 0
    for token, _, _, said in rows:
        if token == "'201'":
            assert float(said.split()[-1]) == pytest.approx(values[at : at + 3].sum(), abs=6e-4)
            at += 3
            continue
        found = dict(re.findall(r"('.+?'|\".+?\") (\d\.\d{3})", said))
        expected: dict[str, float] = {}
        for i, logp in zip(top.ids[at].tolist(), top.logps[at].tolist(), strict=True):
            name = repr(own[i].decode("utf-8", "backslashreplace")).replace(r"\\", "\\")
            if own[i] and own[i] in set(job.chats["pivot"].token_bytes.pieces):
                expected[name] = np.exp(logp)
        ambiguous = {"'2'", "' t'"}  # of numbers into the tail
        for name, value in expected.items():
            if name not in ambiguous:
                assert float(found[name]) == pytest.approx(value, abs=2e-3)
        left = float(re.findall(r"tail (\d\.\d{3})", said)[0])
        assert sum(map(float, found.values())) + left == pytest.approx(1, abs=3e-3)
        at += 1
    assert at == len(values)


def test_groups_and_what_stands_beside_them(job):
    """A number's first digit is taught as all of the pivot's numbers that begin so."""
    rows, last = table(job, "groups", 1)
    (said,) = [row[3] for row in rows if row[0] == "'201'"]
    assert re.search(r"3 ids such as '2' 0\.\d{3}.*; 1 token as one chunk: log-prob -\d", said)
    assert last.startswith(f"{len(rows)} of {len(rows)} tokens")


def test_sources_are_aligned_as_targets_were_fused(job, monkeypatch):
    """The initial pivot's tokens are the pivot's; with groups rows need only begin together."""
    asked, align = [], token_table.align_response

    def spy(pivot, source, **how):
        asked.append(tuple(how.values()))
        assert list(how) == ["is_pivot", "same_ids", "starts_suffice"]
        return align(pivot, source, **how)

    monkeypatch.setattr(token_table, "align_response", spy)
    table(job, "groups", 1)
    assert asked == [(False, False, True)]
    asked.clear()
    table(job, "mean", 1)
    assert asked == [(False, False, False)] * 2 + [(True, True, False)]


def test_several_sources(job):
    """Record 1 is of all three, record 2 of two; weights are those of the chunks."""
    rows, _ = table(job, "mean", 1)
    assert rows[0][1:3] == ("several", "a 's', b 'so', initial 's'")
    assert rows[1][1:3] == ("several", "a 'o', b \", initial 'o'")
    assert rows[0][3].endswith(", weight 0.333") and "2 tokens as one chunk" in rows[0][3]
    alone = [row for row in rows if row[1] == "initial"]
    assert [row[:3] for row in alone] == [("'201'", "initial", "'201'")]
    assert alone[0][3].count("1 token as one chunk") == 2, "a's and b's"
    rows, _ = table(job, "mean", 2)
    assert rows[0][2] == "a 's', initial 's'", "b knows no text"
    store = SoftTargetStore(job.folder / "mean")
    found = store.take(2, 0, len(rows))
    for t, (_, _, _, said) in enumerate(rows):
        shown = [float(p) for p in re.findall(r"(?:'|\") (\d\.\d{3})", said)]
        expected = found.probs[t][found.ids[t] != -1]
        np.testing.assert_allclose(shown, expected[:4], atol=6e-4)


def test_values(job):
    rows, last = table(job, "values", 1)
    store = SoftTargetStore(job.folder / "values").take(1, 0, len(rows) // 2)
    assert store.values is not None
    for t, name in enumerate(rows):
        value = store.values[t // 2, t % 2]
        assert name[1] == ("a", "b")[t % 2]
        if np.isnan(value).any():
            both = np.isnan(store.values[t // 2]).all()
            assert name[3] == ("cross-entropy alone" if both else "not comparable")
        else:
            assert name[3] == " ".join(f"{x:.3f}" for x in value)
    assert last == f"8 of {len(rows) // 2} tokens have a target; chunks beside: 0"


def test_without_sources(job):
    """Their tokens are not known; all else is."""
    rows, last = table(job, "one", 1)
    bare, same = table(job, "one", 1, sources=False)
    assert [(a, b, d) for a, b, _, d in rows] == [(a, b, d) for a, b, _, d in bare]
    assert not any(row[2] for row in bare) and last == same


def test_where_white_space_differs_at_the_ends():
    """What stands between is the same text; a token that reaches into white space is left out."""
    chat = ChatTokenizer(word_tokenizer([" so", " be", "so"]))
    ids = chat.tokenizer(" so be", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    text = "so be\n"
    lengths = [2, 3, 1]
    texts = np.array([[text_identity(text.encode())]], TEXT)
    store: Any = SimpleNamespace(byte_lengths=lambda *_: np.array(lengths, np.uint16), texts=texts)
    how = {"is_pivot": False, "same_ids": False, "starts_suffice": False}
    assert _Text(np.array(ids), chat).tokens_of(store, 0, 0, **how) == {1: "' be'"}
    store.texts = np.array([[text_identity(b"other")]], TEXT)
    assert _Text(np.array(ids), chat).tokens_of(store, 0, 0, **how) == {}


def test_a_record_without_targets(job):
    """Record 3 is masked for b, and record 2 of another domain."""
    job.fuse("none-there", only=["b"])
    for number in (2, 3):
        given: Any = {"data": str(job.data), "id": f"q{number}"}
        given["soft_targets"] = str(job.folder / "none-there")
        *_, last = inspect_record(InspectionJob(**given))
        assert last == "\nchosen has no soft targets: cross-entropy alone"


def test_the_command_and_what_it_refuses(job, capsys):
    words = ["--data", str(job.data), "--id", "q1", "--soft-targets", str(job.folder / "one")]
    run_command("inspect", [*words, "--method", "fusellm"])
    assert "soft targets of chosen, mince of a, top 4" in capsys.readouterr().out
    method = resolve("fusellm", lm_weight=0.5)
    with pytest.raises(UserError, match="option of the method has no effect with --soft-targets"):
        InspectionJob("data", "q1", soft_targets="one", method=method)
    run_command("inspect", [*words[:4], "--method", "fusellm", "--sources", str(job.sources)])
    assert "no reference: SFT, which learns from --soft-targets too" in capsys.readouterr().out
