"""Ours against numbers recorded from the released CoDet; `python benchmarks/parity.py` prints the differences."""

import pytest
import torch
from reference_data import needs

from benchmarks import manifests, parity

pytestmark = needs("parity")


@pytest.mark.parametrize("pack", parity.PACK_FUNCTIONS)
def test_small_packs_are_reproduced(pack: str) -> None:
    rows = parity.compare_pack(pack)
    assert rows
    assert [row for row in rows if not row.within] == []


@pytest.mark.slow
@pytest.mark.parametrize("pack", parity.FULL_FUNCTIONS)
def test_full_size_models_are_reproduced(pack: str) -> None:
    rows = parity.compare_pack(pack)
    assert rows
    assert [row for row in rows if not row.within] == []


def test_a_difference_beyond_the_tolerance_is_noticed() -> None:
    pairs = [("near", 1.00005, 1.0), ("far", 1.001, 1.0), ("shape", torch.ones(2), torch.ones(3))]
    assert [row.within for row in parity.compare(pairs, 1e-4, 1e-5)] == [True, False, False]


def test_every_released_tensor_is_used_or_ignored_for_a_reason() -> None:
    found = manifests.accounts()
    assert len([name for name in found if name.startswith("codet_")]) == 5
    for account in found.values():
        assert (account.unaccounted, account.missing) == ((), ())
        assert all(account.ignored.values())
