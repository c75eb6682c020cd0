"""Image folder to latents: what is written, and what happens to interruptions, other processes and bad files."""

import copy
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import latent_folders
import numpy as np
import pytest
import tiny_vae
import torch
from PIL import Image

from soflow.cli import main
from soflow.data import DataError, LatentSource
from soflow.data.crop import center_crop
from soflow.data.decode import open_decoder
from soflow.data.encode import Encoder, EncodeSettings
from soflow.data.image_folder import list_images
from soflow.vae import Vae

CPU = torch.device("cpu")
NUM_IMAGES = 11
SAMPLE_BYTES = 8 * 8 * 8 * 2  # of latents of crops of 16, in float16


def write_images(root: Path) -> Path:
    for number in range(NUM_IMAGES):
        folder = root / ("cat" if number < 6 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((20 + number, 33 - number)).save(folder / f"{number:02d}.png")
    return root


def encoder(tmp_path: Path, name: str = "latents", vae: Vae | None = None, **settings: object) -> Encoder:
    chosen = EncodeSettings(**{"image_size": 16, "shard_bytes": 4 * SAMPLE_BYTES, **settings})
    vae = vae or Vae(tiny_vae.network(), "tiny", CPU)
    listing = list_images(tmp_path / "images")
    return Encoder(listing, tmp_path / name, vae, open_decoder("pillow", CPU, 2), chosen, CPU)


def expected_moments(root: Path, flip: bool = False) -> np.ndarray:
    """Image after image, straight from the definitions."""
    rows = []
    for path in list_images(root).paths:
        crop = center_crop(torch.from_numpy(np.array(Image.open(root / path))), 16).permute(2, 0, 1)[None]
        for image in (crop, crop.flip(3)) if flip else (crop,):
            with torch.no_grad():
                posterior = tiny_vae.network().eval().encode(image / 127.5 - 1).latent_dist
            rows.append(torch.cat((posterior.mean, posterior.std), dim=1).numpy())
    return np.concatenate(rows)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.npy"))}


@pytest.mark.parametrize("flip", [False, True])
def test_latents_are_those_of_the_crops(flip, tmp_path):
    write_images(tmp_path / "images")
    done: list[int] = []
    assert encoder(tmp_path, flip=flip, dtype="float32").run(3, max_bad=0, progress=done.append) == []
    source = LatentSource(tmp_path / "latents")
    source.verify()
    assert max(entry.count for entry in source.manifest.shards) == 2  # what its size holds in float32
    expected = expected_moments(tmp_path / "images", flip)
    mean, std, labels = source.read(np.arange(len(source)))
    stored = torch.cat((mean, std), dim=1).numpy() / 0.18215
    np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == np.repeat([0] * 6 + [1] * 5, 2 if flip else 1).tolist()
    assert sum(done) == NUM_IMAGES
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert (manifest["encoder"], manifest["crop"], manifest["flip"]) == ("tiny", "ADM 16", flip)
    assert manifest["classes"] == ["cat", "dog"]


def test_float16_is_the_rounded_float32(tmp_path):
    write_images(tmp_path / "images")
    for dtype in ("float16", "float32"):
        encoder(tmp_path, dtype, dtype=dtype, shard_bytes=2**20).run(4, max_bad=0)
    half, full = (np.load(tmp_path / dtype / "latents-00000.npy") for dtype in ("float16", "float32"))
    np.testing.assert_array_equal(half, full.astype(np.float16))


def test_interrupted_encoding_goes_on_without_repeating_a_shard(tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    encoder(tmp_path, "whole").run(2, max_bad=0)

    class Interrupt(Exception):
        pass

    def stop(files: int) -> None:
        done.append(files)
        if sum(done) > 6:
            raise Interrupt

    done: list[int] = []
    with pytest.raises(Interrupt):
        encoder(tmp_path).run(2, max_bad=0, progress=stop)
    first = tmp_path / "latents" / "latents-00000.npy"
    before = first.stat().st_mtime_ns
    assert not list((tmp_path / "latents").glob("*.tmp"))
    resumed: list[int] = []
    assert encoder(tmp_path).run(2, max_bad=0, progress=resumed.append) == []
    assert resumed[0] == 4
    assert first.stat().st_mtime_ns == before
    assert digests(tmp_path / "latents") == digests(tmp_path / "whole")
    again: list[int] = []
    assert encoder(tmp_path).run(2, max_bad=0, progress=again.append) == []
    assert again == [NUM_IMAGES]


def test_processes_share_the_shards(tmp_path):
    write_images(tmp_path / "images")
    encoder(tmp_path, "alone").run(2, max_bad=0)
    first, second = encoder(tmp_path), encoder(tmp_path)
    assert first.run(2, max_bad=0, rank=0, world_size=2) is None
    assert not (tmp_path / "latents" / "manifest.json").exists()
    assert second.run(2, max_bad=0, rank=1, world_size=2) == []
    assert digests(tmp_path / "latents") == digests(tmp_path / "alone")


def test_bad_files_are_listed_and_counted(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "images" / "cat" / "03.png").write_bytes(b"no image")
    content = (tmp_path / "images" / "dog" / "08.png").read_bytes()
    (tmp_path / "images" / "dog" / "08.png").write_bytes(content[:60])
    done: list[int] = []
    with pytest.raises(DataError, match=r"bad_files.jsonl: 2 files could not be encoded, expected at most 1"):
        encoder(tmp_path).run(3, max_bad=1, progress=done.append)
    assert sum(done) == NUM_IMAGES
    lines = (tmp_path / "latents" / "bad_files.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["cat/03.png", "dog/08.png"]
    assert all(json.loads(line)["reason"] for line in lines)
    assert json.loads(lines[0])["reason"] == "ValueError: the file is none of BMP, JPEG, PNG, WEBP"
    # What was encoded is kept: a larger limit finishes the folder at once.
    assert len(encoder(tmp_path).run(3, max_bad=2)) == 2
    source = LatentSource(tmp_path / "latents")
    assert len(source) == NUM_IMAGES - 2
    assert source.labels.tolist() == [0] * 5 + [1] * 4


def test_latents_that_are_not_finite_make_a_bad_file(tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    encode = Vae.encode

    def overflow(self, images):
        mean, std = encode(self, images)
        return mean + torch.where(torch.arange(len(mean)) == 1, 1e6, 0.0)[:, None, None, None], std

    monkeypatch.setattr(Vae, "encode", overflow)
    with pytest.raises(DataError, match="3 files could not be encoded"):
        encoder(tmp_path).run(4, max_bad=0)
    assert "its latents are not finite in float16" in (tmp_path / "latents" / "bad_files.jsonl").read_text()


def test_another_plan_is_refused(tmp_path):
    write_images(tmp_path / "images")
    encoder(tmp_path)
    with pytest.raises(DataError, match=r"unfinished folder of another plan .*dtype: 'float16', 'float32'"):
        encoder(tmp_path, dtype="float32")
    encoder(tmp_path).run(4, max_bad=0)
    with pytest.raises(DataError, match=r"manifest.json: got a finished folder of other contents"):
        encoder(tmp_path, flip=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(DataError, match=r"got a folder with other files in it"):
        encoder(tmp_path, "other")


def test_another_vae_of_the_same_name_is_refused(tmp_path):
    write_images(tmp_path / "images")
    network = copy.deepcopy(tiny_vae.network())
    with torch.no_grad():
        network.encoder.conv_in.bias[0] += 1e-3
    other = Vae(network, "tiny", CPU)
    encoder(tmp_path)
    with pytest.raises(DataError, match=r"unfinished folder of another plan .*vae_sha256"):
        encoder(tmp_path, vae=other)
    encoder(tmp_path).run(4, max_bad=0)
    with pytest.raises(DataError, match=r"manifest.json: got a finished folder of other contents"):
        encoder(tmp_path, vae=other)
    assert LatentSource(tmp_path / "latents").describe()["vae_sha256"] == encoder(tmp_path).vae.weights_sha256()


def test_crop_that_does_not_fit_the_vae_is_refused(tmp_path):
    write_images(tmp_path / "images")
    with pytest.raises(DataError, match=r"size: got 15, expected a multiple of 2 for tiny"):
        encoder(tmp_path, image_size=15)


def test_killed_encoding_goes_on(tmp_path):
    """Killed in the middle of the second shard; what it left behind is finished by two others."""
    write_images(tmp_path / "images")
    encoder(tmp_path, "whole").run(1, max_bad=0)
    folder = tmp_path / "latents"
    child = os.fork()
    if child == 0:
        encoder(tmp_path).run(1, max_bad=0, progress=lambda files: time.sleep(0.1))
        os._exit(0)
    limit = time.monotonic() + 60
    try:
        while not (folder / "parts" / "00000.json").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not (folder / "manifest.json").exists()
    before = (folder / "latents-00000.npy").stat().st_mtime_ns
    results = [encoder(tmp_path).run(1, max_bad=0, rank=rank, world_size=2) for rank in range(2)]
    assert results == [None, []]
    assert (folder / "latents-00000.npy").stat().st_mtime_ns == before
    assert digests(folder) == digests(tmp_path / "whole")


def test_two_encodings_of_one_folder_at_once_end_in_one_that_verifies(tmp_path):
    """Batches of another size round otherwise: a shard, its hash and its labels must be of one of them."""
    write_images(tmp_path / "images")
    folder = tmp_path / "latents"
    slow = encoder(tmp_path)
    child = os.fork()
    if child == 0:
        done = slow.run(1, max_bad=0, progress=lambda files: time.sleep(0.1))
        os._exit(0 if done == [] else 1)
    assert encoder(tmp_path).run(4, max_bad=0) == []
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    LatentSource(folder).verify()
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "labels.npy", "manifest.json", *(f"latents-0000{number}.npy" for number in range(3))}


def test_the_commands_encode_and_inspect(tmp_path, capsys):
    write_images(tmp_path / "images")
    arguments = ["encode", tmp_path / "images", tmp_path / "latents", "--vae", tiny_vae.save(tmp_path), "--size", 16]
    assert main(list(map(str, [*arguments, "--device", "cpu"]))) == 0
    assert "latents: 11 images encoded, 0 left out" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "latents")]) == 0
    out = capsys.readouterr().out
    assert "samples       11\n" in out
    assert "classes       2, of 5 to 6 samples\n" in out
    assert "encoder       vae\n" in out
    assert out.endswith("verified      yes\n")
    shard = tmp_path / "latents" / "latents-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", "--quick", str(tmp_path / "latents")]) == 0
    assert capsys.readouterr().out.endswith("verified      no\n")
    assert main(["inspect", str(tmp_path / "latents")]) == 2
    assert "latents-00000.npy: got SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("encode", "images", "latents"), ("inspect", "images")])
