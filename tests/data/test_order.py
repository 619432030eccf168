"""The order of images depends on the seed alone, and goes on wherever reading stopped."""

import os
import signal

import numpy as np
import pytest
import torch
from image_files import make_class_folder

from lamamba.data import ArraySource, FolderSource, batches, flip_choices, open_source, permutation, reading_order
from lamamba.data.order import _mix_bits
from lamamba.errors import ConfigError, DataError


def counting_source(length=10):
    """Image k is k in its left column and 0 elsewhere; its label is k."""
    images = np.zeros((length, 1, 2, 4), np.uint8)
    images[:, :, :, 0] = np.arange(length)[:, None, None]
    return ArraySource("counting", images, np.arange(length), ())


def take(iterator, num_batches):
    return [next(iterator) for _ in range(num_batches)]


def joined(pairs):
    return torch.cat([images for images, _ in pairs]), torch.cat([labels for _, labels in pairs])


class TestOrder:
    def test_each_epoch_is_another_permutation(self):
        orders = [permutation(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
        assert all(sorted(order) == list(range(50)) for order in orders)
        assert len({tuple(order) for order in orders}) == 4

    def test_order_never_changes_between_versions(self):
        assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
        assert flip_choices(np.arange(10), seed=0).tolist() == [bool(bit) for bit in (1, 1, 1, 0, 0, 1, 0, 0, 1, 1)]
        # the first two outputs of the published SplitMix64 from state 0
        states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
        assert _mix_bits(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]

    def test_reading_order_crosses_epochs(self):
        positions = np.arange(25)
        expected = np.concatenate([permutation(3, epoch, 7) for epoch in range(4)])[:25]
        assert np.array_equal(reading_order(positions, length=7, seed=3), expected)

    def test_flips_are_fair_and_independent(self):
        flips = flip_choices(np.arange(100_000), seed=0)
        others = flip_choices(np.arange(100_000), seed=1)
        for rate in (flips.mean(), (flips == others).mean(), *((flips[k:] == flips[:-k]).mean() for k in (1, 2, 1000))):
            assert abs(rate - 0.5) < 0.01  # six standard deviations

    @pytest.mark.parametrize("horizontal_flip", [False, True])
    @pytest.mark.parametrize("start", [0, 1, 9, 10, 23])
    def test_resuming_gives_the_very_images(self, start, horizontal_flip):
        options = {"seed": 5, "horizontal_flip": horizontal_flip}
        whole = joined(take(batches(counting_source(), batch_size=1, **options), start + 24))
        rest = joined(take(batches(counting_source(), batch_size=8, start=start, **options), 3))
        assert torch.equal(rest[0], whole[0][start:])
        assert torch.equal(rest[1], whole[1][start:])

    def test_seed_and_flip_change_what_is_read(self):
        def read(**options):
            return joined(take(batches(counting_source(), batch_size=10, **options), 2))

        assert not torch.equal(read(seed=0)[1], read(seed=1)[1])
        plain, flipped = read(seed=0)[0], read(seed=0, horizontal_flip=True)[0]
        chosen = torch.from_numpy(flip_choices(np.arange(20), seed=0))
        assert 0 < chosen.sum() < 20
        assert torch.equal(flipped[chosen], plain[chosen].flip(-1))
        assert torch.equal(flipped[~chosen], plain[~chosen])

    def test_a_batch_may_be_larger_than_the_set(self):
        images, labels = next(batches(counting_source(3), batch_size=7, seed=0))
        assert images.shape == (7, 1, 2, 4)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert sorted(labels[:3].tolist()) == sorted(labels[3:6].tolist()) == [0, 1, 2]
        assert torch.equal(images[:, 0, 0, 0].long(), labels)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size is 0"),
            ({"start": -1}, "start is -1"),
            ({"num_workers": -2}, "num_workers is -2"),
            ({"seed": -1}, "seed is -1"),
            ({"seed": 2**64}, "seed is 18446744073709551616"),
        ],
    )
    def test_wrong_numbers_are_refused_at_once(self, options, message):
        with pytest.raises(ConfigError, match=message):
            batches(counting_source(), **{"batch_size": 2, "seed": 0, **options})

    def test_an_empty_source_is_refused(self):
        with pytest.raises(DataError, match="counting has no images"):
            batches(counting_source(0), batch_size=2, seed=0)


class TestFolderBatches:
    def test_workers_do_not_change_what_is_read(self, tmp_path):
        source = open_source(str(make_class_folder(tmp_path, per_class=5)), image_size=8)
        options = {"batch_size": 3, "seed": 2, "start": 4, "horizontal_flip": True}
        images, labels = joined(take(batches(source, **options), 6))
        assert images.shape == (18, 3, 8, 8)
        assert set(labels.tolist()) == {0, 1}
        assert torch.equal(images[:, 0, 0, 0] >= 100, labels == 1)
        for num_workers in (1, 2):
            others = joined(take(batches(source, num_workers=num_workers, **options), 6))
            assert torch.equal(others[0], images)
            assert torch.equal(others[1], labels)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_the_global_generator_is_left_alone(self, tmp_path, num_workers):
        source = open_source(str(make_class_folder(tmp_path)), image_size=8)
        state = torch.get_rng_state()
        take(batches(source, batch_size=2, seed=0, num_workers=num_workers), 2)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_bad_file_is_named_in_one_line(self, tmp_path, num_workers):
        bad = make_class_folder(tmp_path) / "bee" / "bad.png"
        bad.write_bytes(b"")
        source = open_source(str(tmp_path), image_size=8)
        with pytest.raises(DataError) as caught:
            take(batches(source, batch_size=2, seed=0, num_workers=num_workers), 4)
        assert str(caught.value).startswith(f"{bad} cannot be read as an image")
        assert str(caught.value).endswith("replace or delete it, or skip it with skip_bad_images (--skip-bad-images)")
        assert "\n" not in str(caught.value)

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
    def test_a_dead_worker_is_reported(self, tmp_path):
        source = DeadlySource(make_class_folder(tmp_path), image_size=8)
        with pytest.raises(DataError, match=r"worker that reads .* died .*use fewer num_workers \(--num-workers\)"):
            take(batches(source, batch_size=2, seed=0, num_workers=1), 1)


class DeadlySource(FolderSource):
    def load(self, index):
        os.kill(os.getpid(), signal.SIGKILL)
