"""docs/models.md says what the program does."""

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES, family, megatron_args, page
from support.launcher import ROOT


def test_page():
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert page.page() == written, "run: python -m megatron_infifpo.families.page > docs/models.md"


def test_types_are_those_that_people_use():
    assert len(page.TYPES) >= 62 and FAMILIES.keys() <= page.TYPES.keys()
    missing = [name for name, (_, why) in page.TYPES.items() if not why and not page.pivot(name)]
    assert not missing, "no reason why it is no pivot"


@pytest.mark.parametrize("name", page.TYPES)
def test_each_is_what_the_page_says(name):
    """Taken or refused by import, and known or not to transformers as a causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if page.pivot(name):
        assert family({"model_type": name}) is FAMILIES[name]
    else:
        with pytest.raises(UserError, match=f"model_type is '{name}', expected one of"):
            megatron_args({"model_type": name})
    source = page.source(name)
    if source == page.OWN_CODE:
        with pytest.raises(ValueError, match="Unrecognized model identifier"):
            AutoConfig.for_model(name)
    elif name not in FAMILIES:
        known = type(AutoConfig.for_model(name)) in AutoModelForCausalLM._model_mapping
        assert known == (source == page.TRANSFORMERS)
