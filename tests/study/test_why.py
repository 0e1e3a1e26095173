"""What `explain` says of a method, against plain floats from the values that were written."""

import math

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.losses import LOSSES
from megatron_infifpo.methods import METHODS, resolve
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.study.why import explain
from support.datasets import record, write_scores, write_tokens
from support.list_job import MASKED, ListJob

COUNT, EXACT = 24, 1e-12
UNKNOWN = [3, 4, 11]  # records that source a has no log-probs of


class Pairs:
    """Triples of two domains; source a lacks some, b knows code alone."""

    def __init__(self, folder):
        records = [record(i, domain=("math", "code")[i % 2], pivot=True) for i in range(COUNT)]
        tokens = write_tokens(folder, records)
        self.prefix, self.file, lengths = (
            folder / "tokens",
            folder / "sources.yaml",
            tokens.scored_lengths,
        )
        write_scores(folder / "pivot", records, lengths)
        write_scores(folder / "a", records, lengths + 2, seed=1, masked=UNKNOWN)
        write_scores(folder / "b", records, lengths + 1, seed=2)
        write_scores(folder / "trained", records, lengths, seed=3)
        self.file.write_text(
            "initial: pivot\nsources:\n  - {name: a, logprobs: a}\n"
            "  - {name: b, logprobs: b, domains: [code]}\n"
        )
        self.stores = {n: LogprobStore(folder / n) for n in ("pivot", "a", "b", "trained")}
        self.truth = np.array([(1, 1, -1, 1, 0, -1)[i % 6] for i in range(COUNT)])

    def explain(self, name, trained=False, **options):
        policy = self.stores["trained"] if trained else None
        return explain(resolve(name, **options), (self.prefix, self.file), self.truth, policy)

    def sums(self, model, i):
        return self.stores[model].sums(i)

    def means(self, model, i):
        return self.stores[model].sums(i) / self.stores[model].counts(i)

    def taking_part(self, i):
        return [
            n for n in "ab" if not (n == "a" and i in UNKNOWN) and not (n == "b" and i % 2 == 0)
        ]

    def max_margin(self, i, policy):
        """Reference, chosen sources and what was clipped, of chosen and rejected."""
        initial, found = self.means("pivot", i), []
        for r, better in enumerate((max, min)):
            clipped = {n: better(self.means(n, i)[r], initial[r]) for n in self.taking_part(i)}
            away = {n: abs(math.exp(c) - math.exp(policy[r])) for n, c in clipped.items()}
            best = max(away, key=lambda n: away[n]) if away else None
            changed = [n for n, c in clipped.items() if c == initial[r]]
            found.append((clipped.get(best, initial[r]), best, changed))
        return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return Pairs(tmp_path_factory.mktemp("pairs"))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def close(found, expected):
    assert found == pytest.approx(expected, abs=EXACT, rel=EXACT)


def told_apart(coefficients, truth):
    """Means of right and wrong pairs, and how often a right one has the larger coefficient."""
    right = [c for c, t in zip(coefficients, truth, strict=True) if t > 0]
    wrong = [c for c, t in zip(coefficients, truth, strict=True) if t < 0]
    wins = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    return np.mean(right), np.mean(wrong), np.mean(wins)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_pivot_that_is_its_own_reference_pushes_every_pair_alike(pairs, name):
    found = pairs.explain(name)
    for key in ("coefficient", "coefficient_right", "coefficient_wrong", "auc"):
        close(found[key], 0.5)
    assert (found["push"], found["saturation"], found["full"]) == (pytest.approx(1), 0, 0)
    assert found["records"] == COUNT and found["margin_above_initial"] == 0
    assert found["kl_initial"] == 0 and found["kl_sources"] > 0
    assert not [key for key in found if key.startswith(("share", "clip", "right_source"))]


def test_coefficients_of_a_trained_policy(pairs):
    truth, rows = pairs.truth, range(COUNT)
    moved = [pairs.sums("trained", i) - pairs.sums("pivot", i) for i in rows]
    coefficients = {
        "dpo": [sigmoid(-0.3 * (x[0] - x[1])) for x in moved],
        "wrpo": [sigmoid(-0.3 * (0.4 * x[0] + 0.6 * x[2] - x[1])) for x in moved],
    }
    moved = [pairs.means("trained", i) - pairs.means("pivot", i) for i in rows]
    coefficients["ipo"] = [0.5 - 0.3 * (x[0] - x[1]) for x in moved]
    for name, expected in coefficients.items():
        options = {"alpha": 0.4} if name == "wrpo" else {}
        found = pairs.explain(name, trained=True, beta=0.3, **options)
        keys = ("coefficient_right", "coefficient_wrong", "auc")
        close([found[key] for key in keys], told_apart(expected, truth))
        close(found["coefficient"], np.mean(expected))
        close(found["saturation"], np.mean(np.array(expected) < 0.1))
        close(found["full"], np.mean(np.array(expected) > 0.9))


