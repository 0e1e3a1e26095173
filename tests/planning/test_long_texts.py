"""Plans of texts that several ranks share: keys, work, traffic, and what the command proposes."""

from typing import Any

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import PUBLISHED, megatron_args
from megatron_infifpo.megatron_flags.check import GROUPS
from megatron_infifpo.megatron_flags.group import GPU
from megatron_infifpo.planning.estimate import best, estimate
from megatron_infifpo.planning.flags import training_flags
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.plan import FLASH, GIB, Plan
from megatron_infifpo.planning.recompute import BOTH, FULL, MLP, NONE, SELECTIVE
from megatron_infifpo.planning.saves import BY_RANK
from megatron_infifpo.planning.texts import Texts
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.pieces import cut
from megatron_infifpo.rows.preference_dataset import PreferencePair
from megatron_infifpo.training.config import RunConfig

PHI = megatron_args(PUBLISHED["phi-4"])
LONG = 131_072


def long_job(**options: Any) -> PlanningJob:
    return PlanningJob(PHI, 8, seq_length=LONG, **options)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("responses", [2, 5])
def test_texts_of_real_rows(share, responses):
    """Tokens, pairs of a query and a key, and keys that ranks take: those of a row and its cuts."""
    texts = Texts(prompt=640, response=320, responses=responses, share_prompt=share)
    ids = np.zeros(texts.length, np.int32)
    pair = PreferencePair(0, ids[:640], (ids[:320],) * responses)
    for ranks in (1, 2, 4, 8):
        layout = RowLayout(share_prompt=share, context_parallel=ranks)
        row, tail = collate([pair], layout), layout.padding(texts.tokens)
        assert row["tokens"].numel() == texts.tokens + tail
        queries, keys = row["segment_lengths"], row["key_lengths" if share else "segment_lengths"]
        both = list(zip(queries, keys, strict=True))[: len(queries) - (tail > 0)]
        pairs = sum(q * (k - q) + q * (q + 1) // 2 for q, k in both)
        assert texts.attended == 2 * pairs - texts.tokens  # half of the diagonal is not counted
        for rank in range(ranks):
            rows = cut(row, ranks, rank).get("key_rows", ())
            expected = texts.keys(ranks) * texts.tokens
            assert len(rows) == pytest.approx(expected, rel=1e-3, abs=tail)


def test_longest():
    """The pair of the longest text has the average one's proportions."""
    job = long_job(prompt_tokens=3000, response_tokens=1000)
    assert job.longest == Texts(LONG * 3 // 4, LONG // 4, 2, True)
    assert job.row_tokens == LONG * 5 // 4
    assert (long_job().texts.prompt, long_job().texts.response) == (28_672, 4096)
    assert long_job(micro_batch_tokens=300_000).row_tokens == 300_000
    assert PlanningJob(PHI, 8).row_tokens == 8192


def test_operations_of_attention():
    """Forward `4 A h D`; 3.5 of that with the backward pass, and one more where it is repeated."""
    plan, texts = Plan(PHI), Texts(28_672, 4096, 2, True)
    pairs = texts.attended / 2
    forward = 4 * pairs * 40 * 128 * 40  # heads, their size, layers
    products = 6 * plan.sizes.multiplied * texts.tokens

    def operations(recompute: str) -> float:
        length = texts.attended / texts.tokens
        return plan.operations(texts.tokens, 0, length, recompute=recompute, attention=FLASH)

    assert operations(NONE) == pytest.approx(products + 3.5 * forward)
    assert operations(SELECTIVE) == pytest.approx(products + 4.5 * forward)
    assert operations(FULL) == pytest.approx(products * 4 / 3 + 4.5 * forward)


def test_communication():
    """A row of 131,072 tokens at TP 2 and CP 4: 755 MB a layer where attention is repeated."""
    plan = Plan(PHI)
    again = plan.communication(Layout(2, 1, 1, 4), LONG, SELECTIVE).context
    assert again / 40 == pytest.approx(755e6, rel=1e-3)
    assert plan.communication(Layout(2, 1, 1, 4), LONG, NONE).context == pytest.approx(
        again * 2 / 3
    )
    assert plan.communication(Layout(2, 2, 1, 2), LONG, FULL).context == pytest.approx(
        again / 2 * 2 / 3
    )
    assert plan.communication(Layout(2, 1, 4), LONG, SELECTIVE).context == 0


def test_mlps_that_are_computed_again():
    """Two more operations a parameter of an MLP, its sums once more, and what it kept is free."""
    plan, mlps = Plan(PHI), 40 * 3 * 5120 * 17_920
    more = plan.operations(1000, 0, 500, recompute=MLP) - plan.operations(1000, 0, 500)
    assert more == pytest.approx(2 * mlps * 1000)
    both = plan.operations(1000, 0, 500, recompute=BOTH) - plan.operations(1000, 0, 500)
    assert both - more == pytest.approx(2 * 500 * 5120 * 40 * 1000)
    layout = Layout(2, 1, 1, 2)
    sent = {kind: plan.communication(layout, LONG, kind) for kind in (NONE, SELECTIVE, MLP, BOTH)}
    assert sent[MLP].tensor == sent[BOTH].tensor == pytest.approx(1.2 * sent[NONE].tensor)
    assert sent[MLP].context == sent[NONE].context and sent[BOTH].context == sent[SELECTIVE].context
    attention, also = (
        plan.memory(layout, LONG, 1, gathered=1.25, recompute=kind) for kind in (SELECTIVE, BOTH)
    )
    # In bfloat16: three of the inner width, and the output of a norm that is in the first product.
    kept = (3 * 17_920 + 5120) * 2 * LONG / 4
    assert attention.activations - also.activations == pytest.approx(40 * kept)
    one = plan.memory(Layout(2, 1, 2), LONG, 1, recompute=MLP)
    assert one.attention == pytest.approx(2 * kept), "those of one MLP, for its backward pass"


@pytest.mark.parametrize(
    ("layout", "recompute", "modules"),
    [(Layout(2, 1, 4), MLP, ["mlp"]), (Layout(2, 1, 2, 2), BOTH, ["core_attn", "mlp"])],
)
def test_flags_of_what_is_computed_again(layout, recompute, modules):
    """Training takes them; what is tried leaves attention to ranks that share rows."""
    job = long_job()
    (one,) = (x for x in estimate(job) if (x.layout, x.recompute) == (layout, recompute))
    words = ["--preference-data", "p", "--preference-sources", "s.yaml", "--global-batch-size", "8"]
    flags = training_flags(job, one).split()
    given = RunConfig.from_arguments([*words, "--bf16", *flags]).flags
    assert (given["recompute_granularity"], given["recompute_modules"]) == ("selective", modules)


def test_hours_of_traffic():
    """At a bandwidth of 1 GB/s the hours are those of the traffic and of the work."""
    fast, slow = (
        {(one.layout, one.recompute): one.hours for one in estimate(long_job(gpu_bandwidth=rate))}
        for rate in (1e9, 1.0)
    )
    job, layout = long_job(), Layout(2, 1, 2, 2)
    tokens = 75_000 * (3 * job.texts.length + job.texts.tokens)
    traffic = job.plan.communication(layout, tokens / 2, SELECTIVE).total
    hours = slow[layout, SELECTIVE] - fast[layout, SELECTIVE]
    assert hours == pytest.approx(traffic / 1e9 / 3600, rel=1e-6)


def test_memory_of_shared_rows():
    """Phi-4 at TP 2: what is a rank's own shrinks, the keys that it selects do not."""
    plan, texts = Plan(PHI), long_job().texts.scaled(LONG)
    gathered = [texts.keys(ranks) for ranks in (1, 2, 4)]

    def memory(context: int, recompute: str) -> Any:
        layout = Layout(2, 1, 4 // context, context)
        keys = gathered[context.bit_length() - 1]
        return plan.memory(layout, LONG, 1, gathered=keys, recompute=recompute)

    one, two, four = (memory(ranks, SELECTIVE) for ranks in (1, 2, 4))
    assert one.activations == 2 * two.activations == 4 * four.activations
    assert one.optimizer == two.optimizer == four.optimizer
    assert one.gradients == two.gradients == four.gradients
    # Keys and values, bfloat16: selected again, their gradients, and one a query head first.
    selected = 2 * 1280 * 2 * gathered[2] * LONG / 2
    assert four.attention == pytest.approx(selected * (2 + 5120 / 1280))
    # Without recomputation each layer would keep what it selected, and not what it made itself.
    more = selected - LONG / 8 * (5120 + 3 * 1280) * 2
    assert memory(4, NONE).activations - four.activations == pytest.approx(40 * more) and more > 0
    layers = 40 * LONG / 8 * 5120 * 2 + four.activations / 40 + more
    assert memory(4, FULL).activations == pytest.approx(layers)


def test_whole_keys_are_gathered():
    """Where heads share no keys, gradients of the whole row's come after those of selected ones."""
    plan = Plan(PHI | {"num_query_groups": 40})
    shared, alone = (
        plan.memory(layout, LONG, 1, gathered=1.25).attention
        for layout in (Layout(2, 1, 1, 2), Layout(2, 1, 2))
    )
    assert shared - alone == pytest.approx(2 * 5120 * 2 * LONG / 2)


def test_lighter_optimizers():
    """Gradients and moments in bfloat16; Megatron's step makes such gradients float32 before."""
    whole, gradients, moments = (
        long_job(**options).plan.memory(Layout(2, 1, 2, 2), LONG, 1)
        for options in ({}, {"grad_reduce_in_bf16": True}, {"adam_moments": "bf16"})
    )
    assert gradients.gradients == whole.gradients / 2 and moments.gradients == whole.gradients
    assert moments.optimizer == whole.optimizer / 2 and gradients.optimizer == whole.optimizer
    assert gradients.update == whole.optimizer / 3 and whole.update == 0
    assert moments.update == moments.save == whole.optimizer * 2 / 3


@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_offload(fraction):
    """Its state leaves the GPU; the host has it, and float32 gradients beside."""
    layout, data = Layout(2, 1, 2, 2), 14_659_507_200 / 2 / 4
    plans = [long_job(optimizer_offload=share).plan for share in (0.0, fraction)]
    before, after = (plan.memory(layout, LONG, 1) for plan in plans)
    assert after.optimizer == pytest.approx((1 - fraction) * before.optimizer)
    host, more = (plan.host_memory(layout, BY_RANK, 8) for plan in plans)
    # A save copies no more what is on the host, unless another process writes it.
    assert more - host == pytest.approx(fraction * (16 - 12) * 8 * data, rel=1e-3)
    host, more = (plan.host_memory(layout, BY_RANK, 8, asynchronous=True) for plan in plans)
    assert more - host == pytest.approx(fraction * 16 * 8 * data, rel=1e-3)
    # Megatron makes bfloat16 gradients float32, and keeps those of what stays.
    job = long_job(optimizer_offload=fraction, grad_reduce_in_bf16=True)
    lighter = job.plan.memory(layout, LONG, 1)
    assert lighter.optimizer == pytest.approx((1 - fraction) * before.optimizer * 4 / 3)
    assert lighter.update == 0


def test_a_layout_for_long_texts():
    """Phi-4 at 131,072 tokens fits eight GPUs, and training takes the flags."""
    job = long_job()
    found = estimate(job)
    first, *others = best(found)
    assert first.fits and first.memory.total + 6 * GIB <= 80 * GIB
    assert first.layout.context > 1 and len({first.layout, *(x.layout for x in others)}) == 3
    assert not [one for one in found if one.layout.context > 1 and one.recompute == NONE]
    lighter = long_job(grad_reduce_in_bf16=True)
    words = ["--preference-data", "p", "--preference-sources", "s.yaml", "--global-batch-size", "8"]
    words += ["--bf16", "--use-distributed-optimizer"]
    for plan in (job, lighter):
        for one in best(estimate(plan)):
            given = RunConfig.from_arguments([*words, *training_flags(plan, one).split()]).flags
            layout = Layout(
                given["tensor_model_parallel_size"],
                given["pipeline_model_parallel_size"],
                one.layout.data,
                given["context_parallel_size"],
            )
            assert layout == one.layout and given["seq_length"] == LONG
            assert (given["recompute_granularity"] or NONE) == one.recompute
            assert given["grad_reduce_in_bf16"] == plan.grad_reduce_in_bf16


PRECISION_AWARE = "--use-precision-aware-optimizer "


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"adam_moments": "bf16"}, "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"),
        ({"optimizer_offload": 0.5}, "--optimizer-cpu-offload --optimizer-offload-fraction 0.5"),
    ],
)
def test_flags_for_gpus(options, flags):
    """Training takes them where Transformer Engine is; a CPU refuses them."""
    job = long_job(**options)
    assert f"{PRECISION_AWARE}{flags} " in training_flags(job, estimate(job)[0])
    table = {name: kind for group in GROUPS.values() for name, kind, _ in group.named()}
    names = [word[2:].replace("-", "_") for word in flags.split() if word.startswith("--")]
    assert {table[name] for name in ("use_precision_aware_optimizer", *names)} == {GPU}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt_tokens": LONG}, "texts have 135168 tokens on average"),
        ({"adam_moments": "bf16", "torch_adam": True}, "needs Transformer Engine's Adam"),
        ({"adam_moments": "bf16", "precision": "fp8"}, "and --precision bf16"),
        ({"grad_reduce_in_bf16": True, "precision": "fp32"}, "has no effect with --precision fp32"),
        ({"seq_length": 0}, "--seq-length is 0, expected a whole number"),
        ({"optimizer_offload": 1.5}, "--optimizer-offload is 1.5, expected a number"),
        ({"optimizer_offload": 1.0, "torch_adam": True}, "needs Transformer Engine"),
        ({"optimizer_offload": 1.0, "adam_moments": "bf16"}, "has no effect with --optimizer-off"),
    ],
)
def test_jobs_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        PlanningJob(PHI, 8, **({"seq_length": LONG} | options))


def test_attention_that_is_not_cut():
    """Transformer Engine's own attention takes no part of a row."""
    found = estimate(long_job(layers="te-attention", share_prompt=False))
    assert {one.layout.context for one in found} == {1}


def test_the_command(ranks):
    argv = ["--model", "phi-4", "--gpus", "8", "--gpu-memory", "80", "--seq-length", str(LONG)]
    ranks(1, "support.tools:run_tool", "plan_run", argv)
    lines = ranks.logs[0].splitlines()
    assert any("hours are for 28,672 and 4,096 on average" in line for line in lines)
    assert any("phi-4 is made for texts of 16,384 tokens: its rope must" in line for line in lines)
    rows = [line for line in lines if line.strip()[:1].isdigit()]
    assert len(rows) == 3 and "does not fit" not in rows[0]
    assert sum("--context-parallel-size" in line for line in lines) >= 1
