"""Links between GPUs where nvidia-smi can be asked: torch's names for GPUs are nvidia-smi's."""

from __future__ import annotations

import pytest
import torch

from triloom.gpu_links import KINDS, ask, by_uuid, read_uuids, visible_gpus

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_the_gpus_that_torch_sees_are_among_those_of_nvidia_smi() -> None:
    listed = read_uuids(ask("-L"))
    if not listed:
        pytest.skip("nvidia-smi is not there, or lists nothing")
    seen = visible_gpus()
    assert len(set(seen)) == torch.cuda.device_count() and set(seen) <= set(listed.values())


def test_every_pair_has_a_link() -> None:
    seen = visible_gpus()
    if len(seen) < 2:
        pytest.skip("one GPU")
    links = by_uuid(ask("topo", "-m"), ask("-L"))
    kinds = [links[" ".join(sorted((a, b)))] for a in seen for b in seen if a < b]
    assert all(kind.rstrip("0123456789") in KINDS for kind in kinds)
