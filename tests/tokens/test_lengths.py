"""Lengths by domain: what prepare, check and a run's start say of them."""

import re

import numpy as np
import pytest

from megatron_infifpo.checks.data import check_tokens
from megatron_infifpo.commands.prepare import print_summary
from megatron_infifpo.records.records import PreferenceRecord, reply
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.lengths import by_domain, domain_lengths
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support.datasets import byte_tokenizer

AROUND = 20 + 1
"""Bytes and special tokens of "?" in the template, and the end of a reply."""


def of_length(number: int, domain: str, length: int) -> PreferenceRecord:
    """A record whose longest response has so many tokens with its prompt, the other one fewer."""
    texts = "x" * (length - AROUND), "y" * (length // 2 - AROUND)
    responses = tuple(map(reply, texts if number % 2 else texts[::-1]))
    return PreferenceRecord(f"r-{number}", domain, ({"role": "user", "content": "?"},), responses)


def stored(folder, lengths: dict[str, list[int]]):
    """Records of these lengths, by domain, the domains in turns; and their token data set."""
    last = max(map(len, lengths.values()))
    order = [(d, its[i]) for i in range(last) for d, its in lengths.items() if i < len(its)]
    records = [of_length(i, *given) for i, given in enumerate(order)]
    byte_tokenizer().save_pretrained(folder / "tok")
    write_token_dataset(records, ChatTokenizer.from_pretrained(folder / "tok"), folder / "tokens")
    return records, TokenDataset(folder / "tokens")


@pytest.fixture
def data(tmp_path):
    lengths = {"code": [*range(100, 120)], "math": [*range(300, 340)], "law": [1300]}
    return stored(tmp_path, lengths)


def test_median_and_more_by_domain(data):
    """The smallest lengths that half, or 95 %, of the records do not exceed."""
    assert domain_lengths(data[1]) == [
        ("math", 40, 320, 338, 339), ("code", 20, 110, 119, 119), ("law", 1, 1300, 1300, 1300)
    ]  # fmt: skip


def test_masked_records_have_no_length(data):
    _, tokens = data
    last = int(np.flatnonzero(tokens.prompt_lengths + tokens.response_lengths.max(1) == 339)[0])
    for array in (tokens.prompt_lengths, tokens.response_lengths):
        array[last] = 0
    tokens.masked_records[[last, int((tokens.domain_codes == 2).argmax())]] = True
    assert domain_lengths(tokens) == [("math", 39, 319, 337, 338), ("code", 20, 110, 119, 119)]


def test_what_is_printed(data, capsys):
    records, tokens = data
    print_summary(tokens)
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "prompt + longest   records  median    95 % longest",
        "math                    40     320     338     339",
        "code                    20     110     119     119",
        "law                      1    1300    1300    1300",
    ]
    assert check_tokens(tokens, records) == (
        "61 records, tokenized again; median, 95 % and longest prompt with response: "
        "math 320, 338, 339; code 110, 119, 119; law 1,300, 1,300, 1,300"
    )


def test_one_domain_needs_no_table(tmp_path, capsys):
    print_summary(stored(tmp_path, {"math": [100, 200]})[1])
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"prompt \+ longest +100 +200 +200 +200 +200", last)


def test_of_how_many_records_something_holds():
    codes = np.array([2, 0, 1, 2, 2, 0, 2])
    lengths = np.array([9, 5, 1, 31204, 7, 4, 8])
    names = ("math", "law", "code", "none")
    assert by_domain(names, codes, lengths > 4) == "code 4 of 4, math 1 of 2"
    said = "code 1 of 4 (longest 31,204)"
    assert by_domain(names, codes, lengths > 9, lengths) == said
    assert by_domain(names, codes, lengths > 31204, lengths) == ""


def test_many_domains_are_a_short_line():
    """Of 14, ten are named, those that lose most; the others are one; but eleven fit, too."""
    names = [f"d{i}" for i in range(15)]
    codes = np.repeat(np.arange(15), 20)
    lengths = 1000 * codes + np.tile(np.arange(20), 15)
    long = lengths % 1000 < codes  # none of the first domain, i of domain i
    named = [f"d{i} {i} of 20 (longest {i},019)" for i in range(14, 4, -1)]
    others = f"4 others {1 + 2 + 3 + 4} of 80 (longest 4,019)"
    assert by_domain(names, codes, long, lengths) == ", ".join([*named, others])
    named.append("d4 4 of 20 (longest 4,019)")
    assert by_domain(names, codes, long & (codes > 3), lengths) == ", ".join(named)
