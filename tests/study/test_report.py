"""The study's report: every number from the rows, in plain numpy; the same bytes every time."""

import gzip
import json
import math
import os
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.study import figures
from megatron_infifpo.study.asked import Asked
from megatron_infifpo.study.comparisons import contrast, plan
from megatron_infifpo.study.outcomes import read_outcomes
from megatron_infifpo.study.report import pages, write_report
from megatron_infifpo.study.statistics import detectable, seeds_needed

Row = dict[str, Any]
T = {1: 12.7062, 2: 4.30265, 4: 2.77645, 5: 2.57058}  # 97.5 % points of Student's t
GAINS = {"dpo": 0.0, "dpo-truth": 0.03, "infifpo": -0.004, "sft": -0.02, "one": 0.01, "two": 0.02}
SETTINGS: dict[str, Any] = {
    "main": "noise",
    "baseline": "dpo",
    "ceiling": "dpo-truth",
    "seeds": 6,
    "conditions": {"noise": "a quarter is wrong"},
    "methods": {"sft": "SFT", "infifpo": "InfiFPO"},
    "primary": [
        {"name": "fusing", "a": "infifpo", "b": "dpo", "condition": "noise"},
        {"name": "truth", "a": "dpo-truth", "b": "dpo", "condition": "noise"},
        {"name": "transfer", "a": "two", "b": "one", "condition": "noise", "outcome": "slope"},
    ],
    "secondary": [
        {"name": "later", "a": "two", "b": "dpo", "condition": "noise", "settings": "tuned"},
    ],
    "sources": {"clipped": {1: "one", 2: "two"}},
}


def rows() -> list[Row]:
    """Two conditions, six seeds in three sets; SFT has nothing to tune; in one nothing helps."""
    rng = random.Random(5)
    found = []
    for condition, method, seed, settings in (
        (condition, method, seed, settings)
        for condition in ("noise", "clean")
        for method in GAINS
        for seed in (*range(6), 100, 101)
        for settings in ("matched", "tuned")
        if method != "sft" or settings == "matched"
    ):
        gain = GAINS[method] * (condition == "noise")
        accuracy = 0.5 + gain + rng.gauss(0, 0.01)
        row = {"condition": condition, "method": method, "settings": settings, "set": seed % 3}
        row |= {"seed": seed, "role": "final" if seed < 100 else "tuning", "variant": {"beta": 1}}
        row |= {"accuracy": accuracy, "slope": rng.random(), "log_odds": rng.gauss(0, 1)}
        row["domains"] = {"sums": accuracy + 0.1, "turns": accuracy - 0.1}
        if method == "sft":
            del row["settings"]
        else:
            row["why"] = {
                "end": {"length": 4.0, "margin": rng.random(), "saturation": rng.random()}
                | {"coefficient_right": rng.random(), "coefficient_wrong": rng.random()}
                | {"auc": rng.random(), "share/qwen": 0.25, "right_source/qwen": rng.random()}
            }
        found.append(row)
    return found


@pytest.fixture
def written(tmp_path):
    """Write results, and return their file."""

    def write(found: list[Row], name: str = "results.jsonl") -> Path:
        path = tmp_path / name
        text = "".join(json.dumps(row) + "\n" for row in found)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        return path

    return write


@pytest.fixture
def report(written):
    """Make all pages, one after the other, without figures."""

    def make(found: list[Row], **settings: Any) -> str:
        made = pages(read_outcomes(written(found)), Asked.read(SETTINGS | settings))
        return "\n".join(made.values())

    return make


def cells(text: str, heading: str, first: str) -> dict[str, str]:
    """The row of a section's table that begins with a cell, by the table's heads."""
    section = text.split(f"# {heading}\n")[1].split("\n#")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    head: list[str] = []
    for last, line in zip([["-"], *lines], lines, strict=False):
        if line[0] == "---":
            head = last
        if line[0] == first:
            names: list[str] = []
            for name in head:  # "n" is there twice
                names.append(f"{name} {names.count(name) + 1}" if name in names else name)
            return dict(zip(names, line, strict=True))
    raise AssertionError(f"{first} is not in {section}")


def values(found: list[Row], method: str, name: str, settings: str = "matched", **at: Any) -> Any:
    """A number of a method's final runs, by seed."""
    at = {"condition": "noise", "role": "final", "method": method} | at
    return np.array(
        [
            row[name]
            for row in found
            if all(row[key] == value for key, value in at.items())
            and row.get("settings", settings) == settings
        ]
    )


def said(differences: np.ndarray, scale: float = 100, digits: int = 2) -> str:
    n = len(differences)
    half = T[n - 1] * differences.std(ddof=1) / math.sqrt(n)
    return f"{scale * differences.mean():+.{digits}f} ± {scale * half:.{digits}f}"