def test_a_loss_of_other_slopes_has_the_same_unit(pairs):
    # Not of aot's: it compares with other pairs' references, and no pair stands at its own.
    others = [n for n, loss in LOSSES.items() if loss.responses == 2 and not loss.several_pairs]
    assert len(others) > 8
    for objective in others:
        options = {"label_smoothing": 0.2} if objective == "robust" else {}
        found = pairs.explain("dpo", objective=objective, beta=0.2, **options)
        close((found["coefficient_right"], found["coefficient_wrong"]), (0.5, 0.5))
    assert 0 < pairs.explain("dpo", objective="aot")["coefficient"] < 1


def test_an_sft_term_is_left_out(pairs):
    for name in ("dpo", "infifpo"):  # of sums and of means
        plain = pairs.explain(name, trained=True)
        assert pairs.explain(name, trained=True, sft_weight=3.0) == plain


@pytest.mark.parametrize("trained", [False, True])
def test_infifpo(pairs, trained):
    found = pairs.explain("infifpo", trained=trained, beta=0.7)
    coefficients, margins, gains, right, wrong = [], [], [], [], []
    shares, changed, values = {"a": 0.0, "b": 0.0, None: 0.0}, [], 0
    for i in range(COUNT):
        policy = pairs.means("trained" if trained else "pivot", i)
        (high, *of_chosen), (low, *of_rejected) = pairs.max_margin(i, policy)
        initial, truth = pairs.means("pivot", i), pairs.truth[i]
        coefficients.append(sigmoid(0.7 * (high - low - policy[0] + policy[1])))
        margins.append(high - low)
        gains.append(high - low - initial[0] + initial[1])
        for best, clipped in (of_chosen, of_rejected):
            shares[best] += 1 / (2 * COUNT)
            changed += clipped
            if best and truth:
                own = pairs.means(best, i)
                right.append((own[0] > own[1]) == (truth > 0))
                wrong += [right[-1]] if truth < 0 else []
        values += 2 * len(pairs.taking_part(i))
    close(
        [found[k] for k in ("coefficient_right", "coefficient_wrong", "auc")],
        told_apart(coefficients, pairs.truth),
    )
    close(found["margin"], np.mean(margins))
    close(found["margin_rms"], np.mean(np.square(margins)) ** 0.5)
    close(found["margin_above_initial"], np.mean(gains))
    close([found[f"share/{n}"] for n in ("a", "b", "initial")], [*shares.values()])
    close(found["clip_rate"], len(changed) / values)
    close(found["clip_rate/b"], changed.count("b") / COUNT)
    close((found["right_source"], found["right_source_wrong"]), (np.mean(right), np.mean(wrong)))
    assert 0 < found["share/initial"] < found["share/b"] and 0 < found["clip_rate"] < 1
    if not trained:  # equation: sigmoid of a margin that clipping keeps above the pivot's
        assert min(coefficients) >= 0.5 and found["clip_rate_used"] < found["clip_rate"]
        assert found["kl_initial"] == found["drift"] == 0


def test_what_an_average_is_right_about_counts_by_weight(pairs):
    found = pairs.explain("infifpo", fusion="average")
    shares, of_a = [], []
    for i in range(COUNT):
        own = [pairs.means(n, i) for n in pairs.taking_part(i)]
        if pairs.truth[i] and own:
            agree = [(x[0] > x[1]) == (pairs.truth[i] > 0) for x in own]
            shares.append(np.mean(agree))
            of_a += [agree[0]] if "a" in pairs.taking_part(i) else []
    close(found["right_source"], np.mean(shares))
    close(found["right_source/a"], np.mean(of_a))


