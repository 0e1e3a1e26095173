"""Presets as in the paper's tables, and options without effect."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import flag
from megatron_infifpo.losses import LOSSES
from megatron_infifpo.methods import METHODS, Method, add_method_flags, method_from_options, resolve
from megatron_infifpo.reference import FUSIONS

PUBLISHED = {
    "sft": Method("sft", None, True),
    "dpo": Method("dpo", "initial", False, beta=0.1),
    "ipo": Method("ipo", "initial", True, beta=0.1),
    "wrpo": Method("wrpo", "initial", False, beta=0.01, options={"alpha": 0.1}),
    "fpo": Method("dpo", "fused", False, beta=0.1, clip=False),
    "infifpo": Method("dpo", "fused", True, beta=2.5),
    "infifpo-ipo": Method("ipo", "fused", True, beta=0.1),
    "infifpo-wrpo": Method("wrpo", "fused", True, beta=0.25, options={"alpha": 0.1}),
    "fuserlhf": Method(
        "group_regression", "fused", False, beta=0.1, fusion="weighted", clip=False,
        initial_as_source=True,
    ),
    "pad": Method("plackett_luce", "fused", True, beta=10.0, fusion="average", clip=False),
    "fusellm": Method("fusellm", None, True),
    "fusechat": Method("fusechat", None, True),
    "infifusion": Method("infifusion", None, True),
}  # fmt: skip


def parse(*argv: str) -> Method:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_method_flags(parser)
    args = parser.parse_args(argv)
    return method_from_options(args.method, vars(args))


@pytest.mark.parametrize("name", METHODS)
def test_presets(name):
    method = parse("--method", name)
    assert method == resolve(name)
    close: Any = pytest.approx(method.beta)
    assert replace(method, beta=close) == PUBLISHED[name]


@pytest.mark.parametrize(
    "changed, preset",
    [
        (["--no-clip", "--no-length-normalization"], "fpo"),
        (["--reference", "initial", "--no-length-normalization"], "dpo"),
        (["--objective", "ipo"], "infifpo-ipo"),
        (["--objective", "wrpo"], "infifpo-wrpo"),
        (["--objective", "ipo", "--reference", "initial"], "ipo"),
        (["--objective", "wrpo", "--reference", "initial", "--no-length-normalization"], "wrpo"),
    ],
)
def test_options_turn_one_preset_into_another(changed, preset):
    assert parse("--method", "infifpo", *changed) == resolve(preset)


@pytest.mark.parametrize("reference", ["initial", "fused"])
@pytest.mark.parametrize("objective", LOSSES)
def test_every_objective_takes_any_reference(objective, reference):
    needed = {"label_smoothing": 0.1} if objective == "robust" else {}
    if objective == "plackett_luce":  # no rewards, and a teacher
        if reference == "initial":
            return
        needed = {"clip": False}
    method = resolve("infifpo", objective=objective, reference=reference, **needed)
    assert method.objective == objective and method.reference == reference
    lists = ("group_regression", "plackett_luce")
    assert method.responses == (3 if objective == "wrpo" else None if objective in lists else 2)


def test_beta_follows_the_length_normalization_unless_given():
    assert parse("--no-length-normalization").beta == 0.1
    assert parse("--no-length-normalization", "--beta", "0.3").beta == 0.3
    assert parse("--method", "dpo", "--length-normalization").beta == 2.5


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("--method dpo --fusion average", "--fusion has no effect with --method dpo"),
        ("--method ipo --clip", "--clip has no effect with --method ipo"),
        ("--reference initial --selection pair", "--selection has no effect"),
        ("--fusion average --margin-anchor initial", "--margin-anchor has no effect with --fusion"),
        ("--alpha 0.1", "--alpha has no effect with the objective dpo: it belongs to wrpo"),
        ("--objective ipo --label-smoothing 0.1", "it belongs to dpo, wrpo, robust, exo_pair"),
        ("--discopop-tau 0.1", "it belongs to discopop"),
        ("--method sft --beta 1", "--beta has no effect with --method sft"),
        ("--method sft --objective dpo", "--objective has no effect with --method sft"),
        ("--method sft --sft-weight 1", "--sft-weight has no effect with --method sft"),
        ("--reference initial --clip", "--clip has no effect with --reference initial"),
        ("--initial-as-source --margin-anchor initial", "margin is 0, it never wins"),
        ("--margin-space log-prob --margin-anchor initial", "lie on one side of the anchor"),
        ("--objective robust", "--objective robust needs --label-smoothing"),
        ("--beta 0", r"--beta is 0.0, expected a number in \(0, inf\)"),
        ("--beta nan", "--beta is nan"),
        ("--label-smoothing 0.5", r"expected a number in \[0, 0.5\)"),
        ("--objective exo_pair --label-smoothing 0", r"expected a number in \(0, 0.5\)"),
        ("--method wrpo --alpha 1.1", r"expected a number in \[0, 1\]"),
        ("--objective discopop --discopop-tau 1", r"expected a number in \(0, 1\)"),
        ("--sft-weight -1", "--sft-weight is -1"),
        ("--method fuserlhf --sft-weight 1", "no response is the chosen one"),
        ("--method pad --sft-weight 1", "no response is the chosen one"),
        ("--method pad --reference initial", "--method pad learns from its reference"),
        ("--method pad --clip", "--method pad does not know which responses are the better"),
        ("--objective plackett_luce", "--objective plackett_luce does not .* expected --no-clip"),
        ("--method pad --reward-scale 2", "--reward-scale has no effect .* to group_regression"),
        ("--method fuserlhf --divergence jsd", "--divergence has no effect .* to plackett_luce"),
        ("--method fuserlhf --reward-scale 0", r"expected a number in \(0, inf\)"),
        ("--method fuserlhf --reference initial --fusion average", "--fusion has no effect"),
        ("--verdict-scale 1", "--verdict-scale has no effect without --pair-weights, agreement"),
        ("--method sft --verdict-cut 0.5", "--verdict-cut has no effect without --pair-weights"),
        ("--method dpo --pair-weights agreement --verdict-scale 0", r"a number in \(0, inf\)"),
        ("--method sft --pair-weights agreement --verdict-cut 1", r"a number in \(0, 1\)"),
        ("--method pad --pair-weights agreement", "it compares lists, and weights are of single"),
        ("--method fuserlhf --pair-weights best-source", "it compares lists"),
        ("--objective aot --pair-weights agreement", "it compares the pairs of a row together"),
        ("--method fusellm --pair-weights agreement", "whose sources teach each token"),
        ("--method infifusion --pair-weights agreement", "whose sources teach each token"),
        ("--method dpo --clip-by pair", "--clip-by has no effect with --method dpo"),
        ("--method fpo --clip-by pair", "sources that are not clipped: give --clip, too"),
        ("--method sft --clip-by pair", "--clip-by has no effect with --method sft"),
        ("--method ipo --source-values centred", "the reference is the initial pivot, nothing is"),
        ("--method pad --source-values centred", "with --fusion average and .* plackett_luce, wh"),
        ("--method fuserlhf --source-values centred", "only their differences count; leave it out"),
        ("--clip-by pair --source-values centred", "--clip-by has no effect with --source-values"),
        ("--method infifpo-ipo --clip-by pair --source-values standardised", "both responses of a"),
        ("--method dpo --pair-weights best-source --verdict-cut 0.5 --verdict-scale 2",
         "--verdict-scale has no effect with --pair-weights best-source --verdict-cut 0.5: the ve"),
        ("--method sft --pair-weights best-source --verdict-cut 0.5 --verdict-scale 2", "whatever"),
    ],
)  # fmt: skip
def test_bad_options(argv, expected):
    with pytest.raises(UserError, match=expected):
        parse(*argv.split())


def test_unknown_method_lists_the_choices():
    with pytest.raises(UserError, match="expected one of sft, dpo, ipo"):
        resolve("infidpo")


def test_the_scale_of_verdicts_follows_the_length_normalization():
    """By the rule of beta; and SFT's is of means."""
    for argv, scale in (("dpo", 1), ("infifpo", 25), ("sft", 25), ("ipo", 25), ("wrpo", 1)):
        method = parse("--method", argv, "--pair-weights", "agreement")
        assert (method.verdict_scale, method.verdict_cut) == (scale, None)
        assert method.reads_sources and method.reads_logprobs
    assert parse("--pair-weights", "agreement", "--no-length-normalization").verdict_scale == 1
    assert parse("--pair-weights", "agreement", "--verdict-scale", "3").verdict_scale == 3
    reads = {name: (m.reads_sources, m.reads_logprobs) for name, m in METHODS.items()}
    assert (reads["sft"], reads["dpo"], reads["infifpo"]) == (
        (False,) * 2,
        (False, True),
        (True,) * 2,
    )


