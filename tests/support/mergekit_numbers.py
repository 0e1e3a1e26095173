"""What mergekit 0.1.5 makes of one tensor of three models, bit for bit; none of its code is here.

Made once by its `merge_tensors`, and in float32 by its program on four folders, too, with the same
numbers. Where changes add up to zero, the bits of a data type say which sign wins.
"""

from dataclasses import dataclass
from typing import Any

import torch

BASE = [0.5, -0.25, 1.5, 0.125, -2.0, 0.75, 0.0, 3.0, -0.5, 1.0]
STEPS = [
    [3, -1, 4, 1, -5, 9, 2, -6, 5, 3],
    [5, 8, -9, 7, 9, -3, 2, 3, -8, 4],
    [-6, 2, 6, -4, 3, 3, 8, 3, 2, -7],
]
"""What each model has moved from the base, in tenths."""


@dataclass(frozen=True)
class Case:
    """A method with its options, and the merged tensor."""

    method: str
    options: dict[str, Any]
    float32: list[float]
    float64: list[float]


CASES = {
    # merge_method: sce, select_topk: 1.0
    "sce of all": Case(
        "sce", {"select_top": 1.0},
        [0.9320197105407715, 0.3280564546585083, 2.0065462589263916, 0.6210590600967407,
         -1.3219435214996338, 1.330361247062683, 0.36757397651672363, 3.299999952316284,
         -1.2999999523162842, 0.30000001192092896],
        [0.9320197044334976, 0.3280564263322885, 2.006546275395034, 0.6210591133004926,
         -1.3219435736677116, 1.3303611738148984, 0.3675739644970415, 2.4,
         -1.3, 0.29999999999999993],
    ),
    # merge_method: sce, select_topk: 0.3
    "sce": Case(
        "sce", {"select_top": 0.3},
        [0.5, -0.25, 1.9852173328399658, 0.125, -1.206908941268921, 0.75, 0.0, 3.0,
         -1.2999999523162842, 1.0],
        [0.5, -0.25, 1.9852173913043478, 0.125, -1.206909090909091, 0.75, 0.0, 3.0,
         -1.2999999999999998, 1.0],
    ),
    # merge_method: linear, weight: 0.2, 0.5, 0.7
    "linear": Case(
        "linear", {"weights": [0.2, 0.5, 0.7]},
        [0.4214285910129547, 0.12142858654260635, 1.5357142686843872, 0.18928571045398712,
         -1.600000023841858, 0.9214285612106323, 0.5, 3.171428680419922,
         -0.6142857074737549, 0.8357142806053162],
        [0.42142857142857143, 0.12142857142857144, 1.5357142857142858, 0.1892857142857143,
         -1.5999999999999999, 0.9214285714285714, 0.5, 3.1714285714285713,
         -0.6142857142857143, 0.8357142857142857],
    ),
    # merge_method: task_arithmetic, weight: 0.2, -0.5, 0.7, normalize: false, lambda: 0.8
    "task arithmetic": Case(
        "task-arithmetic", {"weights": [0.2, -0.5, 0.7], "scale": 0.8},
        [0.01199999451637268, -0.4740000367164612, 2.259999990463257, -0.3630000054836273,
         -2.2720000743865967, 1.1820000410079956, 0.4000000059604645, 2.9519999027252197,
         0.012000024318695068, 0.4959999918937683],
        [0.0119999999999999, -0.47400000000000003, 2.2600000000000002, -0.363, -2.272, 1.182,
         0.39999999999999997, 2.952, 0.01200000000000001, 0.4960000000000001],
    ),
}  # fmt: skip


def models(dtype: torch.dtype) -> torch.Tensor:
    """The tensor of the base and of the three models, `[4, 10]`."""
    base = torch.tensor(BASE, dtype=dtype)
    return torch.stack([base, *(base + torch.tensor(STEPS, dtype=dtype) * 0.1)])