def test_a_crop_too_large_for_any_memory_is_refused(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--size", "8193"])
    assert "argument --size: got 8193, expected at most 8192" in capsys.readouterr().err


def test_the_command_refuses_bad_files_with_their_list(tmp_path, capsys):
    write_images(tmp_path / "images")
    (tmp_path / "images" / "dog" / "09.png").write_bytes(b"")
    arguments = ["encode", tmp_path / "images", tmp_path / "latents", "--vae", tiny_vae.save(tmp_path), "--size", 16]
    assert main(list(map(str, [*arguments, "--device", "cpu"]))) == 2
    assert "bad_files.jsonl: 1 files could not be encoded, expected at most 0" in capsys.readouterr().err
    assert main(list(map(str, [*arguments, "--device", "cpu", "--max-bad", 1]))) == 0
    assert "10 images encoded, 1 left out" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "latents")]) == 0
    assert "left out      1 files, see bad_files.jsonl; the first is dog/09.png" in capsys.readouterr().out


def test_other_data_sets_are_inspected(tmp_path, capsys):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    (tmp_path / "official").mkdir()
    latent_folders.write_hdf5(tmp_path / "official" / "imagenet_latent.hdf5")
    write_images(tmp_path / "images")
    for name, kind, samples in (("official.hdf5", "hdf5", 16), ("official", "hdf5", 16), ("images", "images", 11)):
        assert main(["inspect", str(tmp_path / name), "--size", "16"]) == 0
        out = capsys.readouterr().out
        assert f"source        {kind}\nsamples       {samples}\n" in out
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "nothing: expected a data set, but: no such file or folder" in capsys.readouterr().err