@pytest.mark.parametrize("settings", ["matched", "tuned"])
@pytest.mark.parametrize("method", ["infifpo", "sft"])
def test_accuracy_and_differences(report, method, settings):
    """SFT has one run for both settings, and is compared with each baseline."""
    found = rows()
    text = report(found)
    own, base = (values(found, name, "accuracy", settings) for name in (method, "dpo"))
    by_set = (own - base).reshape(2, 3).mean(axis=0)  # seeds 0, 3 are of set 0, and so on
    row = cells(text, "noise: a quarter is wrong", SETTINGS["methods"][method])
    second = " 2" if settings == "tuned" else ""
    assert row[f"{settings}, %"] == f"{100 * own.mean():.2f}"
    assert row[f"to dpo, over seeds{second}"] == said(own - base)
    assert row[f"over sets{second}"] == said(by_set)
    assert row[f"n{second}"] == "6"
    place = 0 if settings == "matched" else 1
    overview = cells(text, "All methods in all conditions", SETTINGS["methods"][method])
    mark = "tuned " if place else ""
    expected = f"{mark}{100 * own.mean():.2f}; {said(own - base)} (6)"
    assert overview["noise"].split("<br>")[place] == expected


def test_domains_slope_and_reasons(report):
    found = rows()
    text = report(found)
    own, base = (values(found, name, "domains") for name in ("infifpo", "dpo"))
    row = cells(text, "By domain, noise", "InfiFPO")
    assert row["turns"] == f"{100 * np.mean([each['turns'] for each in own]):.2f}"
    turns = [a["turns"] - b["turns"] for a, b in zip(own, base, strict=True)]
    assert row["to dpo 2"] == said(np.array(turns))
    row = cells(text, "Transfer, and AUC, noise", "InfiFPO")
    own, base = (values(found, name, "slope") for name in ("infifpo", "dpo"))
    assert row["to dpo"] == said(own - base, 1, 3)
    own, base = (values(found, name, "why") for name in ("infifpo", "dpo"))
    auc = [a["end"]["auc"] - b["end"]["auc"] for a, b in zip(own, base, strict=True)]
    assert row["to dpo 2"] == said(np.array(auc), 1, 3)
    row = cells(text, "Why (end), noise", "InfiFPO")
    margin = np.array([each["end"]["margin"] for each in own])
    assert f"+{row['reference margin']}" == said(margin, 1, 3)
    section = text.split("### Why (end), noise")[1].split("\n#")[0]
    assert (
        "| share: qwen | right: qwen |" in section
        and "| 0.250 ± 0.000 |" in section
        and "| n |" in section
    )
    assert "| SFT |" not in section


def test_primary_contrasts_are_corrected_together(report):
    found = rows()
    text = report(found)
    own, base = (values(found, name, "accuracy") for name in ("dpo-truth", "dpo"))
    row = cells(text, "Primary contrasts", "truth")
    assert row["difference, over seeds"] == said(own - base)
    table = {name: cells(text, "Primary contrasts", name) for name in ("fusing", "transfer")}
    p = {name: float(table[name]["p"]) for name in table}
    p["truth"] = float(row["p"])
    corrected, least = {}, 0.0
    for factor, name in zip((3, 2, 1), sorted(p, key=lambda name: p[name]), strict=True):
        corrected[name] = least = max(least, min(1, factor * p[name]))
    for name, expected in corrected.items():
        said_p = float(cells(text, "Primary contrasts", name)["Holm's p"])
        assert said_p == pytest.approx(expected, abs=2.5e-3), "of p-values with three digits"
    assert "p, not corrected" in text.split("## Secondary contrasts")[1].split("\n#")[0]
    own, base = (values(found, name, "accuracy", "tuned") for name in ("two", "dpo"))
    row = cells(text, "Secondary contrasts", "later")
    assert row["difference, over seeds"] == said(own - base)


def test_missing_seeds(report):
    """What lacks seeds is compared on the common ones, and the table says how many."""
    lost = [row for row in rows() if (row["method"], row["seed"]) != ("infifpo", 4)]
    row = cells(report(lost), "Primary contrasts", "fusing")
    own, base = (values(rows(), name, "accuracy") for name in ("infifpo", "dpo"))
    assert row["n"] == "5 of 6"
    assert row["difference, over seeds"] == said(np.delete(own - base, 4))
    lost = [row for row in rows() if row["method"] != "infifpo" or row["seed"] in (4, 100)]
    row = cells(report(lost), "Primary contrasts", "fusing")
    assert row["n"] == "1 of 6"
    assert row["difference, over seeds"] == "fewer than 2 common seeds: no numbers"
    assert [row[name] for name in ("over sets", "p", "Holm's p")] == ["-"] * 3
    own = cells(report(lost), "noise: a quarter is wrong", "InfiFPO")
    assert own["to dpo, over seeds"] == "-" and own["matched, %"] != "-"


