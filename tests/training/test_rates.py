"""Learning rates of all steps, against closed forms; no step is at 0 by accident."""

import math

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.training.rates import Schedule, check_rates, rates


def schedule(**changed) -> Schedule:
    given = dict.fromkeys(
        "lr_decay_iters lr_decay_samples lr_warmup_fraction lr_wsd_decay_iters decoupled_lr "
        "lr_wsd_decay_samples train_samples".split()
    )
    given |= {"lr": 1e-3, "min_lr": 0.0, "lr_decay_style": "cosine", "lr_warmup_init": 0.0}
    given |= {"use_checkpoint_opt_param_scheduler": False}
    given |= {"lr_warmup_iters": 0, "lr_warmup_samples": 0, "lr_wsd_decay_style": "exponential"}
    return Schedule.read(given | {"train_iters": 20, "global_batch_size": 8} | changed)


def cosine(step: float, warm_up: float, steps: int) -> float:
    """Megatron's, of a peak of 1."""
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def test_warm_up_begins_above_zero():
    found = rates(schedule(lr_warmup_fraction=0.25), 0)
    expected = [0.2 + 0.8 * step / 5 for step in range(5)]
    expected += [cosine(step, 5, 20) for step in range(5, 20)]
    assert found == pytest.approx([1e-3 * rate for rate in expected])
    assert rates(schedule(lr_warmup_fraction=0.25), 12) == found[12:]


def test_by_samples():
    by_samples = {"train_iters": None, "train_samples": 167, "lr_warmup_samples": 40}
    found = rates(schedule(**by_samples), 0)
    expected = [0.2 + 0.8 * step / 5 for step in range(5)]
    expected += [cosine(8 * step, 40, 167) for step in range(5, 20)]
    assert found == pytest.approx([1e-3 * rate for rate in expected])


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("warm_up", [0.0, 0.1])
def test_short_runs_learn(style, steps, warm_up):
    short = schedule(
        lr_decay_style=style, train_iters=steps, lr_warmup_fraction=warm_up, lr_wsd_decay_iters=1
    )
    check_rates(short, 0)
    found = rates(short, 0)
    assert len(found) == steps and all(0 < rate <= 1e-3 for rate in found)
    if steps == 1:
        assert found == [1e-3]


@pytest.mark.parametrize(
    ("name", "value"), [("lr", math.nan), ("lr", math.inf), ("min_lr", math.nan)]
)
def test_no_numbers(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is .*, expected a finite"):
        check_rates(schedule(**{name: value}), 0)


def test_the_user_says_where_warm_up_begins():
    assert rates(schedule(lr_warmup_iters=4, lr_warmup_init=1e-5), 0)[0] == 1e-5


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"lr_decay_iters": 12}, "8 steps, from step 13 on, would be at learning rate 0"),
        (
            {"lr_decay_iters": 12, "use_checkpoint_opt_param_scheduler": True},
            "8 steps, .* take --override-opt-param-scheduler instead",
        ),
        ({"lr_warmup_iters": 20}, "warm-up takes 20 steps, and .* decayed after 20"),
        ({"lr": None}, "give --lr"),
    ],
)
def test_steps_that_move_nothing(changed, expected):
    with pytest.raises(UserError, match=expected):
        check_rates(schedule(**changed), 0)


def test_a_floor_and_a_wish():
    check_rates(schedule(lr_decay_iters=12, min_lr=1e-6), 0)
    with pytest.warns(UserWarning, match="--lr is 0: no step"):
        check_rates(schedule(lr=0.0), 0)
    with pytest.raises(UserError, match="3 steps, from step 18 on"):
        check_rates(schedule(lr_decay_iters=12), 17)
