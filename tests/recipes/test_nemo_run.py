"""nemo-run recipes: a dry run shows the command line of its stage, on the ranks that it needs."""

import io

import pytest

from support.stage_commands import FUSION, GOLDEN

pytest.importorskip("nemo_run", reason="nemo-run is not installed")

import rich  # noqa: E402
from nemo_run.core.frontend.console.api import CONSOLE  # noqa: E402

from megatron_infifpo.commands.main import run_command
from megatron_infifpo.recipes import commands, tasks  # noqa: E402

SLURM = ["--executor", "slurm", "--nodes", "2", "--dry-run", "slurm.account=tests", "run=run"]


@pytest.fixture
def dry_run(run_folder, monkeypatch, capsys):
    """What `infifpo launch NAME ... --dry-run` prints, on one line a job."""
    monkeypatch.setenv("NEMORUN_HOME", str(run_folder.parent / "nemo"))
    for console in (CONSOLE, rich.get_console()):
        monkeypatch.setattr(console, "_width", 2000)  # no line is broken
    monkeypatch.setattr("sys.stdin", io.StringIO())  # which nemo-run hands to its helpers

    def show(*words: str) -> list[str]:
        run_command("launch", list(words))
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return show


@pytest.mark.parametrize(("stage", "options"), [*GOLDEN, *list(FUSION)[::3]])
def test_stage(dry_run, stage, options):
    lines = dry_run(stage, *SLURM, *options.split())
    command = [line for line in lines if (GOLDEN | FUSION)[stage, options] in line]
    assert len(command) == 1 and command[0].startswith("srun"), lines
    size = (2, 8) if stage in ("score", "sft", "infifpo") else (1, 1)
    assert f"#SBATCH --nodes={size[0]}" in lines
    assert f"#SBATCH --ntasks-per-node={size[1]}" in lines
    assert f"#SBATCH --gpus-per-node={size[1]}" in lines


def test_baselines(dry_run):
    lines = dry_run("baselines", *SLURM)
    for method in ("dpo", "ipo", "wrpo", "infifpo-ipo", "infifpo-wrpo"):
        expected = GOLDEN["infifpo", "method=infifpo beta=2.5"].replace("--beta 2.5 ", "")
        expected = expected.replace("--method infifpo ", f"--method {method} ")
        expected = expected.replace("run/infifpo", f"run/{method}")
        assert [expected in line for line in lines].count(True) == 1, lines


def test_pipeline(dry_run):
    printed = "\n".join(dry_run("pipeline", *SLURM, "beta=2.5"))
    for command in GOLDEN.values():
        assert command in printed


def test_fusion(dry_run):
    """Every stage; five sources are scored with the pivot, fused, trained, exported, and merged."""
    printed = "\n".join(dry_run("fusion", *SLURM))
    for command in FUSION.values():
        assert command in printed
    tasks = [line.split(" infifpo ")[-1] for line in printed.splitlines() if "-m megatron" in line]
    assert len(tasks) == 6 + 3 * (1 + 1 + 5) + 1


def test_what_waits_for_what(run_folder):
    """A stage waits for whatever writes a file that it names."""
    stages = tasks.fusion_stages("hf", {"run": "run"})
    made: dict[str, str] = {}
    for job, after in stages:
        words = job.arguments
        first = words.index("--save" if "--save" in words else "--output")
        needs = {made[word] for i, word in enumerate(words) if word in made and i != first + 1}
        if words[0] == "fuse-targets":
            needs = {job.name for job, _ in stages if job.arguments[0] == "score"}
        assert set(after) == needs, job.name
        made[words[first + 1]] = job.name
    assert len(made) == len(stages), "no two write the same"


def test_local(dry_run):
    lines = dry_run("sft", "--executor", "local", "--ranks", "2", "--dry-run", "run=run")
    assert any("torchrun" in line for line in lines), lines


def test_words_with_spaces(dry_run, run_folder):
    """A shell reads them under SLURM, and none here."""
    run_folder.rename("my run")
    words = ("export", "run=my run", "method=it's", "--dry-run")
    expected = "--load 'my run/it'\"'\"'s' --save 'my run/it'\"'\"'s-hf'"
    mounts = ("slurm.account=tests", "slurm.container=an image", "slurm.mounts=/a b,/c")
    lines = dry_run(*words, "--executor", "slurm", *mounts)
    (line,) = (line for line in lines if line.startswith("srun --output"))
    assert line.endswith(expected)
    assert "--container-image 'an image'" in line and "'/a b',/c," in line
    job = commands.export("my run", "it's")
    assert tasks.task(job).to_command(is_local=True) == list(job.python_words)
