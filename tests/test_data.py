import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_folders import rewrite_manifest, write_latents, write_npy

from soflow.config import DataConfig
from soflow.data import (
    LATENT_SCALE,
    ArraySource,
    DataError,
    DigitsSource,
    LatentSource,
    batch_indices,
    epoch_order,
    open_source,
    splitmix64,
)


def test_splitmix64_gives_the_published_sequence() -> None:
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + k * golden) % 2**64 for k in range(3)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(np.zeros(1, dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF]


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [(0, 0, [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]), (2**63 - 1, 3, [2, 6, 1, 4, 7, 8, 0, 9, 3, 5])],
)
def test_epoch_order_is_fixed_for_ever(seed: int, epoch: int, expected: list[int]) -> None:
    assert epoch_order(10, seed, epoch).tolist() == expected


def test_epoch_order_is_a_permutation_that_seed_and_epoch_change() -> None:
    orders = [epoch_order(1000, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    for number, order in enumerate(orders):
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
        for other in orders[:number]:
            # Independent permutations agree at one place on average.
            assert np.count_nonzero(order == other) < 10


def test_epoch_order_is_uncorrelated_with_storage_order() -> None:
    correlation = np.corrcoef(epoch_order(100_000, 0, 0), np.arange(100_000))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(100_000)


def test_epoch_order_cannot_be_spoiled_by_its_reader() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(10, 0, 0)[0] = 3


def test_batches_read_no_sample_twice_in_an_epoch_and_drop_the_rest() -> None:
    batches = [batch_indices(103, 10, seed=5, step=step) for step in range(20)]
    for epoch in (0, 1):
        drawn = np.concatenate(batches[10 * epoch : 10 * epoch + 10])
        np.testing.assert_array_equal(drawn, epoch_order(103, 5, epoch)[:100])
        assert len(np.unique(drawn)) == 100


def test_batches_cover_every_sample_when_they_divide_the_data_set() -> None:
    drawn = np.concatenate([batch_indices(96, 32, seed=1, step=step) for step in (3, 4, 5)])
    np.testing.assert_array_equal(np.sort(drawn), np.arange(96))


def test_batch_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(DataError, match=r"train.batch_size: got 11, expected at most the 10 samples"):
        batch_indices(10, 11, seed=0, step=0)


def test_array_source_returns_the_rows_asked_for_in_their_order() -> None:
    images = torch.arange(12.0).reshape(3, 1, 2, 2)
    source = ArraySource(images.double(), np.array([4, 0, 2], dtype=np.uint8))
    mean, std, labels = source.read(np.array([2, 0, 2]))
    assert (len(source), source.image_shape, source.num_classes) == (3, (1, 2, 2), 5)
    assert std is None
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, images[[2, 0, 2]], rtol=0, atol=0)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 4, 2]


