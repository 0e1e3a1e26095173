"""What tests cost: which ones `make test-fast` leaves out, and which files begin first.

Tests of SLURM, of Transformer Engine and of downloaded models are slow, and those of real ranks but
for a few. Of all others the slow ones are listed here. Names of tests are those that pytest prints,
or how they begin.
"""

from support.launcher import ROOT

LIMIT = 10.0
"""Seconds on an idle machine that a test may take without being slow, fixtures not counted."""

SLOW_FIXTURES = {"cluster", "gemma", "smollm2", "ranks", "te_zygotes"}

QUICK_ON_RANKS = (
    "tests/distributed/test_training.py::test_pivot_as_its_own_reference[tp1]",
    "tests/distributed/test_training.py::test_pivot_as_its_own_reference[tp2]",
    "tests/distributed/test_training.py::test_pivot_as_its_own_reference[pp2]",
    "tests/distributed/test_training.py::test_dpo_starts_at_ln_2[dp2]",
    "tests/distributed/test_training.py::test_packing_changes_nothing",
)
"""Tests of one or two ranks that are not slow, in one file: another would start a zygote anew."""

SLOW = (
    "tests/convert/test_memory.py",
    "tests/convert/test_merge.py::test_equals_mergekit_bit_by_bit",
    "tests/families/test_published_models.py::test_random_sizes_round_trip",
    "tests/fusing/test_fuse_targets.py::test_real_replies",
    "tests/fuzz/test_fuzz.py::test_damaged_files_are_refused",
    "tests/gpu/test_startup.py",
    "tests/gpu_check/test_gpu_check.py::test_families_on_transformer_engine",
    "tests/gpu_check/test_gpu_check.py::test_quick_on_a_cpu",
    "tests/integration/test_demo_data.py::test_specialist_reloads_with_the_same_ids_and_logits",
    "tests/integration/test_wheel.py",
    "tests/responses/test_evaluate.py::test_tasks_exist_in_the_harness",
    "tests/responses/test_evaluate.py::test_two_models_side_by_side",
    "tests/rounds/test_ends.py::test_ranks_of_torchrun",
    "tests/run/test_driver.py::test_killed_in_a_stage",
    "tests/run/test_nemo.py::test_experiment",
    "tests/study/test_whole_study.py",
)
"""Slow tests without ranks."""

FIRST = (
    "tests/slurm/test_jobs.py",
    "tests/distributed/test_training.py",
    "tests/slurm/test_fusion.py",
    "tests/integration/test_wheel.py",
    "tests/distributed/test_resume.py",
    "tests/slurm/test_recipes.py",
    "tests/distributed/test_soft_targets.py",
    "tests/slurm/test_rounds.py",
    "tests/distributed/test_flags_of_training.py",
    "tests/distributed/test_training_methods.py",
    "tests/distributed/test_soak.py",
    "tests/slurm/test_fuse.py",
    "tests/distributed/test_experts.py",
    "tests/rounds/test_rounds.py",
    "tests/distributed/test_rounds.py",
    "tests/distributed/test_lora.py",
    "tests/distributed/test_lora_peft.py",
    "tests/distributed/test_enumerable.py",
    "tests/responses/test_evaluate.py",
    "tests/study/test_whole_study.py",
    "tests/scoring/test_scoring_jobs.py",
    "tests/integration/test_fuse.py",
    "tests/integration/test_baselines.py",
    "tests/gpu/test_te_training.py",
    "tests/distributed/test_flags_at_work.py",
    "tests/gpu_check/test_gpu_check.py",
)
"""The longest files: two workers take whole files, and none must end alone.

Longest first, but those that start a SLURM are not beside each other: two at once are too much.
"""


def begins(name: str, starts: tuple[str, ...]) -> bool:
    """Whether a test's name begins with one of these, at a border of its parts."""
    return any(name == start or name.startswith((f"{start}::", f"{start}[")) for start in starts)


def is_slow(name: str, fixtures: set[str]) -> bool:
    """Whether `make test-fast` leaves out a test."""
    if begins(name, SLOW):
        return True
    return bool(fixtures & SLOW_FIXTURES) and not begins(name, QUICK_ON_RANKS)


def place(name: str) -> int:
    """Where in the order of files a test's file comes."""
    file = name.partition("::")[0]
    return FIRST.index(file) if file in FIRST else len(FIRST)


def unknown(names: list[str]) -> list[str]:
    """Entries of the lists above that no test has, but in files that skip themselves whole."""
    lost = [file for file in FIRST if not (ROOT / file).exists()]
    files = {name.partition("::")[0] for name in names}
    for start in (*SLOW, *QUICK_ON_RANKS):
        file = start.partition("::")[0]
        known = any(begins(name, (start,)) for name in names)
        if not known and (file in files or not (ROOT / file).exists()):
            lost.append(start)
    return lost
