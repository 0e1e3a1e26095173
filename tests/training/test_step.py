"""The loss of a step over a row of lists: what is counted, and what counts as NaN."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megatron_infifpo.training.step as training_step
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from support.list_rows import DOMAINS, SOURCES, list_row


@pytest.fixture
def step(monkeypatch) -> training_step.TrainingStep:
    monkeypatch.setattr(training_step, "current_step", lambda: 3)
    monkeypatch.setattr(training_step, "pairs_seen", lambda: 24)
    tokens = SimpleNamespace(ids=lambda i: f"record-{i}", prefix="data")
    data: Any = SimpleNamespace(source_names=SOURCES, domains=DOMAINS, tokens=tokens, targets=None)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(method=resolve("fuserlhf")),
        schedule=SimpleNamespace(total=80),
        conduct=SimpleNamespace(check_for_nan=True),
        folders=SimpleNamespace(save=None),
    )
    datasets: Any = SimpleNamespace(train=data, valid=None)
    return training_step.TrainingStep(run, datasets)


def row_of_a_step() -> tuple[dict[str, Any], torch.Tensor]:
    """A row, and log-probs of its scored tokens; stored values of absent responses are NaN."""
    row = list_row(filler=float("nan")) | {"ends_step": True}
    counts = row["token_counts"]
    row["segment_ids"] = torch.arange(counts.numel()).repeat_interleave(counts.flatten())
    return row, -torch.linspace(0.1, 2, int(counts.sum())).requires_grad_()


def test_absent_responses_are_neither_counted_nor_nan(step):
    row, logprobs = row_of_a_step()
    loss, count, metrics = step.loss(row, logprobs)
    assert count.item() == 4, "prompts, not responses"
    assert loss.isfinite() and all(value.isfinite().all() for value in metrics.values())
    (grad,) = torch.autograd.grad(loss, logprobs)
    last = int(row["token_counts"][3].sum())
    assert (grad[:-last] != 0).all() and (grad[-last:] == 0).all(), "of one there is no comparison"


def test_nan_of_a_response_that_is_there_stops_the_step(step):
    row, logprobs = row_of_a_step()
    second = int(row["token_counts"][0].sum())
    broken = logprobs.detach().clone()
    broken[second] = torch.nan
    with pytest.raises(UserError, match="of the records 'record-1' in data are NaN or infinite"):
        step.loss(row, broken)
