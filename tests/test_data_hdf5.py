import sys
from pathlib import Path

import h5py
import latent_folders
import numpy as np
import pytest
import torch

from soflow.config import DataConfig
from soflow.data import DataError, Hdf5Source, LatentSource, convert_hdf5, hdf5, open_source


def test_official_file_is_read(tmp_path):
    latents = latent_folders.write_hdf5(tmp_path / "imagenet_latent.hdf5")
    for root in (tmp_path, tmp_path / "imagenet_latent.hdf5"):
        source = open_source(DataConfig(source="hdf5", root=str(root)))
        assert (len(source), source.image_shape, source.num_classes) == (16, (4, 4, 4), 3)
        indices = np.array([9, 2, 2, 15])
        mean, std, labels = source.read(indices)
        np.testing.assert_allclose(mean.numpy(), 0.18215 * latents[indices, :4], rtol=1e-6)
        np.testing.assert_allclose(std.numpy(), 0.18215 * latents[indices, 4:], rtol=1e-6)
        assert labels.tolist() == (indices % 3).tolist()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 2e-3)])
def test_converted_folder_holds_the_same(dtype, tolerance, tmp_path, monkeypatch):
    # shards of 5 rows, in parts of 2: neither begins anew with the 3 classes
    monkeypatch.setattr(hdf5, "_ROWS_AT_ONCE", 2)
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    source = Hdf5Source(tmp_path / "official.hdf5")
    done: list[int] = []
    per_shard = 5 * 8 * 4 * 4 * np.dtype(dtype).itemsize
    convert_hdf5(source, tmp_path / "ours", dtype, shard_bytes=per_shard, progress=done.append)
    ours = LatentSource(tmp_path / "ours")
    ours.verify()
    assert done == [5, 5, 5, 1]
    assert [entry.count for entry in ours.manifest.shards] == [5, 5, 5, 1]
    assert ours.manifest.dtype == dtype
    for a, b in zip(source.read(np.arange(16)), ours.read(np.arange(16)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 1e-3)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir() if path.name != ".lock") == [
        "labels.npy",
        "latents-00000.npy",
        "latents-00001.npy",
        "latents-00002.npy",
        "latents-00003.npy",
        "manifest.json",
    ]


def test_conversion_goes_on_where_it_was_interrupted(tmp_path):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    source = Hdf5Source(tmp_path / "official.hdf5")
    shard_bytes = 6 * 8 * 4 * 4 * 4

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_hdf5(source, tmp_path / "ours", "float32", shard_bytes, stop)
    first = tmp_path / "ours" / "latents-00000.npy"
    before = first.stat().st_mtime_ns
    with pytest.raises(DataError, match="expected the manifest"):
        LatentSource(tmp_path / "ours")
    done: list[int] = []
    convert_hdf5(source, tmp_path / "ours", "float32", shard_bytes, done.append)
    assert done == [6, 4]
    assert first.stat().st_mtime_ns == before
    LatentSource(tmp_path / "ours").verify()


def test_a_finished_conversion_is_not_taken_for_one_of_another_type(tmp_path):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    source = Hdf5Source(tmp_path / "official.hdf5")
    # as many rows per shard for both: one
    convert_hdf5(source, tmp_path / "ours", "float16", shard_bytes=1)
    with pytest.raises(DataError, match="got a finished folder of other contents"):
        convert_hdf5(source, tmp_path / "ours", "float32", shard_bytes=1)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (1e6, "float16")])
