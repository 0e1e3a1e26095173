"""Command lines of the stages: what sbatch scripts and nemo-run start, word for word."""

import shlex

import pytest

from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError
from megatron_infifpo.ranks import ranks_from_srun
from megatron_infifpo.recipes.commands import STAGES
from megatron_infifpo.recipes.options import read_options, spread
from support.launcher import ROOT
from support.stage_commands import FUSION, GOLDEN, SHARED_ROWS

COMMANDS = GOLDEN | FUSION | SHARED_ROWS


def parse(stage: str, options: str):
    """The job that tools/launch.py starts for such options."""
    read = read_options(stage, ["run=run", *options.split()])
    return STAGES[stage](**read)


@pytest.mark.parametrize(("stage", "options"), COMMANDS)
def test_golden(run_folder, stage, options):
    job = parse(stage, options)
    assert " ".join(job.arguments) == COMMANDS[stage, options]
    assert job.every_rank == (stage in ("score", "sft", "infifpo"))


@pytest.mark.parametrize(
    ("stage", "options"), [key for key in COMMANDS if COMMANDS[key].startswith("train")]
)
def test_training_flags_exist(run_folder, stage, options):
    """Megatron's parser takes every word."""
    from megatron_infifpo.training.config import run_parser

    args = run_parser().parse_args(parse(stage, options).arguments[1:])
    assert args.exit_signal_handler and args.micro_batch_tokens == 8192


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("score", "index=6", "has 5 sources, but index is 6"),
        (
            "infifpo",
            "betta=1",
            "betta=1: expected NAME=VALUE, NAME one of run, method, index",
        ),
        ("infifpo", "epochs=two", "epochs=two: expected a whole number of at least 1"),
        ("infifpo", "tensor=true", "tensor=true: expected a whole number"),
        ("infifpo", "epochs=0", "epochs=0: expected a whole number of at least 1"),
        ("score", "index=-1", "index=-1: expected a whole number of at least 0"),
        ("infifpo", "lr=nan", "lr=nan: expected a number above 0"),
        ("infifpo", "lr=0", "lr=0: expected a number above 0"),
        ("infifpo", "beta=[", "beta=.: expected a number above 0"),
        ("infifpo", "bf16=3", "bf16=3: expected true or false"),
    ],
)
def test_refused(run_folder, stage, options, message):
    with pytest.raises(UserError, match=message):
        parse(stage, options)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("sft", "method=fusechat index=6", "has 5 sources, but index is 6: expected 0 .all of"),
        ("fuse", "index=7", "fusion/sources.yaml has 5 sources, but index is 7"),
        ("fuse", "method=dpo", "method=dpo reads no soft targets, expected one of fusellm, fuse"),
        ("sft", "index=1", "index=1 has no effect with method=sft: it fuses no tokens"),
        ("infifpo", "index=1", "index=1 has no effect with method=infifpo"),
    ],
)
def test_refused_of_tokens(run_folder, stage, options, message):
    with pytest.raises(UserError, match=message):
        parse(stage, options)


def test_ambiguous_ids(run_folder):
    words = parse("fuse", "ambiguous=group").arguments
    assert words[-2:] == ("--ambiguous", "group") and words[:-2] == parse("fuse", "").arguments


def test_the_link_is_missing(run_folder):
    """What the message says to type is what mends it."""
    import subprocess

    before = parse("score", "split=sft index=1")
    (run_folder / "fusion" / "sources.yaml").unlink()
    (run_folder / "fusion").rmdir()
    for stage, options in [("score", "split=sft"), ("fuse", ""), ("merge", "")]:
        with pytest.raises(UserError, match="run/fusion/sources.yaml is missing, expected") as e:
            parse(stage, options)
    subprocess.run(["bash", "-c", str(e.value).partition("beside it: ")[2]], check=True)
    assert parse("score", "split=sft index=1") == before
    assert parse("score", "index=1").arguments[-1] == "run/logprobs/qwen2.5-14b"


def test_several_flags_and_an_open_quote(run_folder):
    words = spread(["train", "--options=tensor=1 'flags=--a \"b c\" --d'", "tensor=2"])
    assert words == ["train", "tensor=1", 'flags=--a "b c" --d', "tensor=2"]
    assert spread(["--options", "a=1 b=2"]) == ["a=1", "b=2"]
    read = read_options("sft", ["run=run", *words[1:]])
    assert read["tensor"] == 2 and STAGES["sft"](**read).arguments[-3:] == ("--a", "b c", "--d")
    for stage in ("sft", "score", "prepare"):
        with pytest.raises(UserError, match='flags=--a "b: No closing quotation, expected words'):
            STAGES[stage](run="run", flags='--a "b')
    with pytest.raises(UserError, match="--options=a 'b: No closing quotation"):
        spread(["--options=a 'b"])


