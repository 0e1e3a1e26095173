"""Which runs a study has, what it chooses, and what goes on after an interruption."""

import json
from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.study.settings import MATCHED, TUNED, Settings
from megatron_infifpo.study.study import FINAL, TUNING, Study, choose, row_key
from support.launcher import ROOT

PUBLISHED = ROOT / "examples" / "study" / "study.yaml"
SMALL = """
sets: 2
tuning_seeds: [100, 101]
prompts: {sft: 30, preference: 30, heldout: 12, log_odds: 6}
pretraining: {texts: 60, steps: 2, pivot_steps: 2, batch: 8, lr: 1.0e-3}
sft: {epochs: 1, batch: 8, lr: 1.0e-3}
training: {epochs: 1, batch: 8, lr: 1.0e-3}
explained: 0
conditions:
  noisy: &all {words: noisy, sources: [generalist], seeds: 3, methods: [sft, dpo], tuned: [dpo]}
  clean: {<<: *all, noise: 0, seeds: 2, methods: [dpo], also: [sft], also_seeds: 1, tuned: []}
methods:
  sft: {words: SFT}
  dpo: {words: DPO, flags: --method dpo, grid: {beta: [0.1, 1], lr: [1.0e-3, 3.0e-3]}}
report: {}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "study.yaml").write_text(SMALL)
    return Settings.read(tmp_path / "study.yaml")


def row(variant: dict[str, float], seed: int, accuracy: float, role: str = TUNING) -> dict:
    return {
        "condition": "noisy", "method": "dpo", "settings": TUNED, "role": role,
        "variant": variant, "set": seed % 2, "seed": seed, "accuracy": accuracy,
    }  # fmt: skip


def test_runs(settings: Settings, tmp_path: Path):
    study = Study(tmp_path / "out", settings, print)
    tuning, matched, further = study.tuning(), study.matched(), study.further()
    assert len(tuning) == 2 * 4 and {run.seed for run in tuning} == {100, 101}
    found = [(r.condition.name, r.method.name, r.seed, r.of_set) for r in matched]
    expected = [("noisy", name, seed, seed % 2) for seed in range(3) for name in ("sft", "dpo")]
    assert found == expected + [("clean", "dpo", seed, seed) for seed in range(2)]
    assert [(r.method.name, r.seed) for r in further] == [("sft", 0)]
    assert {run.settings for run in matched + further} == {MATCHED}
    runs = tuning + matched + further
    assert len({run.key for run in runs}) == len({run.name for run in runs}) == len(runs)
    assert study.tuned() == []  # nothing is tuned yet
    assert Study(tmp_path / "out", settings, print, ["clean"]).matched() == matched[-2:]


def test_best_mean_of_the_tuning_seeds_is_chosen(settings: Settings, tmp_path: Path):
    variants = settings.methods["dpo"].variants()
    assert variants[0] == {"beta": 0.1, "lr": 1e-3} and len(variants) == 4
    accuracies = {100: [0.5, 0.5, 0.75, 0.5], 101: [0.5, 0.75, 0.25, 0.75]}
    rows = [
        row(variant, seed, found[place])
        for seed, found in accuracies.items()
        for place, variant in enumerate(variants)
    ]
    rows += [row(variants[0], 0, 1.0, FINAL)]  # no seed that is reported may choose
    condition = settings.conditions["noisy"]
    # means 0.5, 0.625, 0.5, 0.625: the first of equals
    assert choose(rows, settings, condition) == {"dpo": variants[1]}
    assert choose(rows[1:], settings, condition) == {}
    study = Study(tmp_path, settings, print)
    study.results.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert [(run.seed, run.variant) for run in study.tuned()] == [
        (s, variants[1]) for s in range(3)
    ]
    assert {row_key(each) for each in rows} == study.finished()
    assert {run.key for run in study.tuning()} <= study.finished()


def test_folder_of_other_settings(settings: Settings, tmp_path: Path):
    Study(tmp_path / "out", settings, print)
    Study(tmp_path / "out", settings, print)
    (tmp_path / "study.yaml").write_text(SMALL.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(UserError, match="choose another --output"):
        Study(tmp_path / "out", Settings.read(tmp_path / "study.yaml"), print)


def test_published_settings():
    """Every method's flags are a method; what is compared is there."""
    from megatron_infifpo.study.inputs import method_of

    settings = Settings.read(PUBLISHED)
    for method in settings.methods.values():
        if method.flags:
            for variant in method.variants():
                method_of(method, variant)
    compared = {name for c in settings.conditions.values() for name in (*c.methods, *c.also)}
    assert compared == set(settings.methods)
    assert len(settings.report["primary"]) == 5
    for contrast in settings.report["primary"]:
        condition = settings.conditions[contrast["condition"]]
        names = condition.tuned if contrast["settings"] == TUNED else condition.methods
        assert {contrast["a"], contrast["b"]} <= set(names)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("methods: [sft, dpo]", "methods: [sft, nothing]", "method 'nothing'"),
        ("sources: [generalist], seeds: 3", "sources: [nobody], seeds: 3", "model 'nobody'"),
        ("tuning_seeds: [100, 101]", "seeds: [100]", "settings of a study"),
        ("sets: 2", "sets: [", "settings of a study"),
    ],
)
def test_bad_settings(tmp_path: Path, old: str, new: str, said: str):
    assert old in SMALL
    (tmp_path / "study.yaml").write_text(SMALL.replace(old, new))
    with pytest.raises(UserError, match=said):
        Settings.read(tmp_path / "study.yaml")
