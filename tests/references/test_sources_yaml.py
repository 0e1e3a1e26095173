import json
import math

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.sources import (
    Source,
    check_accuracy,
    check_domains,
    read_sources,
)

GOOD = """
initial: logprobs/pivot
sources:
  - {name: qwen, logprobs: logprobs/qwen}
  - {name: coder, logprobs: /abs/coder, domains: [code]}
"""


def write(folder, text):
    path = folder / "sources.yaml"
    path.write_text(text)
    return path


def test_prefixes_are_relative_to_the_file(tmp_path):
    config = read_sources(write(tmp_path, GOOD))
    assert config.initial == str(tmp_path / "logprobs/pivot")
    assert config.sources == (
        Source("qwen", str(tmp_path / "logprobs/qwen")),
        Source("coder", "/abs/coder", ("code",)),
    )


def test_flags_keep_their_kinds(tmp_path):
    flags = {"model": "m", "n": 8, "x": True, "many": ["a", 1], "options": {"thinking": False}}
    line = f"initial: p\nsources: [{{name: a, logprobs: b, score: {json.dumps(flags)}}}]"
    assert read_sources(write(tmp_path, line)).sources[0].score == flags


def test_sources_may_be_absent(tmp_path):
    assert read_sources(write(tmp_path, "initial: p")).sources == ()


def test_weights_are_of_all_models_or_of_none(tmp_path):
    assert read_sources(write(tmp_path, GOOD)).weights == (1.0, 1.0, 1.0)
    line = (
        "initial: {logprobs: p, weight: 0.25}\n"
        "sources: [{name: a, logprobs: b, weight: 0}, {name: c, logprobs: d, weight: 2}]"
    )
    config = read_sources(write(tmp_path, line))
    assert config.weights == (0.0, 2.0, 0.25) and config.initial == str(tmp_path / "p")


def test_accuracies(tmp_path):
    line = (
        "initial: p\nsources:\n- {name: a, logprobs: b, accuracy: 1}\n"
        "- {name: c, logprobs: d, domains: [code], accuracy: 0.5}\n"
        "- {name: e, logprobs: f, accuracy: {math: 0, code: 0.7}}\n- {name: g, logprobs: h}"
    )
    sources = read_sources(write(tmp_path, line)).sources
    found = [[source.accuracy_in(d) for d in ("code", "math", "law")] for source in sources]
    nan = math.nan
    expected = [[1.0, 1.0, 1.0], [0.5, nan, nan], [0.7, 0.0, nan], [nan, nan, nan]]
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("domains", "meant"),
    [
        (["code", "math-2"], None),
        (["law", "math-1", "math-2"], None),
        ([], None),
        (["math-3"], "math-3"),  # which it has no accuracy in, while others have no record
        (["math-1", "codes"], "codes"),
    ],
)
def test_an_accuracy_that_no_record_has(domains, meant):
    """It is no error: a round need not have all domains. A misspelt one is."""
    source = Source("a", "b", accuracy={"code": 0.5, "math-1": 0.2, "math-2": 0.9})
    check_accuracy(Source("a", "b", accuracy=0.5), domains, "s.yaml")
    if meant is None:
        check_accuracy(source, domains, "s.yaml")
    else:
        with pytest.raises(UserError, match=f"no record has, and none in {meant!r}; did you mean"):
            check_accuracy(source, domains, "s.yaml")


BAD = {
    "[1": "not valid YAML",
    "initial: p\ninitial: q": "not valid YAML .initial is given twice, in lines 1 and 2",
    "initial: p\nsources: [{name: a, logprobs: b, name: c}]": "name is given twice, in line 2",
    "initial: 2026-99-99": "not valid YAML",
    "": "sources.yaml is None, expected the keys initial, sources",
    "sources: []": "lacks the key 'initial'",
    "initial: 3": "initial is 3, expected the prefix",
    "initial: p\nbeta: 1": "unknown key 'beta', expected initial, sources",
    "initial: p\nsources: {a: b}": "expected a list",
    "initial: p\nsources: [{name: a}]": r"sources\[0\] lacks the key 'logprobs'",
    "initial: p\nsources: [{name: a, logprobs: b, domain: c}]": "unknown key 'domain'",
    "initial: p\nsources: [{name: 3, logprobs: b}]": "name is 3",
    "initial: p\nsources: [{name: a, logprobs: b, domains: code}]": "domains is 'code'",
    "initial: p\nsources: [{name: a, logprobs: b, domains: []}]": r"domains is \[\]",
    "initial: p\nsources: [{name: a, logprobs: b}, {name: a, logprobs: c}]": "'a' is used twice",
    "initial: p\nsources: [{name: a, logprobs: b, domains: [cod]}]": "did you mean 'code'",
    "initial: p\nsources: [{name: a, logprobs: b, score: [x]}]": "expected flags of",
    "initial: p\nsources: [{name: a, logprobs: b, weight: 1}]": "not of initial; expected",
    "initial: {logprobs: p, weight: 1}\nsources: [{name: a, logprobs: b}]": "not of a; expected",
    "initial: {logprobs: p, weight: -1}": "initial: weight is -1, expected a number of at least 0",
    "initial: {logprobs: p, weight: yes}": "weight is True, expected a number",
    "initial: {logprobs: p, weight: 0}": "all weights are 0, expected one above",
    "initial: p\nsources: [{name: a, logprobs: b, accuracy: 83}]": "accuracy is 83, expected a num",
    "initial: p\nsources: [{name: a, logprobs: b, accuracy: {code: yes}}]": "of code is True, expe",
    "initial: p\nsources: [{name: a, logprobs: b, accuracy: [1]}]": r"accuracy is \[1\], expected",
    "initial: p\nsources: [{name: a, logprobs: b, accuracy: {mat: 1}}]": "did you mean 'math'",
    "initial: p\nsources: [{name: a, logprobs: b, accuracy: {3: 1}}]": "has the domain 3, expect",
    "initial: {logprobs: p, accuracy: 1}": "initial has the unknown key 'accuracy'",
    "initial: {weight: 1}": "initial lacks the key 'logprobs'",
    "initial: p\nsources: [{name: a, logprobs: b, score: {--model: x}}]": "without its dashes",
    "initial: p\nsources: [{name: a, logprobs: b, score: {output: x}}]": "the source's logprobs",
    "initial: p\nsources: [{name: a, logprobs: b, score: {model: }}]": "model is None",
    "initial: p\nsources: [{name: a, logprobs: b, score: {stop: []}}]": r"stop is \[\], expected",
    "initial: p\nsources: [{name: a, logprobs: b, score: {x: .nan}}]": "finite numbers",
    "initial: p\nsources: [{name: a, logprobs: b, score: {x: {d: 2026-07-01}}}]": "dates in quotes",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_files(tmp_path, text):
    with pytest.raises(UserError, match=BAD[text]):
        config = read_sources(write(tmp_path, text))
        check_domains(config, ["code", "math"])
        check_accuracy(config.sources[0], ["code", "math"], config.path)
    with pytest.raises(UserError, match="cannot read"):
        read_sources(tmp_path / "absent.yaml")