def test_distances_and_lengths(pairs):
    found = pairs.explain("wrpo", trained=True)
    policy, initial, b = (
        np.stack([pairs.sums(n, i) for i in range(COUNT)]) for n in ("trained", "pivot", "b")
    )
    close(found["kl_initial"], np.abs(policy - initial).mean())
    close(found["kl_sources/b"], np.abs(policy - b)[1::2].mean())
    close(found["drift_rejected"], (policy - initial)[:, 1].mean())
    counts = np.stack([pairs.stores["pivot"].counts(i) for i in range(COUNT)])
    close(found["length"], counts.mean())
    close(found["length_chosen"], counts[:, 0].mean())
    margin = policy[:, 0] - policy[:, 1]
    close(found["policy_margin"], margin.mean())
    wrong = pairs.truth < 0
    close(found["policy_right_wrong"], (margin[wrong] < 0).mean())
    # A loss of two responses looks at two.
    close(pairs.explain("dpo", trained=True)["length"], counts[:, :2].mean())


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if "rewards" not in m.reads])
def test_every_method_has_an_answer(pairs, name):
    found = pairs.explain(name, trained=True)
    assert all(isinstance(x, float) and math.isfinite(x) for x in found.values())
    assert {"kl_initial", "kl_sources", "length"} <= found.keys()
    assert ("coefficient" in found) == (METHODS[name].responses in (2, 3))
    assert ("residual_std" in found) == (name == "pad")


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    return ListJob(tmp_path_factory.mktemp("lists"))


def test_lists(lists):
    method = resolve("fuserlhf", beta=0.5)
    data = PreferenceDataset.for_method(method, lists.data, read_sources(lists.sources))
    scores = data.tokens.scores
    assert scores is not None
    truth = np.where(np.isnan(scores), 0, np.where(scores > 1, 1, -1))
    found = explain(method, data, truth, LogprobStore(lists.folder / "trained"))
    spreads, pulls, signs = [], [], []
    stores = {n: LogprobStore(lists.folder / n) for n in ("pivot", "a", "b", "trained")}
    for i in data.eligible(10**6):
        columns = [c for c in data.columns[i] if c >= 0]
        weights = {"a": 2.0, "pivot": 0.5}
        if i != MASKED and data.tokens.domain(i) != "law":
            weights["b"] = 1.0
        fused = sum(w * stores[n].sums(i)[columns] for n, w in weights.items())
        ratio = stores["trained"].sums(i)[columns] - fused / sum(weights.values())
        residuals = scores[i][columns] - 0.5 * ratio
        spreads.append(residuals.std(ddof=1))
        # d/dp of the sample variance / (2 beta), by beta.
        pulls += ((residuals - residuals.mean()) / (len(columns) - 1) / 0.5).tolist()
        signs += truth[i][columns].tolist()
    close(found["residual_std"], np.mean(spreads))
    close([found[k] for k in ("pull_right", "pull_wrong", "auc")], told_apart(pulls, signs))
    assert "coefficient" not in found and found["records"] == len(spreads)
    assert found["share/a"] > found["share/initial"] > 0

    pad = resolve("pad")
    plain = explain(pad, (lists.data, lists.sources), np.zeros(24))
    assert plain["residual_std"] > 0 and "pull_right" not in plain and "auc" not in plain


def test_refusals(pairs):
    method = resolve("dpo")
    with pytest.raises(UserError, match="truth is of 3 records, expected 24"):
        explain(method, (pairs.prefix, pairs.file), np.ones(3))
    with pytest.raises(UserError, match=r"log-probs of a sources\.yaml"):
        explain(method, PreferenceDataset(pairs.prefix), pairs.truth)


@pytest.mark.parametrize(("name", "values"), [("dpo", "sums"), ("sft", "means")])
def test_weights_of_pairs_are_in_the_coefficient(pairs, name, values):
    weights = []
    for i in range(COUNT):
        own = [getattr(pairs, values)(n, i) for n in pairs.taking_part(i)]
        weights.append(np.mean([sigmoid(0.4 * (x[0] - x[1])) for x in own]) if own else 1.0)
    right, wrong, auc = told_apart(weights, pairs.truth)
    found = pairs.explain(name, pair_weights="agreement", verdict_scale=0.4)
    close([found[key] for key in ("weight_right", "weight_wrong", "auc")], (right, wrong, auc))
    if name == "dpo":
        close([found[f"coefficient_{key}"] for key in ("right", "wrong")], (right / 2, wrong / 2))
    else:
        assert "coefficient" not in found