def test_an_unfinished_folder_is_inspected_as_one(tmp_path, capsys):
    write_images(tmp_path / "images")
    assert encoder(tmp_path).run(4, max_bad=0, rank=0, world_size=2) is None
    assert main(["inspect", str(tmp_path / "latents")]) == 2
    assert "latents: got an unfinished folder of latents, expected manifest.json" in capsys.readouterr().err


def test_every_option_of_the_encoding_is_heeded(tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    runs = []
    monkeypatch.setattr("soflow.data.decode.open_decoder", lambda name, device, threads: (name, device))
    # the last argument reports the progress
    monkeypatch.setattr(Encoder, "run", lambda self, *given: runs.append((self.settings, self.decode, given[:-1])))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = ["encode", tmp_path / "images", tmp_path / "latents", "--vae", tiny_vae.save(tmp_path)]
    options = "--size 16 --flip --dtype float32 --shard-mib 7 --batch-size 5 --max-bad 2 --decoder dali --device cpu"
    assert main([*map(str, arguments), *options.split()]) == 0
    assert runs == [(EncodeSettings(16, True, "float32", 7 * 2**20), ("dali", CPU), (5, 2, 1, 3))]


@pytest.fixture
def with_tf32():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.usefixtures("with_tf32")
def test_the_command_encodes_without_tf32(tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    encode, seen = Vae.encode, set()

    def watched(self, images):
        seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return encode(self, images)

    monkeypatch.setattr(Vae, "encode", watched)
    arguments = ["encode", tmp_path / "images", tmp_path / "latents", "--vae", tiny_vae.save(tmp_path), "--size", 16]
    assert main(list(map(str, [*arguments, "--device", "cpu"]))) == 0
    assert seen == {(False, False)}


def test_the_command_converts(tmp_path, capsys):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    assert main(["convert", str(tmp_path / "official.hdf5"), str(tmp_path / "ours"), "--classes", "5"]) == 0
    assert "16 samples of 5 classes, float16" in capsys.readouterr().out
    assert LatentSource(tmp_path / "ours").num_classes == 5
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    assert "classes       5, of 0 to 6 samples; none of 3, 4\n" in capsys.readouterr().out


def test_every_option_of_the_conversion_is_heeded(tmp_path, monkeypatch):
    latent_folders.write_hdf5(tmp_path / "official.hdf5")
    calls = []
    monkeypatch.setattr("soflow.data.hdf5.convert_hdf5", lambda source, *given: calls.append(given[:-1]))
    arguments = ["convert", tmp_path / "official.hdf5", tmp_path / "ours", "--dtype", "float32", "--shard-mib", "7"]
    assert main(list(map(str, arguments))) == 0
    assert calls == [(tmp_path / "ours", "float32", 7 * 2**20)]
