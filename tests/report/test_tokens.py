"""infifpo report of a run on soft targets: what was fused, and what became of it."""

import html
import json
import re
from typing import Any

import pytest

from megatron_infifpo.checks.data import DataJob, check_data
from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.report.collect import read_curves
from megatron_infifpo.training.provenance import FORMAT
from support.token_job import TokenJob

METRICS = (
    "loss", "ce", "distance", "chunk", "taught", "share/a", "share/initial", "domain/math/loss",
    "domain/math/distance",
)  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = TokenJob(tmp_path_factory.mktemp("tokens"))
    job.fuse("mince", include_initial=True)
    job.fuse("values", fusion="none")
    return job


def write_run(job, method: str, targets: str | None) -> None:
    """A run's folder as training leaves it: what it is made of, and its curves."""
    from torch.utils.tensorboard import SummaryWriter

    data: dict[str, Any] = {"records_sha256": "r" * 64}
    files: dict[str, Any] = {"preference_data": str(job.data), "preference_sources": None}
    if targets is not None:
        fingerprint = SoftTargetStore(job.folder / targets).fingerprint
        data["soft_targets"] = {"targets_sha256": fingerprint, "sources": {}}
        files["soft_targets"] = str(job.folder / targets)
    attempt = {
        "started": "now", "iteration": "0", "files": files, "command": ["train"], "versions": {},
        "layout": {"world_size": 1}, "device": "x", "git_revision": None,
    }  # fmt: skip
    method_fields = resolve(method).describe()
    identity = {"method": method_fields, "seed": 1, "seq_length": 512, "data": data}
    run = FORMAT.fields | {"identity": identity, "attempts": [attempt]}
    (job.folder / "run.json").write_text(json.dumps(run | {"started_from": {"checkpoint": "x"}}))
    with SummaryWriter(str(job.folder / "tensorboard")) as writer:
        for step in (1, 2, 3):
            for place, tag in enumerate(METRICS):
                writer.add_scalar(tag, place + step / 8, step)


def report(folder) -> tuple[list[list[str]], set[str], str]:
    """Rows of all tables, what the pictures show, and the page's words."""
    run_command("report", [str(folder)])
    page = (folder / "report.html").read_text()
    rows = [
        [html.unescape(cell) for cell in re.findall(r"<t[dh]>([^<]*)</t[dh]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", page)
    ]
    words = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page)))
    return rows, set(re.findall(r'<img alt="([^"]+)"', page)), words


def test_page(job):
    write_run(job, "fusellm", "mince")
    rows, images, words = report(job.folder)
    assert {
        "loss and cross-entropy over steps", "by domain over steps", "sources over steps",
        "distance to the sources, and tokens with a target, over steps",
    } <= images  # fmt: skip
    for row in (
        ["objective", "fusellm"], ["--lm-weight", "0.9000"], ["--tail", "ghost"],
        ["--chunk-weight", "1.0000"],
        ["distance", "2.1250 at step 1, 2.3750 at step 3"],
        ["taught", "4.1250 at step 1, 4.3750 at step 3"],
        ["sources", "a, b, initial"], ["fusion", "mince"], ["ids a token", "4"],
        ["b", "outside its domains", "3"], ["b", "too long", "1"],
    ):  # fmt: skip
        assert row in rows, row
    assert "beta" not in words and "clipping" not in words and "chosen" not in words
    fingerprint = SoftTargetStore(job.folder / "mince").fingerprint
    assert ["soft targets", fingerprint[:12]] in rows
    heads = next(row for row in rows if row[:2] == ["domain", "source"])
    table = [dict(zip(heads, row, strict=True)) for row in rows if len(row) == len(heads)][1:]
    by = {(row["domain"], row["source"]): row for row in table}
    # Three domains with "all", three sources.
    assert [*by] == [
        (domain, source) for domain in ("text", "math", "all") for source in ("a", "b", "initial")
    ]
    lengths = job.tokens.scored_lengths[:, 0].tolist()
    # '201' alone is not comparable: one token of each response.
    assert by["all", "a"]["tokens"] == f"{sum(lengths)}" and by["all", "a"]["responses"] == "6"
    assert by["all", "a"]["comparable"] == f"{1 - 6 / sum(lengths):.2%}"
    assert by["text", "b"]["responses"] == "0" and by["text", "b"]["masked"] == "3"
    assert by["text", "b"]["comparable"] == by["text", "b"]["nats per byte"] == "-"
    assert by["all", "initial"]["comparable"] == "100.00%" and by["all", "b"]["masked"] == "4"
    assert re.fullmatch(r"\d\.\d{4}", by["math", "a"]["nats per byte"])
    wins = [float(by["all", name]["wins"].rstrip("%")) for name in ("a", "b", "initial")]
    shares = [w * n / 100 for w, n in zip(wins, (6, 2, 6), strict=True)]
    assert sum(shares) == pytest.approx(6, abs=1e-3), "each response has one winner"


def test_values_and_targets_that_are_gone(job):
    write_run(job, "infifusion", "values")
    rows, _, _ = report(job.folder)
    assert ["fusion", "none"] in rows and ["ambiguous ids", "-"] in rows
    assert ["--uld-weight", "1.5000"] in rows
    (job.folder / "values.json").rename(job.folder / "moved.json")
    rows, _, words = report(job.folder)
    assert "Not shown: " in words and "values.json" in words and ["fusion", "none"] not in rows
    (job.folder / "moved.json").rename(job.folder / "values.json")


def test_sft(job):
    """Nobody teaches it."""
    write_run(job, "sft", None)
    rows, _, words = report(job.folder)
    assert ["objective", "sft"] in rows and "What the sources could teach" not in words
    with pytest.raises(UserError, match="made without preference sources"):
        run_command("report", [str(job.folder), "--trained", "x"])


def test_a_real_run(setup, ranks, tmp_path):
    """What training logs of tokens is on its page, and check knows its targets."""
    folder = tmp_path / "run"
    flags = ["--save", str(folder), "--tensorboard-dir", str(folder / "tensorboard")]
    argv = setup.method_flags("fusellm", *flags, "--tensorboard-log-interval", "1")
    ranks(1, "support.training:train", argv)
    rows, images, _ = report(folder)
    curves = read_curves(folder / "tensorboard")
    for tag in ("loss", "ce", "distance", "chunk", "taught"):
        steps, values, _ = curves[tag]
        ends = f"{values[0]:.4f} at step {steps[0]}, {values[-1]:.4f} at step {steps[-1]}"
        assert [tag, ends] in rows
    assert "sources over steps" in images
    targets = argv[argv.index("--soft-targets") + 1]
    job = DataJob(str(setup.data), run=str(folder), soft_targets=targets)
    checks = {check.what: check for check in check_data(job)}
    assert checks[f"{folder}/run.json"].note == "1 attempts on these data"