def test_array_source_fingerprint_changes_with_every_part_of_the_contents() -> None:
    images, labels = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 1])
    changed = images.clone()
    changed[2, 0, 1, 1] = 1e-6
    prints = {
        ArraySource(images, labels).fingerprint,
        ArraySource(changed, labels).fingerprint,
        ArraySource(images, torch.tensor([0, 1, 0])).fingerprint,
        ArraySource(images, labels, num_classes=3).fingerprint,
        ArraySource(images.reshape(3, 2, 1, 2), labels).fingerprint,
    }
    assert len(prints) == 5
    assert ArraySource(images.clone(), labels.clone()).fingerprint in prints


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "message"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(3, dtype=torch.int64), None, r"images: got \(3, 4, 4\)"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.int16), torch.zeros(3, dtype=torch.int64), None, r"images: .*int16"),
        (torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64), None, r"images: got \(0, 1, 4, 4\)"),
        (torch.full((3, 1, 2, 2), torch.nan), torch.zeros(3, dtype=torch.int64), None, "images: 3 hold NaN"),
        (
            torch.zeros(3, 1, 4, 4),
            torch.zeros(2, dtype=torch.int64),
            None,
            r"labels: got \(2,\) int64, expected \(3,\)",
        ),
        (torch.zeros(3, 1, 4, 4), torch.zeros(3), None, r"labels: got \(3,\) float32"),
        (torch.zeros(3, 1, 4, 4), torch.tensor([0, 3, 1]), 3, "labels: label number 1 is 3, expected 0 to 2"),
        (torch.zeros(3, 1, 4, 4), torch.tensor([0, 0, -1]), None, "labels: label number 2 is -1, expected 0 to "),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 10**11]), None, "number 1 is 100000000000, expected 0 to 1048575"),
        (torch.zeros(1, 1, 4, 4), torch.tensor([0]), 10**11, "labels: got 100000000000 classes, expected 1 to 1048576"),
        (torch.zeros(1, 1, 4, 4), torch.tensor([0]), 0, "labels: got 0 classes, expected 1 to 1048576"),
    ],
)
def test_array_source_refuses_what_it_cannot_serve(
    images: torch.Tensor, labels: torch.Tensor, num_classes: int | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ArraySource(images, labels, num_classes)


def test_array_source_reads_uint8_as_pixels():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    source = ArraySource(images, [0, 1, 2])
    mean, _, _ = source.read(np.array([2, 1, 0]))
    torch.testing.assert_close(mean.flatten(), torch.tensor([1.0, -0.6, -1.0]))
    assert source.stored_dtype == torch.uint8


class Moments(ArraySource):
    """Images with a standard deviation beside them."""

    std: torch.Tensor | None = None

    def moments(self, stored):
        return stored.clone(), self.std


def test_an_own_source_is_handed_over_where_the_configuration_says_so() -> None:
    own = Moments(np.zeros((3, 1, 2, 2)), np.arange(3))
    assert open_source(DataConfig(source="own"), own) is own
    with pytest.raises(DataError, match=r"^data.source: got 'own' and no source, expected Trainer"):
        open_source(DataConfig(source="own"))
    with pytest.raises(DataError, match=r"^data.source: got 'digits', expected 'own', because a source was handed"):
        open_source(DataConfig(source="digits"), own)


def test_an_own_source_is_held_to_what_it_says_of_itself() -> None:
    own = Moments(np.zeros((3, 1, 2, 2)), np.arange(3))
    own.num_classes = 2
    with pytest.raises(DataError, match=r"^labels of the source: label number 2 is 2, expected 0 to 1"):
        open_source(DataConfig(source="own"), own)
    own.num_classes, own.std = 3, torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(
        DataError, match=r"^standard deviation of the source: got \(1, 1, 2, 2\) torch.float64, expected"
    ):
        open_source(DataConfig(source="own"), own)
    own.std = torch.zeros(1, 1, 2, 2)
    assert open_source(DataConfig(source="own"), own) is own
    with pytest.raises(DataError, match=r"^data.augment_p: got 0.1, expected 0, because the source has standard"):
        open_source(DataConfig(source="own", augment_p=0.1), own)
    own.image_shape = (1, 2, 3)
    with pytest.raises(
        DataError, match=r"^mean of the source: got \(1, 1, 2, 2\) torch.float32, expected \(1, 1, 2, 3"
    ):
        open_source(DataConfig(source="own"), own)


def test_digits_are_the_real_images_split_once() -> None:
    from sklearn.datasets import load_digits

    train, held_out = DigitsSource("train"), DigitsSource("held_out")
    assert (len(train), len(held_out)) == (1437, 360)
    assert torch.bincount(held_out.labels).tolist() == [36] * 10
    assert train.image_shape == (1, 8, 8)
    assert train.num_classes == 10
    digits = load_digits()
    ours = torch.cat([train.images, held_out.images]).flatten(1).add(1).mul(8).numpy()
    labels = torch.cat([train.labels, held_out.labels]).numpy()
    joined = {(*image.tolist(), label) for image, label in zip(ours, labels, strict=True)}
    assert joined == {(*image.tolist(), label) for image, label in zip(digits.data, digits.target, strict=True)}
    assert (float(train.images.min()), float(train.images.max())) == (-1.0, 1.0)


def test_digits_split_is_the_same_on_every_machine() -> None:
    assert DigitsSource("train").fingerprint == "64dd3d72a908cbbd"
    assert DigitsSource("held_out").fingerprint == "294e2549df13aa55"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_are_read_across_shards_in_the_order_asked_for(tmp_path: Path, dtype: str) -> None:
    latents = write_latents(tmp_path, dtype)
    source = LatentSource(tmp_path)
    assert (len(source), source.image_shape, source.num_classes) == (16, (4, 4, 4), 3)
    indices = np.array([15, 4, 5, 0, 11, 12, 4, 9])
    mean, std, labels = source.read(indices)
    expected = 0.18215 * latents[indices].astype(np.float64)
    assert mean.dtype == std.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), expected[:, :4], rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), expected[:, 4:], rtol=1e-6)
    assert labels.dtype == torch.int64
    assert labels.tolist() == (indices % 3).tolist()


