"""A hang, a crash or a failure in one group of checks hides none of the others."""

import dataclasses
import json
import os
import time

import pytest

from megatron_infifpo.gpu_check import processes
from megatron_infifpo.gpu_check.records import (
    FAILED,
    MEASURED,
    PASSED,
    SKIPPED,
    Check,
    Options,
    Result,
    read_checks,
)
from megatron_infifpo.gpu_check.report import table, write_json
from megatron_infifpo.gpu_check.runner import Group, Outcome, run_groups
from support import check_groups


def group(name: str, seconds: float = 60.0, *, alone: bool = False) -> Group:
    return Group(name, f"support.check_groups:{name}", seconds, alone)


def run(tmp_path, *names: str | Group, **options) -> Outcome:
    given = Options("cpu", True, 0, ("tiny",), str(tmp_path), 0.0)
    groups = [group(name) if isinstance(name, str) else name for name in names]
    return run_groups(groups, given, first=options.pop("first", None), **options)


def statuses(outcome: Outcome) -> dict[tuple[str, str], str]:
    return {(check.group, check.name): check.status for check in outcome.checks}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_hang_is_ended_with_all_that_it_started(tmp_path):
    start = time.monotonic()
    outcome = run(tmp_path, group("hang", 4.0), "good")
    assert time.monotonic() - start < 60
    assert statuses(outcome) == {
        ("hang", "before"): PASSED,
        ("hang", "runs to its end"): FAILED,
        ("good", "first"): PASSED,
        ("good", "second"): SKIPPED,
    }
    assert outcome.checks[1].note == "did not end within 4 s"
    assert outcome.exit_code == 1
    child = int((tmp_path / "hang" / "scratch" / "child").read_text())
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


@pytest.mark.parametrize(
    "name, said", [("crash", "exit code -11"), ("raise_error", "(exit code 1)")]
)
def test_a_crash_is_a_failed_check(tmp_path, name, said):
    outcome = run(tmp_path, name, "good")
    assert outcome.exit_code == 1
    (failed,) = [check for check in outcome.checks if check.status == FAILED]
    assert (failed.group, failed.name) == (name, "runs to its end")
    assert said in failed.note
    assert statuses(outcome)["good", "first"] == PASSED
    if name == "raise_error":
        assert "ValueError: three words only" in outcome.logs[name]


def test_failures_do_not_end_a_group(tmp_path):
    outcome = run(tmp_path, "failing")
    found = {check.name: check for check in outcome.checks}
    assert {name: check.status for name, check in found.items()} == {
        "good": PASSED,
        "bad": FAILED,
        "not a number": FAILED,
        "broken": FAILED,
        "fast": PASSED,
        "slow": FAILED,
        "figure": MEASURED,
    }
    assert found["broken"].note == "RuntimeError: kernel does not exist"
    assert "kernel does not exist" in outcome.logs["failing"]
    assert found["good"].seconds >= 0 and found["good"].peak_mib > 0


def test_groups_come_in_their_order_whoever_runs_alone(tmp_path):
    outcome = run(tmp_path, group("failing", alone=True), "good")
    assert [check.group for check in outcome.checks] == ["failing"] * 7 + ["good"] * 2


@pytest.mark.parametrize("first", ["unusable", "crash"])
def test_nothing_runs_where_cuda_cannot_be_used(tmp_path, first):
    outcome = run(tmp_path, "good", first=group(first))
    assert outcome.exit_code == 2
    assert {check.group for check in outcome.checks} <= {first}
    assert "asleep" in str(outcome.unusable) or "exit code -11" in str(outcome.unusable)


def test_groups_learn_how_many_devices_there_are(tmp_path):
    outcome = run(tmp_path, "good", first=group("usable"))
    assert outcome.exit_code == 0
    assert outcome.facts == {"driver": "1.2"}
    result = json.loads((tmp_path / "good" / "rank0.json").read_text())
    assert result == {"devices": 3}


def test_nothing_checked_is_no_success():
    assert Outcome().exit_code == 1


def test_the_file_is_json_for_everyone(tmp_path):
    outcome = run(tmp_path, "failing")
    outcome.checks.append(Check("more", "infinite", MEASURED, value=float("inf")))
    write_json(tmp_path / "report.json", outcome, ["gpu_check.py", "--quick"])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert report["exit_code"] == 1 and report["command"] == ["gpu_check.py", "--quick"]
    assert len(report["checks"]) == 8
    assert report["checks"][2]["value"] is None and "value nan" in report["checks"][2]["note"]
    assert set(report["seconds"]) == {"failing"}


def test_the_table_shows_errors_limits_and_reasons():
    checks = [
        Check("head", "forward", PASSED, 0.00012345, 0.001, "nats", False, 1.5, 300.0, "quiet"),
        Check("head", "speed", FAILED, 2.0, 3.0, "ratio", True, note="too slow"),
        Check("waits", "steps", SKIPPED, note="no GPU"),
    ]
    lines = table(checks).splitlines()
    assert lines[1] == "head" and lines[4] == "waits"
    assert lines[2].split() == ["forward", "0.000123", "0.001", "nats", "1.50", "300", "passed"]
    assert lines[3].split()[:4] == ["speed", "2", ">=3", "ratio"]
    assert lines[3].endswith("failed: too slow") and lines[5].endswith("skipped: no GPU")
    ends = {line.index(word) for line, word in zip(lines[2:4], ("passed", "failed"), strict=True)}
    assert len(ends) == 1, "columns are aligned"


def test_the_worst_variant_is_the_nearest_to_its_limit():
    result = Result()
    for value, limit, note in ((0.2, 1.0, "a"), (0.05, 0.1, "b"), (0.4, 1.0, "c")):
        result.worst(value, limit, note)
    assert (result.value, result.limit, result.note) == (0.05, 0.1, "b")
    result.worst(float("nan"), 1.0, "d")
    assert result.note == "d"


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "checks.jsonl"
    line = json.dumps(dataclasses.asdict(Check("g", "n", PASSED)))
    path.write_text(f"{line}\n{line[:20]}")
    assert read_checks(path) == [Check("g", "n", PASSED)]
    assert read_checks(tmp_path / "missing") == []


def test_ranks_are_told_who_they_are(tmp_path):
    target = f"{check_groups.__name__}:rank"
    found = processes.run(target, {}, tmp_path / "two", seconds=60, ranks=2)
    assert found == [{"rank": 0, "world": 2}, {"rank": 1, "world": 2}]
    (alone,) = processes.run(target, {}, tmp_path / "one", seconds=60)
    assert alone["world"] == int(os.environ.get("WORLD_SIZE", "1"))


def test_a_failed_rank_ends_the_others_and_is_named(tmp_path):
    start = time.monotonic()
    with pytest.raises(processes.ProcessFailure, match="rank 1: ValueError: rank of no use"):
        processes.run("support.check_groups:rank", {"bad": 1}, tmp_path, seconds=120, ranks=2)
    assert time.monotonic() - start < 60
