"""What run.yaml means: every command of a run, in order, with what it waits for."""

import shlex

import pytest

from megatron_infifpo.commands.fuse import check_words
from megatron_infifpo.errors import UserError
from megatron_infifpo.run.layouts import choose_layouts
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.plan import Layouts, Plan, sources_yaml
from megatron_infifpo.run.reading import make_run, read_run
from megatron_infifpo.run.schema import Layout
from megatron_infifpo.run.stages import stages_of
from support import tiny

TEMPLATE = """'--chat-template-options' '{"enable_thinking": false, "budget": 512}'"""


def lines(run, plain) -> dict[str, str]:
    return {stage.name: str(stage.job) for stage in stages_of(Plan(run, plain))}


def test_commands(folder, plain):
    found = lines(read_run("run.yaml"), plain)
    assert list(found) == [
        "split", "prepare-sft", "prepare-preference", "score-qwen2", "score-qwen2.5", "sft",
        "score-sft", "infifpo", "export-infifpo", "verify-infifpo", "report-infifpo", "dpo",
        "export-dpo", "verify-dpo", "report-dpo", "prepare-heldout", "score-heldout-pivot",
        "score-heldout-sft", "score-heldout-infifpo", "score-heldout-dpo",
    ]  # fmt: skip
    assert found["split"] == (
        "infifpo split --input pairs.jsonl --sft out/data/sft.jsonl "
        "--preference out/data/preference.jsonl --share 0.5 --seed 0"
    )
    options = """--chat-template-options '{"enable_thinking": false, "budget": 512}'"""
    assert found["prepare-sft"] == (
        "infifpo prepare --input out/data/sft.jsonl --tokenizer pivot --output out/data/sft "
        + options
    )
    assert found["score-qwen2.5"] == (
        "infifpo score --backend megatron --model coder --max-row-tokens 4096 --name qwen2.5 "
        "--input out/data/preference.jsonl --output out/logprobs/qwen2.5 --domains code "
        "--absent-domains mask"
    )
    # The initial pivot is scored by the template that its records were tokenized with.
    assert options in found["score-sft"] and "--model out/sft" in found["score-sft"]
    assert "--pretrained-checkpoint pivot --save out/sft " in found["sft"]
    assert "--preference-epochs 3 --lr 1e-06" in found["sft"]
    for name in ("infifpo", "dpo"):
        assert f"--preference-sources out/sources/{name}.yaml" in found[name]
        assert f"--pretrained-checkpoint out/sft --save out/{name} " in found[name]
    words = shlex.split(found["infifpo"])
    assert words[words.index("--clip-grad") + 1] == "0.5"
    # A flag of the file takes the place of the usual one.
    assert [words[i + 1] for i, w in enumerate(words) if w == "--log-interval"] == ["10"]


def test_order(folder, plain):
    stages = stages_of(Plan(read_run("run.yaml"), plain))
    seen: set[str] = set()
    for stage in stages:
        assert set(stage.after) <= seen, stage.name
        seen.add(stage.name)
    after = {stage.name: set(stage.after) for stage in stages}
    assert after["infifpo"] == {
        "prepare-preference", "sft", "score-sft", "score-qwen2", "score-qwen2.5"
    }  # fmt: skip
    assert after["dpo"] == after["infifpo"]
    assert after["sft"] == {"prepare-sft"}
    # Sources wait for records only: they are scored beside SFT.
    assert after["score-qwen2"] == {"split"}
    assert after["score-heldout-dpo"] == {"dpo"}


def test_sources_yaml(folder):
    run = read_run("run.yaml")
    assert sources_yaml(Plan(run, Layouts({}, {})))["infifpo"] == {
        "initial": "../logprobs/sft",
        "sources": [
            {"name": "qwen2", "logprobs": "../logprobs/qwen2"},
            {"name": "qwen2.5", "logprobs": "../logprobs/qwen2.5", "domains": ["code"]},
        ],
    }


def base(**more):
    given: dict[str, object] = {"output": "out", "precision": "fp32", "pivot": {"model": "pivot"}}
    given["sources"] = [{"name": "qwen", "model": "qwen"}]
    return make_run(given | {"data": {"pairs": ["pairs.jsonl"]}} | more, "a run")