def test_latents_are_opened_by_the_configuration_and_verified(tmp_path: Path) -> None:
    write_latents(tmp_path)
    source = open_source(DataConfig(source="latents", root=str(tmp_path)))
    assert isinstance(source, LatentSource)
    source.verify()
    assert isinstance(open_source(DataConfig(source="digits")), DigitsSource)


def test_latents_fingerprint_is_that_of_their_manifest(tmp_path: Path) -> None:
    write_latents(tmp_path / "a")
    write_latents(tmp_path / "b")
    write_latents(tmp_path / "c", counts=(16,))
    prints = [LatentSource(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nowhere/manifest.json: expected the manifest .*soflow convert.* No such file"
    ):
        LatentSource(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: got 2, expected 1"),
        ({"n": 17}, "labels.count: got 16, expected n, which is 17"),
        ({"n": "16"}, r"Expected `int`, got `str` - at `\$.n`"),
        ({"shape": [7, 4, 4]}, r"at `\$.shape\[0\]`"),
        ({"dtype": "float64"}, r"at `\$.dtype`"),
        ({"num_classes": 2}, r"labels.npy: label number 2 is 2, expected 0 to 1 \(5 such labels\)"),
        ({"shape": [8, 4, 2]}, r"latents-00000.npy: got \(5, 8, 4, 4\) float16, expected \(5, 8, 4, 2\) float16"),
        (
            {"dtype": "float32"},
            r"latents-00000.npy: got .* float16, expected .* float32 \(manifest entry shards\[0\]\)",
        ),
        ({"shards": []}, r"at `\$.shards`"),
        ({"num_classes": 10**12}, r"Expected `int` <= 1048576 - at `\$.num_classes`"),
        ({"n": 0}, r"Expected `int` >= 1 - at `\$.n`"),
    ],
)
def test_manifest_that_contradicts_itself_or_the_files_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_latents(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        LatentSource(tmp_path)


def test_manifest_that_is_not_json_is_refused(tmp_path: Path) -> None:
    write_latents(tmp_path)
    (tmp_path / "manifest.json").write_text("{ not json")
    with pytest.raises(DataError, match=r"manifest.json: JSON is malformed"):
        LatentSource(tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b'{"version": 1, "more": ' + b"[" * 100_000])
def test_damaged_manifest_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(DataError, match=r"manifest.json: "):
        LatentSource(tmp_path)


def test_manifest_whose_shards_do_not_add_up_is_refused(tmp_path: Path) -> None:
    write_latents(tmp_path)
    rewrite_manifest(tmp_path, shards=json.loads((tmp_path / "manifest.json").read_text())["shards"][:2])
    with pytest.raises(DataError, match="the counts in shards: got 12, expected n, which is 16"):
        LatentSource(tmp_path)


@pytest.mark.parametrize("name", ["latents-00001.npy", "labels.npy"])
def test_missing_file_is_refused_with_its_manifest_entry(tmp_path: Path, name: str) -> None:
    write_latents(tmp_path)
    (tmp_path / name).unlink()
    entry = "labels" if name == "labels.npy" else r"shards\[1\]"
    with pytest.raises(DataError, match=rf"{name}: expected the file of manifest entry {entry}, but: No such file"):
        LatentSource(tmp_path)


