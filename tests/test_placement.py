"""How many SAEs train together: no GPU idle while there are SAEs for it, then packs as large as pay and fit."""

import pytest

from raysae.placement import pack_size, place_trials

GB = 1e9


@pytest.mark.parametrize(
    ("saes", "gpus", "per_trial", "d_in", "d_sae", "memory", "size"),
    [
        ([8], 8, 1, 768, 6144, 80 * GB, 1),  # an SAE for each GPU, not eight for one
        ([3], 8, 1, 768, 6144, 80 * GB, 1),
        ([16], 8, 1, 768, 6144, 80 * GB, 2),
        ([12], 8, 1, 768, 6144, 80 * GB, 1),  # in pairs they would leave two GPUs idle
        ([28], 8, 1, 768, 6144, 80 * GB, 2),  # threes would leave one SAE for a second round of three
        ([64], 8, 1, 768, 6144, 80 * GB, 8),
        ([100], 8, 1, 768, 6144, 80 * GB, 7),  # two rounds of seven are shorter than two of eight
        ([16], 1, 1, 768, 6144, 80 * GB, 8),
        ([16], 1, 1, 768, 6144, None, 8),
        ([8], 2, 1, 768, 6144, 80 * GB, 4),
        ([8], 2, 0.25, 768, 6144, 80 * GB, 1),  # eight trials share the two
        ([8], 8, 2, 768, 6144, 80 * GB, 2),  # four trials of two GPUs each
        ([4, 4], 8, 1, 768, 6144, 80 * GB, 1),
        ([8, 8], 4, 1, 768, 6144, 80 * GB, 4),
        ([64], 8, 1, 4096, 131072, 80 * GB, 2),
        ([24], 8, 1, 4096, 131072, 80 * GB, 3),  # 17 GB each
        ([32], 8, 1, 4096, 131072, 80 * GB, 2),  # four would not fit, and threes take two rounds
        ([64], 8, 0.5, 4096, 131072, 80 * GB, 1),
        ([64], 8, 1, 4096, 131072, 10 * GB, 1),  # that fits none: the pack of one says so
        ([8], 0, 1, 768, 6144, None, 1),
    ],
)
def test_packs_fill_the_gpus_first(saes, gpus, per_trial, d_in, d_sae, memory, size):
    placement = place_trials(64, gpus, 1, per_trial)
    assert pack_size(saes, placement, d_in, d_sae, 4096, memory) == size


def test_no_gpu_is_idle_while_there_are_saes_for_it():
    for gpus in range(1, 17):
        for n in range(1, 80):
            size = pack_size([n], place_trials(64, gpus, 1, 1), 64, 512, 4096, None)
            assert 1 <= size <= 8 and -(-n // size) >= min(n, gpus)
