"""infifpo report: one page with pictures, from a real run."""

import base64
import re

import pytest

from megatron_infifpo.commands.main import run_command
from support.runs import BOTH


@pytest.fixture(scope="module")
def run(setup, ranks, tmp_path_factory):
    """Six steps, and the trained pivot's log-probs."""
    folder = tmp_path_factory.mktemp("report") / "run"
    flags = ["--train-iters", "6", "--save", str(folder), "--save-interval", "6"]
    tensorboard = ["--tensorboard-dir", str(folder / "tensorboard")]
    tensorboard += ["--tensorboard-log-interval", "1"]
    ranks(
        2,
        "support.training:train",
        setup.flags(setup.sources("both", *BOTH), *flags, *tensorboard),
    )
    score = ["--backend", "megatron", "--model", str(folder), "--input", str(setup.records)]
    ranks(1, "support.scoring:score", [*score, "--output", str(folder.parent / "trained")])
    return folder


@pytest.fixture
def report(run):
    def call(*flags: str) -> str:
        run_command("report", [str(run), *flags])
        return (run / "report.html").read_text()

    return call


def pictures(page: str) -> dict[str, bytes]:
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    return {name: base64.b64decode(data) for name, data in found}


def test_page(report, run):
    page = report()
    assert "http" not in page, "nothing from a network"
    images = pictures(page)
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in images.values())
    assert {"loss, accuracy and margin over steps", "sources over steps"} <= images.keys()
    assert {"selected sources at step 0", "agreement between models"} <= images.keys()
    assert "selected sources after training" not in images
    for text in ("qwen", "phi", "max-margin, clipped", "The hardest pairs"):
        assert text in page
    assert "vs samples" not in page
    assert "Provenance" in page and "revision" in page


def test_after_training(report, run):
    page = report("--trained", str(run.parent / "trained"), "--shown", "3")
    assert "selected sources after training" in pictures(page)
    assert page.count("margin changed by") == 3


def test_numbers(setup, run):
    """Losses and shares at step 0 are those that training logged."""
    from megatron_infifpo.report.collect import method_of, read_curves, read_pairs
    from megatron_infifpo.training.provenance import read_run

    found = read_run(run)
    assert found is not None
    files = found["attempts"][-1]["files"]
    data, sources = files["preference_data"], files["preference_sources"]
    pairs = read_pairs(data, sources, method_of(found), 256, None)
    assert pairs.means.shape == (20, 2, 3)
    assert pairs.selected is not None
    assert pairs.selected.sum(axis=2) == pytest.approx(1)
    curves = read_curves(run / "tensorboard")
    steps, values, _ = curves["loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    # The first step sees eight of the twenty pairs at step 0.
    assert pairs.losses.min() <= values[0] <= pairs.losses.max()


def test_texts_are_escaped():
    from megatron_infifpo.report.html import Page

    page = Page("<b>")
    page.details("<script>", {"<i>": "</pre><script>alert(1)</script>"})
    page.table({"<a>": "<td>"})
    assert "<script>alert" not in page.render() and "<td><td>" not in page.render()


def test_no_run(tmp_path):
    from megatron_infifpo.errors import UserError

    with pytest.raises(UserError, match="has no run.json"):
        run_command("report", [str(tmp_path)])