@pytest.mark.parametrize("name", ["latents-00002.npy", "labels.npy"])
@pytest.mark.parametrize("size", [0, 100, 130])
def test_truncated_file_is_refused_with_both_sizes(tmp_path: Path, name: str, size: int) -> None:
    write_latents(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:size])
    with pytest.raises(DataError, match=rf"{name}: got {size} bytes, expected \d+ \(manifest entry"):
        LatentSource(tmp_path)


def test_file_that_is_no_array_is_refused(tmp_path: Path) -> None:
    write_latents(tmp_path)
    path = tmp_path / "latents-00000.npy"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"latents-00000.npy: expected a .npy file of numbers \(manifest entry shards"):
        LatentSource(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(5, 8, 4, 4), ", b"(5, 8, 4, 4(, "),
        (b"(5, 8, 4, 4), ", b"(9" + b"9" * 30 + b",),"),
        (b"'<f2'", b"1(2) "),
        (b"'shape'", b"9999999"),
    ],
)
def test_array_with_a_damaged_header_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    write_latents(tmp_path)
    path = tmp_path / "latents-00000.npy"
    contents = path.read_bytes()
    assert old in contents
    damaged = contents.replace(old, new, 1)
    # The length stays: spaces stand at the end of every header.
    path.write_bytes(damaged.replace(b" " * (len(new) - len(old)) + b"\n", b"\n", 1))
    with pytest.raises(DataError, match=r"latents-00000.npy: expected a .npy file of numbers \(manifest entry shards"):
        LatentSource(tmp_path)


def test_array_of_python_objects_is_refused_unread(tmp_path: Path) -> None:
    write_latents(tmp_path)
    entry = write_npy(tmp_path / "labels.npy", np.array([object] * 16))
    rewrite_manifest(tmp_path, labels=entry)
    with pytest.raises(DataError, match=r"labels.npy: expected a .npy file of numbers .*"):
        LatentSource(tmp_path)


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    write_latents(tmp_path)
    entry = write_npy(tmp_path / "labels.npy", np.zeros(15, dtype=np.int64))
    rewrite_manifest(tmp_path, labels=entry | {"count": 16})
    with pytest.raises(DataError, match=r"labels.npy: got \(15,\) int64, expected \(16,\) of an integer type"):
        LatentSource(tmp_path)


def flip_last_byte(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


def test_changed_labels_are_refused_when_opened(tmp_path: Path) -> None:
    write_latents(tmp_path)
    flip_last_byte(tmp_path / "labels.npy")
    with pytest.raises(DataError, match=r"labels.npy: got SHA-256 .* \(manifest entry labels\)"):
        LatentSource(tmp_path)


def test_changed_latents_are_found_by_verify(tmp_path: Path) -> None:
    write_latents(tmp_path)
    flip_last_byte(tmp_path / "latents-00001.npy")
    with pytest.raises(DataError, match=r"latents-00001.npy: got SHA-256 .* \(manifest entry shards\[1\]\)"):
        LatentSource(tmp_path).verify()


def test_shard_truncated_while_training_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    write_latents(tmp_path)
    source = LatentSource(tmp_path)
    path = tmp_path / "latents-00002.npy"
    with path.open("r+b") as file:
        file.truncate(200)
    source.read(np.arange(8))
    with pytest.raises(DataError, match=r"latents-00002.npy: got 200 bytes"):
        source.read(np.arange(8, 16))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_not_finite_are_found_by_verify(tmp_path: Path, value: float) -> None:
    latents = write_latents(tmp_path)
    latents[7, 3, 1, 2] = value
    entries = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    entries[1] = write_npy(tmp_path / "latents-00001.npy", latents[5:12])
    rewrite_manifest(tmp_path, shards=entries)
    with pytest.raises(DataError, match=r"latents-00001.npy: row 2 holds NaN or infinity"):
        LatentSource(tmp_path).verify()


def test_float16_store_is_within_its_error() -> None:
    """Latents as the recipes scale them have a variance near one: the root mean square error stays below 2.5e-4."""
    exact = np.random.default_rng(0).standard_normal(200_000) / LATENT_SCALE
    stored = exact.astype(np.float16).astype(np.float64)
    error = LATENT_SCALE * (stored - exact)
    assert np.sqrt(np.mean(error**2)) <= 2.5e-4
