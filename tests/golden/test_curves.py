"""Every method's losses and norms of gradients are those in the files beside this one."""

import json

import pytest

from megatron_infifpo.methods import METHODS
from support.golden import curve, path_of

# Relative. One machine gives the same bits again; other instructions and another number of threads
# moved them by 7e-6 in the eighth step.
TOLERANCE = 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_curve(setup, ranks, method):
    expected = json.loads(path_of(method).read_text(encoding="ascii"))
    found = curve(setup, ranks, method)
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