def test_without_sft(folder, plain):
    """All pairs are for preferences, and the initial pivot is the given one."""
    run = base(train=[{"method": "infifpo"}])
    found = lines(run, plain)
    assert list(found)[:4] == ["prepare-preference", "score-qwen", "score-pivot", "infifpo"]
    assert "--input pairs.jsonl" in found["prepare-preference"]
    assert "--preference-sources out/sources/infifpo.yaml" in found["infifpo"]
    assert "--pretrained-checkpoint pivot " in found["infifpo"]


def test_adapters(folder, plain):
    """Of a low rank."""
    run = base(train=[{"method": "infifpo", "lora_rank": 16}])
    assert "--lora-rank 16" in lines(run, plain)["infifpo"]


def test_from_prompts(folder, plain):
    (folder / "judge.py").write_text("")
    run = base(
        data={"prompts": ["pairs.jsonl=5"]}, labels={"program": "judge.py:score"},
        train=[{"method": "infifpo"}],
    )  # fmt: skip
    stages = {stage.name: stage for stage in stages_of(Plan(run, plain))}
    assert str(stages["sample-qwen"].job) == (
        "infifpo sample --model qwen --name qwen --engine transformers --count 4 "
        "--output out/responses/qwen.jsonl --input pairs.jsonl=5"
    )
    assert "--count 8" in str(stages["sample-pivot"].job)
    assert stages["label"].after == ("sample-pivot", "sample-qwen")
    assert stages["prepare-preference"].after == ("label",)
    assert "--input out/responses/records.jsonl" in str(stages["score-qwen"].job)
    assert stages["sample-qwen"].inputs == ("qwen", "pairs.jsonl")
    assert stages["label"].inputs == ("judge.py",)


def test_token_fusion(folder, plain):
    run = base(train=[{"method": "fusellm"}])
    plain.training["fusellm"] = ()
    stages = {stage.name: stage for stage in stages_of(Plan(run, plain))}
    assert "--top-k 16 --top-k-responses chosen" in str(stages["score-tokens-sft-qwen"].job)
    assert stages["fuse-fusellm"].after == (
        "prepare-sft", "score-tokens-sft-pivot", "score-tokens-sft-qwen"
    )  # fmt: skip
    assert "--soft-targets out/tokens/targets/fusellm" in str(stages["fusellm"].job)
    content = sources_yaml(Plan(run, Layouts({}, {})))["fusellm"]
    assert content["sources"] == [{"name": "qwen", "logprobs": "../tokens/sft/qwen"}]


def test_fusechat(folder, plain):
    """A model of each source, merged; all of them start from the SFT result, on the other half."""
    sources = [{"name": name, "model": name} for name in ("qwen", "coder")]
    more = [
        {"name": f"chat-{s['name']}", "method": "fusechat", "data": "preference",
         "sources": [s["name"]]}
        for s in sources
    ]  # fmt: skip
    run = base(
        sources=sources, train=[{"method": "sft"}, *more],
        merge=[{"name": "chat", "models": ["chat-qwen", "chat-coder"]}],
        data={"pairs": ["pairs.jsonl"], "heldout": ["heldout.jsonl"]},
    )  # fmt: skip
    plain.training.update({"chat-qwen": (), "chat-coder": ()})
    stages = {stage.name: stage for stage in stages_of(Plan(run, plain))}
    assert "--model out/sft" in str(stages["score-tokens-sft"].job)
    assert stages["fuse-chat-coder"].after == (
        "prepare-preference", "score-tokens-sft", "score-tokens-coder"
    )  # fmt: skip
    assert "score-qwen" not in stages  # nothing reads log-probs without top-k
    # What they have learnt is what they differ in from that result, which is exported for it.
    assert str(stages["merge-chat"].job) == (
        "infifpo merge --method sce --base out/sft-hf --models out/chat-qwen-hf out/chat-coder-hf "
        "--output out/chat-hf"
    )
    assert stages["merge-chat"].after == ("export-sft", "export-chat-qwen", "export-chat-coder")
    assert stages["merge-chat"].inputs == ()
    heldout = stages["score-heldout-chat"]
    assert "merge-chat" in heldout.after and heldout.inputs == ("heldout.jsonl",)


