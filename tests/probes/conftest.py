"""Tiny tensors: threads would only wait for each other. And a comparison of bare with watched training."""

import pytest
import torch

from gradlab.probes import watch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Unwatched:
    """Stands in for a probe in a bare run."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def log(self, **_):
        pass

    def step(self):
        pass


@pytest.fixture
def bare_and_watched():
    """Run training code bare and watched, and return the traces once every bit of both runs is found equal.

    The code gets what takes the place of watch, and returns tensors: losses, gradients, weights, buffers.
    """

    def compare(train):
        probes = []

        def watched(*args, **options):
            probes.append(watch(*args, **options))
            return probes[-1]

        torch.manual_seed(1)
        bare = [*train(lambda *_, **__: Unwatched()), torch.get_rng_state()]
        torch.manual_seed(1)
        other = [*train(watched), torch.get_rng_state()]
        assert len(bare) == len(other) > 2
        for one, two in zip(bare, other, strict=True):
            assert (one.dtype, one.shape) == (two.dtype, two.shape)
            pair = [x.detach().contiguous().view(-1).view(torch.uint8) for x in (one, two)]
            assert torch.equal(*pair)  # NaN equals NaN, and 0 is not -0
        return [probe.trace for probe in probes]

    return compare