def test_numbers_that_are_none(report, written):
    found = rows()
    found[0] |= {"accuracy": math.nan, "log_odds": None, "slope": math.inf, "seconds": True}
    (row,) = [r for r in read_outcomes(written(found)).rows if r.numbers.keys() <= {
        "domains/sums", "domains/turns", *(f"why/end/{name}" for name in found[0]["why"]["end"])
    }]  # fmt: skip
    assert (row.method, row.pair) == ("dpo", (0, 0))
    assert cells(report(found), "noise: a quarter is wrong", "InfiFPO")["n"] == "5 of 6"


def test_headroom(report):
    text = report(rows())
    assert cells(text, "Headroom", "noise: a quarter is wrong")["headroom"] == "yes"
    assert cells(text, "Headroom", "clean")["headroom"] == "**little**"
    assert "\n# clean (little headroom)\n" in text
    assert "## noise: a quarter is wrong\n" in text
    pilots = [row for row in rows() if row["condition"] == "noise" or row["role"] == "tuning"]
    row = cells(report(pilots, headroom=0.5), "Headroom", "clean")
    assert (row["matched"], row["headroom"]) == ("- (0)", "**little**")


def test_headroom_of_other_seeds(report):
    """Means over the variants that both methods have; final seeds have the last word."""
    found = [row for row in rows() if row.get("settings") != "tuned"]
    for row in list(found):
        if row["role"] == "tuning":
            found.append(row | {"variant": {"beta": 9}, "accuracy": row["accuracy"] / 2})
            if row["method"] == "dpo":
                found.append(row | {"variant": {"beta": 7}, "accuracy": 0.9})
    own, base = (
        sum(
            values(found, name, "accuracy", role="tuning", variant={"beta": beta}) / 2
            for beta in (1, 9)
        )
        for name in ("dpo-truth", "dpo")
    )
    text = report(found)
    assert cells(text, "Headroom", "noise: a quarter is wrong")["other seeds"] == (
        f"{said(own - base)} (2)"
    )
    for row in found:
        if row["role"] == "tuning" and row["method"] == "dpo":
            row["accuracy"] = 0.1
    row = cells(report(found), "Headroom", "clean")
    assert row["other seeds"][0] == "+" and row["headroom"] == "**little**"


def test_power_is_said_from_other_seeds(report, written):
    """The SD is of pilots with the final runs' variant, around the mean of each condition."""
    found = [row for row in rows() if row.get("settings") != "tuned"]
    for row in list(found):
        if row["role"] == "tuning":
            found.append(row | {"variant": {"beta": 9}, "accuracy": row["accuracy"] * 7})
    squares = 0.0
    for condition in ("noise", "clean"):
        at: Row = {"role": "tuning", "variant": {"beta": 1}, "condition": condition}
        own, base = (values(found, name, "accuracy", **at) for name in ("dpo-truth", "dpo"))
        squares += 2 * (own - base).var()
    asked, outcomes = Asked.read(SETTINGS), read_outcomes(written(found))
    planned = plan(outcomes, asked, asked.primary[1], points=True)
    assert planned.sd == pytest.approx(math.sqrt(squares / 2)) and planned.freedom == 2
    assert planned.n == 6 and planned.sd and planned.seeds and planned.effect
    assert planned.seeds[0] == seeds_needed(0.01, planned.sd)
    assert planned.seeds[1] == seeds_needed(0.01, planned.sd, alpha=0.05 / 3)
    assert planned.effect[1] == detectable(planned.sd, 6, alpha=0.05 / 3)
    before = [row for row in found if row["role"] != "final" and row["variant"] == {"beta": 1}]
    early = plan(read_outcomes(written(before)), asked, asked.primary[1], points=True)
    assert early == planned, "said before any final run, too"
    section = report(found).split("What was known beforehand")[1]
    assert f"| truth | {100 * planned.sd:.2f} | 2 | {planned.seeds[0]} |" in section
    assert "| 2 | - | - | 6 |" in section, "of a slope no point can be asked"


