"""Image folders and the decoders: every kind of file a folder of photographs holds, and what is no image."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soflow.config import DataConfig
from soflow.data import DataError, ImageFolderSource, image_folder, open_source
from soflow.data.crop import center_crop
from soflow.data.decode import open_decoder, suits_dali
from soflow.data.feeder import has_dali
from soflow.data.image_folder import list_images

CPU = torch.device("cpu")
DECODERS = ["pillow", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="needs nvidia-dali"))]


def photograph(height: int = 60, width: int = 80) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photograph(), exif=exif)


FILES = {
    "plain": encoded(photograph()),
    "full chroma": encoded(photograph(), subsampling=0),
    "progressive": encoded(photograph(), progressive=True),
    "greyscale": encoded(photograph().convert("L")),
    "cmyk": encoded(photograph().convert("CMYK")),
    "exif": rotated_by_exif(),
    "png": encoded(photograph(), "PNG"),
    "palette": encoded(photograph().convert("P"), "PNG"),
    "transparent": encoded(photograph().convert("RGBA"), "PNG"),
    "webp": encoded(photograph(), "WEBP"),
    "odd": encoded(photograph(37, 53)),
    "bmp": encoded(photograph(), "BMP"),
    "two pictures": encoded(photograph(), "MPO", save_all=True, append_images=[photograph()]),
    "png without its last bytes": encoded(photograph(), "PNG")[:-12],
}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n"


def sixteen_bits_of_colour() -> bytes:
    """A PNG that Pillow reads and does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = np.arange(8 * 9 * 3, dtype=">u2").reshape(8, -1) * 300
    header = struct.pack(">IIBBBBB", 9, 8, 16, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BROKEN = {
    "truncated": FILES["plain"][: len(FILES["plain"]) // 2],
    "header only": FILES["plain"][:200],
    "empty": b"",
    "text": b"this is no image at all",
    "truncated png": FILES["png"][:300],
    "truncated bmp": FILES["bmp"][:-20],
    "gif": encoded(photograph(), "GIF"),
    "tiff": encoded(photograph(), "TIFF"),
    "16 bits of grey": encoded(Image.fromarray(np.full((8, 9), 32768, dtype=np.uint16)), "PNG"),
    "16 bits of colour": sixteen_bits_of_colour(),
    "too many pixels": encoded(Image.new("1", (14000, 14000)), "PNG"),
    "postscript": POSTSCRIPT,
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_image_becomes_what_pillow_makes_of_it(name, decoder):
    """EXIF rotation is not followed: the official latents were made without."""
    (pixels,) = open_decoder(decoder, CPU, 1)([FILES[name]])
    expected = np.array(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    assert expected.shape == ((37, 53, 3) if name == "odd" else (60, 80, 3))
    assert isinstance(pixels, torch.Tensor)
    np.testing.assert_array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_broken_file_spoils_no_other(decoder):
    contents = [FILES["plain"], *BROKEN.values(), FILES["cmyk"]]
    first, *broken, last = open_decoder(decoder, CPU, 2)(contents)
    assert isinstance(first, torch.Tensor)
    assert isinstance(last, torch.Tensor)
    for name, result in zip(BROKEN, broken, strict=True):
        assert isinstance(result, str), name
        assert result.strip(), name


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_wrong_with_a_file_is_said_the_same_by_each_decoder(decoder):
    (colour, grey, gif) = open_decoder(decoder, CPU, 1)(
        [BROKEN[name] for name in ("16 bits of colour", "16 bits of grey", "gif")]
    )
    assert colour == grey == "ValueError: got 16 bits per channel, expected 8"
    assert gif == "ValueError: the file is none of BMP, JPEG, PNG, WEBP"


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_file_starts_a_program(decoder, tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\necho run >> {tmp_path}/log\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # Pillow remembers whether there is one
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (reason,) = open_decoder(decoder, CPU, 1)([POSTSCRIPT])
    assert isinstance(reason, str)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("decoder", DECODERS)
def test_pixels_stay_when_other_files_are_decoded(decoder):
    decode = open_decoder(decoder, CPU, 1)
    contents = [FILES["plain"], FILES["png"], FILES["webp"]]
    kept = decode(contents)
    for _ in range(20):
        decode([encoded(Image.new("RGB", (80, 60), "red"))] * 3)
    for content, pixels in zip(contents, kept, strict=True):
        np.testing.assert_array_equal(pixels, np.array(Image.open(io.BytesIO(content)).convert("RGB")))


def test_dali_is_given_no_file_that_it_makes_up_or_dies_of():
    given = {name for name, content in FILES.items() if suits_dali(content)}
    assert {"plain", "webp"} <= given
    assert given.isdisjoint({"png", "palette", "transparent", "bmp"})


def test_decoder_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("soflow.data.decode.has_dali", lambda: False)
    with pytest.raises(DataError, match=r"decoder: got 'dali', expected 'auto' or 'pillow'"):
        open_decoder("dali", CPU, 1)
    assert isinstance(open_decoder("auto", CPU, 1)([FILES["plain"]])[0], torch.Tensor)


def test_auto_decodes_by_dali_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr("soflow.data.decode.has_dali", lambda: True)
    monkeypatch.setattr("soflow.data.decode._dali_decoder", lambda device: f"dali on {device}")
    assert open_decoder("auto", torch.device("cuda"), 1) == "dali on cuda"
    assert open_decoder("dali", CPU, 1) == "dali on cpu"
    assert isinstance(open_decoder("auto", CPU, 1)([FILES["plain"]])[0], torch.Tensor)


def write_folder(root: Path) -> Path:
    for name, files in {"b-dog": ["x.jpg", "deep/y.PNG"], "a-cat": ["2.jpg", "10.jpg", "note.txt"]}.items():
        for file in files:
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(FILES["png"] if path.suffix == ".PNG" else FILES["plain"])
    return root


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    listing = list_images(write_folder(tmp_path))
    assert listing.classes == ("a-cat", "b-dog")
    assert listing.paths == ("a-cat/10.jpg", "a-cat/2.jpg", "b-dog/deep/y.PNG", "b-dog/x.jpg")
    assert listing.labels == (0, 0, 1, 1)
    before = listing.fingerprint
    (tmp_path / "a-cat" / "2.jpg").write_bytes(FILES["odd"])
    assert list_images(tmp_path).fingerprint != before


def test_links_are_followed(tmp_path):
    write_folder(tmp_path / "elsewhere")
    (tmp_path / "data" / "dog").mkdir(parents=True)
    (tmp_path / "data" / "dog" / "more").symlink_to(tmp_path / "elsewhere" / "b-dog" / "deep")
    (tmp_path / "data" / "dog" / "one.jpg").symlink_to(tmp_path / "elsewhere" / "b-dog" / "x.jpg")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere" / "a-cat")
    listing = list_images(tmp_path / "data")
    assert listing.paths == ("cat/10.jpg", "cat/2.jpg", "dog/more/y.PNG", "dog/one.jpg")


@pytest.mark.parametrize("name", ["a-cat/sub", "a-cat/note", "a-cat/3.jpg", "c-bird"])
def test_a_link_that_leads_nowhere_is_refused(name, tmp_path):
    """A class left out would give every later one another label."""
    (write_folder(tmp_path) / name).symlink_to("nowhere")
    with pytest.raises(DataError, match=rf"{name}: .*(leads nowhere|No such file)"):
        list_images(tmp_path)


def test_a_link_that_leads_round_is_refused(tmp_path):
    write_folder(tmp_path / "data")
    (tmp_path / "other").mkdir()
    (tmp_path / "data" / "a-cat" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "data" / "a-cat")
    with pytest.raises(DataError, match=r"a-cat/other/back: got a link to a folder that it lies in"):
        list_images(tmp_path / "data")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    """By a simulated error, because nothing is forbidden to root."""
    write_folder(tmp_path)
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"b-dog/deep: cannot be listed: Permission denied"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", [b"a-cat/caf\xe9.png", b"caf\xe9/x.png"])
def test_names_that_are_not_utf8_are_refused(name, tmp_path):
    path = os.fsencode(write_folder(tmp_path)) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(FILES["png"])
    with pytest.raises(DataError, match=r"got the name '.*caf\\udce9.*', expected names in UTF-8"):
        list_images(tmp_path)


def test_images_are_cropped_and_brought_to_the_training_range(tmp_path):
    write_folder(tmp_path)
    source = open_source(DataConfig(source="images", root=str(tmp_path), image_size=16))
    source.verify()
    mean, std, labels = source.read(np.array([3, 0]))
    assert (len(source), source.image_shape, source.num_classes) == (4, (3, 16, 16), 2)
    assert std is None
    assert labels.tolist() == [1, 0]
    crop = center_crop(torch.from_numpy(np.array(Image.open(io.BytesIO(FILES["plain"])))), 16)
    torch.testing.assert_close(mean[0], crop.permute(2, 0, 1) / 127.5 - 1)
    assert ImageFolderSource(tmp_path, 8).fingerprint != source.fingerprint


@pytest.mark.parametrize("name", BROKEN)
def test_broken_image_is_named_when_it_is_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(image_folder, "VERIFIED_AT_ONCE", 1)
    write_folder(tmp_path)
    (tmp_path / "a-cat" / "2.jpg").write_bytes(BROKEN[name])
    source = ImageFolderSource(tmp_path, 16)
    source.read(np.array([0, 2]))
    with pytest.raises(DataError, match=r"a-cat/2.jpg: expected an image, but: "):
        source.read(np.array([0, 1]))
    with pytest.raises(DataError, match=r"a-cat/2.jpg"):
        source.verify()


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected a folder with a folder of images per class"):
        list_images(tmp_path / "missing")
    with pytest.raises(DataError, match="got no folder"):
        list_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: got no image"):
        list_images(tmp_path)
    (tmp_path / "beside.png").write_bytes(FILES["png"])
    with pytest.raises(DataError, match=r"got the image beside.png beside the folders"):
        list_images(tmp_path)
