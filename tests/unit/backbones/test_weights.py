"""Whether a backbone reads pretrained weights when it is built."""

import pytest
import torch
from tiny_backbones import COMPOSED

from spn4cir.backbones import build_backbone
from spn4cir.errors import InputError


@pytest.mark.parametrize("name", COMPOSED)
def test_only_the_architecture_is_built_where_a_checkpoint_follows(name: str) -> None:
    """The same names and shapes with other values; afterwards, and after a failure as well, weights are read again."""
    with pytest.raises(InputError):
        build_backbone(name, load_weights=False, model="no/such/model")
    first, alone, again = (build_backbone(name, load_weights=read).state_dict() for read in (True, False, True))
    assert {key: value.shape for key, value in alone.items()} == {key: value.shape for key, value in first.items()}
    frozen = [key for key in first if "patch_embedding.weight" in key or key.endswith("visual.conv1.weight")]
    assert frozen and all(torch.equal(first[key], again[key]) for key in frozen)
    assert not any(torch.equal(first[key], alone[key]) for key in frozen)