def test_the_options_of_jobs(run_folder):
    """What job.sh makes of strings and of arrays, read as launch.py reads it."""
    import subprocess

    values = """A='x=1 flags="--a b"'; B=(y=2 flags="--c 'd e'" z=); C=; """
    job = (ROOT / "examples" / "slurm" / "job.sh").read_text()
    function = job[job.index("options() {") : job.index("# Run a stage on")]
    printed = subprocess.check_output(
        ["bash", "-c", f"{function}{values} options A B C"], text=True
    )
    found = spread([f"--options={printed}"])
    assert found == ["x=1", "flags=--a b", "y=2", "flags=--c 'd e'", "z="]


def test_experts(run_folder):
    flag = ("--expert-model-parallel-size", "8")
    for stage in ("sft", "infifpo", "score"):
        found = " ".join(STAGES[stage](run="run", expert=8).arguments)
        assert " ".join(flag) in found
        assert flag[0] not in " ".join(STAGES[stage](run="run").arguments)


def test_the_pivots_template(run_folder):
    words = "--chat-template-options '{\"enable_thinking\": false}'"
    for stage in ("prepare", "score"):
        found = STAGES[stage](run="run", flags=words).arguments
        assert found[-2:] == ("--chat-template-options", '{"enable_thinking": false}')


def test_flags_of_a_source(run_folder):
    (run_folder / "sources.yaml").write_text(
        "initial: i\nsources: [{name: a, logprobs: a, score: {model: m, backend: transformers, "
        "bf16: false, over-context: cut, trust-remote-code: true, context-length: 512, "
        "stop: [x, 3], chat-template-options: {enable_thinking: false, date: '26 Jul'}}}]"
    )
    flags = parse("score", "index=1").arguments[1:]
    assert flags[:-6] == (
        "--backend", "transformers", "--model", "m", "--over-context", "cut", "--trust-remote-code",
        "--context-length", "512", "--stop", "x", "3",
        "--chat-template-options", '{"enable_thinking": false, "date": "26 Jul"}',
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["--pair-weights agreement", "--pair-weights=best-source"])
def test_weights_of_pairs(run_folder, flag):
    """SFT reads sources for them alone, of its own half; other methods have theirs anyway."""
    data = ["--preference-data", "run/data/sft"]
    plain = STAGES["sft"](run="run", flags="--seed 3").arguments
    assert list(plain[3:5]) == data and "--preference-sources" not in plain
    weighed = STAGES["sft"](run="run", flags=flag).arguments
    assert list(weighed[3:7]) == [*data, "--preference-sources", "run/fusion/sources.yaml"]
    assert weighed[-len(flag.split()) :] == tuple(flag.split())
    pairs = STAGES["infifpo"](run="run", method="dpo", flags=flag).arguments
    assert pairs.count("--preference-sources") == 1 and "run/sources.yaml" in pairs


@pytest.mark.parametrize("words", [["slurm.time=1"], ["--nodes", "2"], ["--detach"]])
def test_options_without_effect(run_folder, words):
    with pytest.raises(UserError, match="has no effect here: choose an --executor"):
        run_command("launch", ["sft", "--dry-run", *words])


def test_shown_as_a_shell_takes_it(run_folder):
    job = parse("sft", "")
    assert shlex.split(str(job)) == ["infifpo", *job.arguments]


STEP = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_JOB_ID": "7",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[03-05,7]", "SLURM_NODEID": "1",
}  # fmt: skip


def ranks(**changes: str) -> dict[str, str]:
    """What a rank of a step gets beside what SLURM says."""
    environment = STEP | changes
    given = dict(environment)
    ranks_from_srun(environment)
    return {k: v for k, v in environment.items() if given.get(k) != v}


def test_ranks_from_srun():
    expected = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    found = ranks()
    assert 12000 <= int(found.pop("MASTER_PORT")) < 32768, "below what systems give away"
    assert found == expected | {"MASTER_ADDR": "node03"}, "srun may run on a login node"
    assert "MASTER_ADDR" not in ranks(MASTER_ADDR="ib0"), "the user's own"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"), ("a-1.site,b-2", "a-1.site"), ("n[08-10],m1", "n08"),
        ("gpu-[12,3-4]-ib", "gpu-12-ib"), ("rack[1-2]n[05,7],x", "rack1n05"),
    ],
)  # fmt: skip
def test_the_first_node(nodes, first):
    assert ranks(SLURM_STEP_NODELIST=nodes)["MASTER_ADDR"] == first


def test_nodes_with_different_numbers_of_tasks():
    found = [
        ranks(SLURM_STEP_TASKS_PER_NODE="8,4(x2),1", SLURM_NODEID=str(node))["LOCAL_WORLD_SIZE"]
        for node in range(4)
    ]
    assert found == ["8", "4", "4", "1"]


def test_jobs_have_ports_of_their_own():
    def port(job: int, step: int = 0) -> str:
        return ranks(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))["MASTER_PORT"]

    assert len({port(40_000 + job) for job in range(4000)}) == 4000
    assert len({port(40_000 + job, step) for job in range(100) for step in range(16)}) == 1600


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"},  # a batch script
        STEP | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun under srun
        {},
    ],
)
def test_no_ranks_of_srun(environment):
    given = dict(environment)
    ranks_from_srun(given)
    assert given == environment