def test_a_margin_space_matters_where_sources_are_clipped_by_pair():
    """A response's value may then lie on either side of the anchor."""
    options = ("--margin-space", "log-prob", "--margin-anchor", "initial")
    assert parse("--clip-by", "pair", *options).value_options == {"clip_by": "pair"}
    with pytest.raises(UserError, match="lie on one side of the anchor"):
        parse("--clip-by", "response", *options)


@pytest.mark.parametrize("clip", [{"clip": False}, {"clip": True, "clip_by": "pair"}], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("objective", LOSSES)
def test_centring_is_refused_where_only_differences_count(objective, fusion, clip):
    """That nothing changes there, and something does elsewhere, is tested with the values."""
    if objective == "plackett_luce" and clip["clip"]:
        return  # it cannot be clipped
    loss = LOSSES[objective]
    options: dict[str, Any] = {"objective": objective, "fusion": fusion, **clip}
    options |= {name: 0.1 for name, option in loss.options.items() if option.required}
    refused = {}
    if clip["clip"] and loss.responses == 2:
        refused = dict.fromkeys(("centred", "standardised"), "--clip-by has no effect with")
    if loss.differences and FUSIONS[fusion].fixed:
        refused["centred"] = "--source-values has no effect with --fusion"
    for kind in ("centred", "standardised"):
        given = {"source_values": kind, **options}
        if kind in refused:
            with pytest.raises(UserError, match=refused[kind]):
                resolve("infifpo", **given)
        else:
            assert resolve("infifpo", **given).source_values == kind


def test_choices_between_centred_pairs_are_refused():
    """So are those that leave nothing to choose there; see the tests of values."""
    base = ("--margin-anchor", "initial", "--source-values", "standardised")
    selection, space = ["--selection", "pair"], ["--margin-space", "log-prob"]
    for more, flag_name in (
        (selection, "--selection"),
        (space, "--margin-space"),
        (["--no-clip", *space, *selection], "--selection"),
    ):
        with pytest.raises(UserError, match=f"{flag_name} has no effect with --margin-anchor"):
            parse(*base, *more)
    for more in (["--no-clip", *selection], ["--no-clip", *space]):
        assert parse(*base, *more).standardised
    for more in (selection, [*space, *selection], [*space, "--clip-by", "pair"]):
        assert parse("--method", "infifpo-wrpo", *base, *more).standardised, "of three responses"


def test_a_scale_of_verdicts_matters_unless_their_sign_alone_counts():
    weights = ("--method", "dpo", "--verdict-scale", "2", "--pair-weights")
    for more in ("best-source", "best-source --verdict-cut 0.4", "agreement --verdict-cut 0.5"):
        assert parse(*weights, *more.split()).verdict_scale == 2


def test_unknown_choices_are_refused():
    with pytest.raises(UserError, match="--fusion is 'best', expected one of max-margin"):
        resolve("infifpo", fusion="best")
    with pytest.raises(UserError, match="--objective is 'sgd', expected one of dpo"):
        resolve("infifpo", objective="sgd")


def test_alpha_grows_with_progress():
    method = resolve("wrpo", alpha=0.4)
    assert [method.loss_options(p)["alpha"] for p in (0.0, 0.5, 1.0)] == [0.0, 0.2, 0.4]
    assert resolve("infifpo").loss_options(0.5) == {}


@pytest.mark.parametrize("name", METHODS)
def test_description_is_flat_and_comes_back(name):
    method = resolve(name)
    described = method.describe()
    assert Method.from_description(described).describe() == described
    assert {"margin_space", "selection", "label_smoothing", "discopop_tau"} <= described.keys()
    with pytest.raises(TypeError, match="colour"):
        Method.from_description(described | {"colour": "red"})


def test_run_of_before_is_the_same_method():
    """run.json has these fields since it was first written; another value would stop a resume."""
    before = {
        "objective": "wrpo", "reference": "fused", "length_normalization": True, "beta": 0.25,
        "fusion": "max-margin", "clip": True, "margin_space": "prob", "margin_anchor": "current",
        "selection": "response", "initial_as_source": False, "label_smoothing": None,
        "alpha": 0.1, "discopop_tau": None, "sft_weight": None,
    }  # fmt: skip
    now = resolve("infifpo-wrpo").describe()
    assert {name: now[name] for name in before} == before
    assert {now[name] for name in now.keys() - before.keys()} == {None}, "as if it were not there"


def test_lists():
    """As many responses as there are; the ranking losses take so many that can be counted."""
    assert resolve("fuserlhf").responses is None and resolve("fuserlhf").most_responses is None
    assert resolve("pad").most_responses == 10
    assert resolve("pad", divergence="jsd").most_responses == 5
    assert resolve("infifpo").most_responses is None and resolve("sft").most_responses is None
    assert dict(resolve("fuserlhf").reads) == {"rewards": True, "valid": False}
    assert dict(resolve("pad").reads) == {"valid": False} and not resolve("infifpo").reads


def test_options_of_lists():
    method = parse("--method", "fuserlhf", "--clip", "--reward-normalization", "group")
    assert method.clip and method.loss_options(1.0) == {"reward_normalization": "group"}
    assert parse("--method", "fuserlhf", "--length-normalization").beta == 2.5
    assert parse("--method", "pad", "--no-length-normalization").beta == pytest.approx(0.4)
    alone = parse("--method", "fuserlhf", "--reference", "initial")
    assert not alone.fused, "the initial pivot has all the weight"


def test_documentation_names_every_option():
    text = (Path(__file__).parents[1] / "docs" / "method.md").read_text(encoding="utf-8")
    for name in (*METHODS, *LOSSES, *FUSIONS, *map(flag, resolve("infifpo").describe())):
        assert f"`{name}`" in text, name