def test_values_that_are_not_finite_are_not_written(value, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "_ROWS_AT_ONCE", 4)
    latents = latent_folders.random_latents(16, "float32")
    latents[11, 2, 0, 0] = value
    latent_folders.write_hdf5(tmp_path / "official.hdf5", latents=latents)
    with pytest.raises(DataError, match=rf"latents: row 11 is not finite in {dtype}"):
        convert_hdf5(Hdf5Source(tmp_path / "official.hdf5"), tmp_path / "ours", dtype, 2**30)
    assert not (tmp_path / "ours" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "got no data set 'labels', expected latents, labels, amount, latent_size"),
        ({"amount": np.int64(17)}, r"latents: got \(16, 8, 4, 4\), expected \(17, 2 C, 4, 4\)"),
        ({"latent_size": np.int64(8)}, r"latents: got \(16, 8, 4, 4\), expected \(16, 2 C, 8, 8\)"),
        ({"amount": np.arange(16)}, r"amount: got array\(.*\), expected one whole number"),
        ({"latent_size": np.array([4, 4])}, r"latent_size: got array\(\[4, 4\]\), expected one whole number"),
        ({"amount": np.nan}, r"official.hdf5: amount: got .*nan.*, expected one whole number"),
        ({"amount": b"sixteen"}, r"official.hdf5: amount: got b'sixteen', expected one whole number"),
        ({"latents": np.zeros((16, 0, 4, 4), dtype=np.float32)}, r"got \(16, 0, 4, 4\), expected .*, none of them 0"),
        ({"latents": h5py.Empty("f4")}, r"latents: got \(\), expected \(16, 2 C, 4, 4\)"),
        ({"labels": h5py.Empty("i8")}, r"labels: got None int64, expected \(16,\)"),
        ({"latents": np.zeros((16, 8, 4, 4))}, "latents: got float64, expected float32 or float16"),
        ({"labels": np.arange(15)}, r"labels: got \(15,\) int64, expected \(16,\)"),
        ({"labels": np.arange(16) - 1}, "labels: label number 0 is -1, expected 0 to 1048575"),
        ({"labels": np.arange(16) + 10**11}, "labels: label number 0 is 100000000000, expected 0 to 1048575"),
    ],
)
def test_file_that_contradicts_itself_is_refused(changes, message, tmp_path):
    latent_folders.write_hdf5(tmp_path / "official.hdf5", **changes)
    with pytest.raises(DataError, match=message):
        Hdf5Source(tmp_path / "official.hdf5")


def test_file_that_is_none_or_missing_is_refused(tmp_path):
    (tmp_path / "official.hdf5").write_bytes(b"nothing of the kind")
    for path in (tmp_path / "official.hdf5", tmp_path / "missing.hdf5", tmp_path):
        with pytest.raises(DataError, match=r"expected an HDF5 file of latents"):
            Hdf5Source(path)


def test_labels_that_cannot_be_read_are_named(tmp_path):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    with h5py.File(tmp_path / "official.hdf5", "a") as file:
        labels = file["labels"][()]
        del file["labels"]
        file.create_dataset("labels", data=labels, chunks=(16,), fletcher32=True)
        place = file["labels"].id.get_chunk_info(0).byte_offset
    damaged = bytearray((tmp_path / "official.hdf5").read_bytes())
    damaged[place] ^= 1
    (tmp_path / "official.hdf5").write_bytes(damaged)
    with pytest.raises(DataError, match=r"official\.hdf5: labels: cannot be read"):
        Hdf5Source(tmp_path / "official.hdf5")


def test_without_h5py_the_package_is_named(tmp_path, monkeypatch):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"official.hdf5: .* need the package h5py: pip install 'soflow\[latents\]'"):
        Hdf5Source(tmp_path / "official.hdf5")


def test_label_out_of_range_is_refused(tmp_path):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    with pytest.raises(DataError, match="label number 2 is 2, expected 0 to 1"):
        Hdf5Source(tmp_path / "official.hdf5", num_classes=2)


def test_more_classes_than_a_manifest_may_name_are_refused_before_the_conversion(tmp_path):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    Hdf5Source(tmp_path / "official.hdf5", num_classes=2**20)
    with pytest.raises(DataError, match="labels: got 1048577 classes, expected 1 to 1048576"):
        Hdf5Source(tmp_path / "official.hdf5", num_classes=2**20 + 1)


def test_fingerprint_follows_the_contents(tmp_path: Path):
    latent_folders.write_hdf5(tmp_path / "a.hdf5")
    latent_folders.write_hdf5(tmp_path / "b.hdf5", labels=np.arange(16)[::-1] % 3)
    prints = [Hdf5Source(tmp_path / f"{name}.hdf5").fingerprint for name in "ab"]
    assert prints[0] != prints[1]
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["latents"][8, 0, 0, 0] = 5.0
    assert Hdf5Source(tmp_path / "a.hdf5").fingerprint != prints[0]


def test_verify_finds_what_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "_ROWS_AT_ONCE", 4)
    latents = latent_folders.random_latents(16, "float32")
    latents[13, 0, 3, 3] = np.inf
    latent_folders.write_hdf5(tmp_path / "official.hdf5", latents=latents)
    with pytest.raises(DataError, match="row 13 is not finite in float32"):
        Hdf5Source(tmp_path / "official.hdf5").verify()
