"""Which runs a study has, what it chooses, and what goes on after an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.study.asked import Asked
from megatron_infifpo.study.inputs import Run, key
from megatron_infifpo.study.outcomes import read_outcomes
from megatron_infifpo.study.report import pages
from megatron_infifpo.study.settings import FINAL, MATCHED, TUNED, TUNING, Settings
from megatron_infifpo.study.study import Study, choose
from support.launcher import ROOT

EXAMPLES, DOCS = ROOT / "examples" / "study", ROOT / "docs" / "study"
PUBLISHED = EXAMPLES / "study.yaml"
SMALL = """
sets: 2
tuning_seeds: [100, 101]
prompts: {sft: 30, preference: 30, verification: 12, heldout: 12, log_odds: 6}
pretraining: {texts: 60, steps: 2, pivot_steps: 2, batch: 8, lr: 1.0e-3}
sft: {epochs: 1, batch: 8, lr: 1.0e-3}
training: {epochs: 1, batch: 8, lr: 1.0e-3}
explained: 0
conditions:
  noisy: &all {words: noisy, sources: [generalist], seeds: 3, methods: [sft, dpo], tuned: [dpo]}
  clean: {<<: *all, judge: exact, seeds: 2, methods: [dpo], also: [sft], also_seeds: 1, tuned: []}
methods:
  sft: {words: SFT}
  dpo: {words: DPO, flags: --method dpo, grid: {beta: [0.1, 1], lr: [1.0e-3, 3.0e-3]}}
report: {main: noisy, baseline: sft, ceiling: dpo, primary: []}
"""
CONTRAST = "{name: why, a: sft, b: dpo, condition: noisy, outcome: accuracy, settings: matched}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "study.yaml").write_text(SMALL)
    return Settings.read(tmp_path / "study.yaml")


def test_runs(settings: Settings, tmp_path: Path):
    study = Study(tmp_path / "out", settings, print)
    tuning, matched, further = study.tuning(), study.matched(), study.further()
    assert len(tuning) == 2 * (4 + 2) and {run.seed for run in tuning} == {100, 101}
    # Models and prompts of their own: what is chosen is not measured on the same.
    assert {(run.of_set, run.exam) for run in tuning} == {(2, "tuning")}
    assert {(run.of_set, run.exam) for run in matched} == {(0, "heldout"), (1, "heldout")}
    found = [(r.condition.name, r.method.name, r.seed, r.of_set) for r in matched]
    expected = [("noisy", name, seed, seed % 2) for seed in range(3) for name in ("sft", "dpo")]
    assert found == expected + [("clean", "dpo", seed, seed) for seed in range(2)]
    assert [(r.method.name, r.seed) for r in further] == [("sft", 0)]
    assert {run.settings for run in matched + further} == {MATCHED}
    runs = tuning + matched + further
    assert len({key(run.named) for run in runs}) == len({run.name for run in runs}) == len(runs)
    assert study.tuned() == []  # nothing is tuned yet
    assert Study(tmp_path / "out", settings, print, ["clean"]).matched() == matched[-2:]


def test_seeds_that_begin_later(tmp_path: Path):
    """They confirm, on models that nothing was chosen by."""
    text = SMALL.replace("sets: 2", "sets: 9").replace("seeds: 3", "first_seed: 13, seeds: 3")
    (tmp_path / "study.yaml").write_text(text.replace("tuned: [dpo]", "tuned: []"))
    study = Study(tmp_path / "out", Settings.read(tmp_path / "study.yaml"), print)
    found = {(r.condition.name, r.seed, r.of_set) for r in study.matched()}
    # What the second condition takes over begins there, too.
    assert found == {
        ("noisy", 13, 4), ("noisy", 14, 5), ("noisy", 15, 6), ("clean", 13, 4), ("clean", 14, 5),
    }  # fmt: skip
    assert {r.seed for r in study.further()} == {13}
    (tmp_path / "study.yaml").write_text(text.replace("tuning_seeds: [100", "tuning_seeds: [14"))
    with pytest.raises(UserError, match="14, which is reported"):
        Settings.read(tmp_path / "study.yaml")


def row(run: Run, accuracy: float) -> dict:
    return run.named | {"accuracy": accuracy}


def test_best_mean_of_the_tuning_seeds_is_chosen(settings: Settings, tmp_path: Path):
    variants = settings.methods["dpo"].variants()
    assert variants[0] == {"beta": 0.1, "lr": 1e-3} and len(variants) == 4
    study = Study(tmp_path, settings, print)
    accuracies = {100: [0.5, 0.5, 0.75, 0.5], 101: [0.5, 0.75, 0.25, 0.75]}
    tried = [run for run in study.tuning() if run.settings == TUNED]
    rows = [row(run, accuracies[run.seed][variants.index(dict(run.variant))]) for run in tried]
    # No seed that is reported may choose.
    rows += [row(replace(tried[0], role=FINAL, of_set=0, seed=0), 1.0)]
    rows += [row(replace(tried[0], seed=7), 1.0)]
    condition = settings.conditions["noisy"]
    # means 0.5, 0.625, 0.5, 0.625: the first of equals
    assert choose(rows, study.tuning(), condition) == {"dpo": variants[1]}
    assert choose(rows[1:], study.tuning(), condition) == {}
    lines = [json.dumps(each) for each in rows]
    study.results.write_text("\n".join([*lines, lines[0][:40]]))  # stopped while it wrote
    assert [(run.seed, run.variant) for run in study.tuned()] == [
        (s, variants[1]) for s in range(3)
    ]
    assert {key(run.named) for run in tried} <= study.finished()
    assert {run.role for run in tried} == {TUNING}


def test_run_of_other_settings_is_another_run(settings: Settings, tmp_path: Path):
    """Whatever the file says of its method or its condition, but not their words."""
    run = Study(tmp_path, settings, print).matched()[1]
    method, condition = run.method, run.condition
    others = [
        replace(run, method=replace(method, flags=("--method", "ipo"))),
        replace(run, method=replace(method, control="uniform")),
        replace(run, method=replace(method, sources=("bad",))),
        replace(run, method=replace(method, data="lists")),
        replace(run, method=replace(method, targets=("--fusion", "none"))),
        replace(run, condition=replace(condition, judge="exact")),
        replace(run, condition=replace(condition, pivot="bad")),
        replace(run, condition=replace(condition, sources=())),
        replace(run, condition=replace(condition, on_policy=True)),
    ]
    assert len({run.digest, *(other.digest for other in others)}) == 10
    assert replace(run, method=replace(method, words="other", grid={})).digest == run.digest


def test_folder_of_other_settings(settings: Settings, tmp_path: Path):
    Study(tmp_path / "out", settings, print)
    Study(tmp_path / "out", settings, print)
    (tmp_path / "study.yaml").write_text(SMALL.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(UserError, match="choose another --output"):
        Study(tmp_path / "out", Settings.read(tmp_path / "study.yaml"), print)


@pytest.mark.parametrize("name", ["study", "confirm"])
def test_published_settings(name: str):
    """Every method's flags are a method; what is compared is there."""
    from megatron_infifpo.study.inputs import method_of

    settings = Settings.read(EXAMPLES / f"{name}.yaml")
    for method in settings.methods.values():
        if method.flags:
            for variant in method.variants():
                method_of(method, variant)
    compared = {name for c in settings.conditions.values() for name in (*c.methods, *c.also)}
    assert compared == set(settings.methods)
    assert len(settings.report["primary"]) == {"study": 5, "confirm": 2}[name]
    for contrast in settings.report["primary"]:
        condition = settings.conditions[contrast["condition"]]
        names = condition.tuned if contrast["settings"] == TUNED else condition.methods
        assert {contrast["a"], contrast["b"]} <= set(names)