def test_same_bytes_from_the_same_runs(report, written, tmp_path):
    """In whatever order, packed or not, in another process with another matplotlibrc."""
    found = rows()
    write_report(written(found), SETTINGS, tmp_path / "report")
    first = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    names = ("contrasts", "coefficients", "differences", "sources")
    assert first.keys() == {"report.md", "condition-clean.md", *(f"{name}.svg" for name in names)}
    for name in names:
        text = first[f"{name}.svg"].decode()
        assert ElementTree.fromstring(text).tag.endswith("svg") and "<dc:date>" not in text
        assert f"]({name}.svg)" in first["report.md"].decode()
    assert b"[clean](condition-clean.md)" in first["report.md"]
    assert b"<!-- points of accuracy above dpo -->" in first["differences.svg"]
    random.Random(0).shuffle(found)
    packed = written(found, "results.jsonl.gz")
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.grid: True\nsvg.fonttype: none\n")
    program = (
        "import json, sys; from pathlib import Path; "
        "from megatron_infifpo.study.report import pages, write_report; "
        "settings = json.loads(sys.argv[2]); "
        "settings['sources'] = {'clipped': {1: 'one', 2: 'two'}}; "
        "write_report(Path(sys.argv[1]), settings, Path(sys.argv[3]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"}
    arguments = [str(packed), json.dumps(SETTINGS), str(tmp_path / "again")]
    subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=True,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first


def test_intervals_are_drawn_where_they_are(written, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "svg", drawn.append)
    found = rows()
    asked, outcomes = Asked.read(SETTINGS), read_outcomes(written(found))
    figures.contrasts(outcomes, asked)
    axis = drawn[0].axes[0]
    bars = [s for each in axis.collections for s in each.get_segments()]
    for place, question in enumerate(asked.primary[:2]):
        interval = contrast(outcomes, question).seeds
        assert interval is not None
        ends = [[100 * interval.low, place], [100 * interval.high, place]]
        assert any(np.allclose(bar, ends) for bar in bars)
    sets = contrast(outcomes, asked.primary[0]).sets
    thin = [line.get_xdata() for line in axis.lines]
    assert sets is not None
    assert any(np.allclose(x, [100 * sets.low, 100 * sets.high]) for x in thin if len(x) == 2)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["fusing", "truth"]
    assert drawn[0].axes[1].get_xlabel() == "slope"


def test_no_figures_of_nothing(written, report):
    found = [row for row in rows() if row["method"] == "dpo" and row.pop("why", None) is not None]
    asked = Asked.read(SETTINGS | {"primary": [], "secondary": []})
    assert figures.draw(read_outcomes(written(found)), asked) == {}
    text = report(found, primary=[], secondary=[])
    assert "svg" not in text and "contrasts" not in text and "Why" not in text


def test_matched_alone(report):
    """Where nothing was tuned there is nothing to say of it."""
    text = report([row for row in rows() if row.get("settings") != "tuned"])
    head = text.split("## noise: a quarter is wrong\n")[1].splitlines()[1]
    assert head == "| method | matched, % | to dpo, over seeds | over sets | n |"
    assert "<br>" not in text and "| tuned |" not in text.split("## All methods")[1]


def test_bars_in_names(report):
    text = report(rows(), methods={"dpo": "a|b"})
    assert "| a\\|b | 50." in text


def test_what_is_no_result_is_refused(written):
    found = rows()
    for wrong, message in (
        ([found[0], found[0]], r"results.jsonl:2: dpo in noise, set 0, seed 0 is there already, "),
        ([found[0] | {"seed": None}], "results.jsonl:1: seed is None, expected a whole number"),
        ([found[0] | {"method": 3}], "results.jsonl:1: method is 3, expected a text"),
        ([], "has no results"),
    ):
        with pytest.raises(UserError, match=message):
            read_outcomes(written(wrong))
    path = written(found[:1])
    path.write_text(path.read_text() + "{", encoding="utf-8")
    with pytest.raises(UserError, match="results.jsonl:2: .*expected the result of a run"):
        read_outcomes(path)


def test_settings_that_say_nothing_are_refused():
    fusing = SETTINGS["primary"][0]
    for change, message in (
        ({"mane": "x"}, "report has mane, expected some of main, baseline"),
        ({"main": 3}, "report: main is 3, expected a text"),
        ({"primary": fusing}, "primary is {.*}, expected a list"),
        ({"primary": [fusing, fusing]}, "two contrasts named fusing"),
        ({"primary": [{"name": "x", "a": "dpo", "condition": "noise"}]}, "has no b, expected one"),
        ({"primary": [fusing | {"settings": "best"}]}, "settings best, expected one of matched"),
        ({"sources": {"clipped": ["one"]}}, "expected methods by number of sources"),
        ({"methods": ["sft"]}, "methods is .*, expected names with values"),
    ):
        with pytest.raises(UserError, match=message):
            Asked.read(SETTINGS | change)
    with pytest.raises(UserError, match="report has no ceiling, expected one"):
        Asked.read({"main": "noise", "baseline": "dpo"})
