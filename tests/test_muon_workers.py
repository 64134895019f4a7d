"""Muon's batches on the threads of a CPU: the same step, within the bound on memory, all threads busy."""

import threading

import pytest
import torch
from torch import nn

from blueberry.optim import Muon
from blueberry.optim.audit import UpdateMeter
from blueberry.threads_blueberry import blas_threads

SHAPES = [(6, 4), (6, 4), (6, 4), (4, 6), (8, 8), (5, 3, 9), (4, 6), (6, 4)]


def parameters(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return made


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("batch_bytes", [1, 3000, None])
def test_any_number_of_threads_makes_the_same_step(threads, batch_bytes):
    alone, shared = parameters(), parameters()
    Muon(alone, neuron_beta=0.9).step()
    with blas_threads(threads):
        Muon(shared, neuron_beta=0.9, batch_bytes=batch_bytes).step()
        assert torch.get_num_threads() == threads
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-12)


class Watched(Muon):
    """Knows the largest number of entries that were in the works at once, and the BLAS threads of each batch."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.lock, self.entries, self.most, self.threads = threading.Lock(), 0, 0, set()

    def orthogonalize(self, directions, group, scratch=None):
        with self.lock:
            self.entries += directions.numel()
            self.most = max(self.most, self.entries)
            self.threads.add(torch.get_num_threads())
        update = super().orthogonalize(directions, group, scratch)
        with self.lock:
            self.entries -= directions.numel()
        return update


def test_batches_in_the_works_together_keep_to_the_bound_on_memory():
    weights = parameters([(64, 64)] * 40)
    each = 84 * 64 * 64  # bytes: ten matrices in float64 and one in float32
    for bound, most in ((8 * each, 8), (3 * each, 3), (each, 1), (1, 1)):
        muon = Watched(weights, batch_bytes=bound)
        with blas_threads(4):
            muon.step()
        assert 0 < muon.most <= most * 64 * 64


@pytest.mark.parametrize(
    ("count", "fitting", "threads"), [(1, None, 4), (2, 1000, 2), (9, 1000, 1), (9, 2, 2), (9, 1, 4)]
)
def test_few_or_large_weights_get_more_threads_each(count, fitting, threads):
    shapes = [(64, 64 + number) for number in range(count)]  # a batch each
    largest = 8 * (3 * 64 * (63 + count) + 7 * 64 * 64) + 4 * 64 * (63 + count)
    muon = Watched(parameters(shapes), batch_bytes=fitting and fitting * largest)
    with blas_threads(4):
        muon.step()
    assert muon.threads == {threads}


def test_what_fails_on_a_worker_is_raised_by_the_step():
    class Broken(Muon):
        def orthogonalize(self, directions, group, scratch=None):
            raise ZeroDivisionError

    with blas_threads(2), pytest.raises(ZeroDivisionError):
        Broken(parameters()).step()


def test_the_audit_counts_the_same_on_any_number_of_threads():
    found = []
    for threads in (1, 3):
        weights, meter = parameters([(6, 4)] * 9 + [(40, 6, 4)]), UpdateMeter()
        muon = Muon([(f"layers.{i}.w", weight) for i, weight in enumerate(weights)], batch_bytes=2000)
        with blas_threads(threads), meter.watch(muon):
            muon.step()
        found.append(meter.measurements)
    for name, row in found[0].items():
        assert found[1][name] == {measure: pytest.approx(value, rel=1e-9) for measure, value in row.items()}
    assert [row["orthogonalizations"] for row in found[1].values()] == [1] * 9 + [40]
    assert sum("singular_values" in row for row in found[1].values()) == 1  # the kind's largest update, of all batches


def test_the_audit_samples_the_largest_update_of_all_batches():
    """It took the largest of the first batch: a blow-up in a later one stayed unseen."""

    class Broken(Muon):
        calls = 0

        def orthogonalize(self, directions, group, scratch=None):
            self.calls += 1
            return super().orthogonalize(directions, group, scratch) * (4 if self.calls == 3 else 1)

    muon = Broken([(f"layers.{i}.w", weight) for i, weight in enumerate(parameters([(6, 4)] * 5))], batch_bytes=1)
    meter = UpdateMeter()
    with blas_threads(1), meter.watch(muon):
        muon.step()
    (sampled,) = (row["singular_values"] for row in meter.measurements.values() if "singular_values" in row)
    assert muon.calls == 5 and sampled[1] > 2