def test_what_confirms_is_fresh():
    """No model, prompt or order of what it confirms is in it again; methods are the same."""
    first, fresh = (Settings.read(EXAMPLES / f"{name}.yaml") for name in ("study", "confirm"))
    seen = {s for c in first.conditions.values() for s in c.reported(c.seeds)}
    seeds = {s for c in fresh.conditions.values() for s in c.reported(c.seeds)}
    assert not seeds & (seen | set(first.tuning_seeds))
    assert not {s % fresh.sets for s in seeds} & set(range(first.sets + 1))
    for part in ("prompts", "pretraining", "sft", "training"):
        assert getattr(fresh, part) == getattr(first, part)
    for name in fresh.methods.keys() & first.methods.keys():
        assert fresh.methods[name].flags == first.methods[name].flags, name


@pytest.mark.parametrize("name", ["study", "confirm"])
def test_published_report_is_of_the_published_results(name: str):
    folder = DOCS if name == "study" else DOCS / name
    asked = Asked.read(Settings.read(EXAMPLES / f"{name}.yaml").told)
    outcomes = read_outcomes(folder / "results.jsonl.gz")
    made = pages(outcomes, asked, [path.stem for path in folder.glob("*.svg")])
    assert made == {path.name: path.read_text() for path in folder.glob("*.md")}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("methods: [sft, dpo]", "methods: [sft, nothing]", "method 'nothing'"),
        ("sources: [generalist], seeds: 3", "sources: [nobody], seeds: 3", "model 'nobody'"),
        ("tuning_seeds: [100, 101]", "seeds: [100]", "settings of a study"),
        ("tuning_seeds: [100, 101]", "tuning_seeds: [100, 2]", "2, which is reported"),
        ("{words: SFT}", "{words: SFT, control: shufled}", "control 'shufled'"),
        ("{words: SFT}", "{words: SFT, data: prefs}", "data 'prefs'"),
        ("{words: SFT}", "{words: SFT, sources: [nobody]}", "model 'nobody'"),
        ("primary: []", f"primary: [{CONTRAST.replace('dpo', 'ipo')}]", "method 'ipo'"),
        ("primary: []", f"primary: [{CONTRAST}, {CONTRAST}]", "two contrasts named why"),
        ("main: noisy, ", "", "report has no main"),
        ("sets: 2", "sets: [", "settings of a study"),
    ],
)
def test_bad_settings(tmp_path: Path, old: str, new: str, said: str):
    assert old in SMALL
    (tmp_path / "study.yaml").write_text(SMALL.replace(old, new))
    with pytest.raises(UserError, match=said):
        Settings.read(tmp_path / "study.yaml")