@pytest.mark.parametrize(
    ("starts", "merged", "expected"),
    [
        ({}, "b c", "out/a-hf"),
        ({"b": "pivot", "c": "pivot"}, "b c", "pivot"),
        ({"c": "pivot"}, "b c", "pivot"),
        ({"d": "b"}, "c d", "out/a-hf"),
        ({"c": "b", "d": "b"}, "c d", "out/b-hf"),
        ({}, "a b", "pivot"),
    ],
)
def test_the_base_of_a_merge(folder, plain, starts, merged, expected):
    """What all of its models were trained from last: a and, usually from it, b, c and d."""
    train = [{"name": "a", "method": "sft"}]
    train += [{"name": name, "method": "infifpo"} for name in "bcd"]
    train = [one | ({"start": starts[n]} if (n := one["name"]) in starts else {}) for one in train]
    plain.training.update(dict.fromkeys("abcd", ()))
    run = base(train=train, merge=[{"name": "m", "models": merged.split(), "method": "linear"}])
    stages = {stage.name: stage for stage in stages_of(Plan(run, plain))}
    assert f"--base {expected} --models" in str(stages["merge-m"].job)
    assert stages["merge-m"].inputs == (("pivot",) if expected == "pivot" else ())
    assert all(name in stages for name in stages["merge-m"].after)


def test_all_commands_read_their_words(folder, plain):
    run = read_run("run.yaml")
    check_words(run, stages_of(Plan(run, plain)), "run.yaml")


def test_a_flag_that_is_none(folder, plain):
    text = (folder / "run.yaml").read_text().replace("clip-grad: 0.5", "clip-gradient: 0.5")
    (folder / "run.yaml").write_text(text)
    run = read_run("run.yaml")
    said = r"run.yaml:10: train\[1\].flags: the stage infifpo: .*--clip-gradient"
    with pytest.raises(UserError, match=said):
        check_words(run, stages_of(Plan(run, plain)), "run.yaml")


@pytest.fixture
def eight_gpus(folder, monkeypatch):
    """Let the pivot be a published model, by name, on eight GPUs."""
    from megatron_infifpo.families import PUBLISHED, megatron_args
    from megatron_infifpo.run import layouts

    monkeypatch.setattr(layouts, "count_gpus", lambda: 8)
    tiny.save_model(folder / "qwen", "qwen2", seed=1)
    real = layouts._architecture

    def with_pivot(name: str) -> None:
        known = megatron_args(PUBLISHED[name])
        monkeypatch.setattr(
            layouts, "_architecture", lambda model: known if model == "pivot" else real(model)
        )

    return with_pivot


def test_layouts_with_experts_are_planned(eight_gpus):
    """61 GB of weights, but for a tenth experts, over two ranks that compute a row together."""
    eight_gpus("qwen3-30b-a3b")
    found = choose_layouts(base(precision="bf16", train=[{"method": "infifpo"}]))
    assert found.scoring["pivot"] == Layout(tensor=2, expert=2)
    given = {"pivot": {"model": "pivot", "layout": {"tensor": 4, "expert": 4}}}
    run = base(precision="bf16", train=[{"method": "infifpo"}], **given)
    words = lines(run, choose_layouts(run))
    assert "--expert-model-parallel-size 4" in words["score-pivot"]


def test_layouts_are_planned(eight_gpus):
    """On eight GPUs a 14B model gets a layout that fits; a small source one GPU."""
    eight_gpus("phi-4")
    run = base(precision="bf16", train=[{"method": "infifpo"}])
    found = choose_layouts(run)
    words = found.training["infifpo"]
    assert "--tensor-model-parallel-size" in words or "--pipeline-model-parallel-size" in words
    assert found.scoring == {"pivot": Layout(), "qwen": Layout()}
    small = base(
        precision="bf16", train=[{"method": "infifpo"}], cluster={"ranks": 1, "gpu_memory": 24}
    )
    with pytest.raises(UserError, match="training infifpo: nothing fits 1 GPUs of 24 GiB"):
        choose_layouts(small)
    one = {"cluster": {"ranks": 1, "gpu_memory": 80}, "precision": "bf16"}
    with pytest.raises(UserError, match="training infifpo: nothing fits 1 GPUs of 80 GiB"):
        choose_layouts(base(train=[{"method": "infifpo"}], **one))
    adapters = base(train=[{"method": "infifpo", "lora_rank": 16}], **one)
    assert choose_layouts(adapters).training["infifpo"]


def test_paths(folder):
    names = Names(folder)
    assert names.logprobs("heldout", "a") == folder / "logprobs/heldout/a"
