"""Image folders and the decoders: every kind of file a folder of photographs holds, and what is no image."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soflow.config import DataConfig
from soflow.data import DataError, ImageFolderSource, open_source
from soflow.data.crop import center_crop
from soflow.data.decode import open_decoder
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
}
BROKEN = {
    "truncated": FILES["plain"][: len(FILES["plain"]) // 2],
    "header only": FILES["plain"][:200],
    "empty": b"",
    "text": b"this is no image at all",
    "truncated png": FILES["png"][:300],
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


def test_decoder_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("soflow.data.decode.has_dali", lambda: False)
    with pytest.raises(DataError, match=r"decoder: got 'dali', expected 'auto' or 'pillow'"):
        open_decoder("dali", CPU, 1)
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
def test_broken_image_is_named_when_it_is_read(name, tmp_path):
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
