import json
import sys

import pytest
import tiny_vae
import torch
from safetensors.torch import load_file, save_file

from soflow.vae import Vae, VaeError, load_vae

CPU = torch.device("cpu")


def test_it_encodes_and_decodes_as_diffusers_does(tmp_path):
    vae, network = load_vae(str(tiny_vae.save(tmp_path)), CPU), tiny_vae.network().eval()
    assert (vae.name, vae.channels, vae.reduction) == ("vae", 4, 2)
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = vae.encode(images)
    with torch.no_grad():
        expected = network.encode(images).latent_dist
        torch.testing.assert_close((mean, std), (expected.mean, expected.std))
        assert mean.shape == (2, 4, 8, 8)
        # the factor of the recipes is undone: a sample of the flow is 0.18215 times a latent
        torch.testing.assert_close(vae.decode(0.18215 * mean), network.decode(mean).sample)
    assert vae.decode(mean).shape == (2, 3, 16, 16)


def test_it_decodes_few_at_once(tmp_path):
    vae, network = load_vae(str(tiny_vae.save(tmp_path)), CPU), tiny_vae.network().eval()
    parts: list[int] = []
    vae.network.decoder.register_forward_pre_hook(lambda module, inputs: parts.append(len(inputs[0])))
    latents = torch.randn(11, 4, 4, 4)
    with torch.no_grad():
        expected = network.decode(latents / 0.18215).sample
    torch.testing.assert_close(vae.decode(latents), expected)
    assert parts == [8, 3]


def test_latents_of_other_channels_are_refused_by_the_name_of_their_field(tmp_path):
    vae = load_vae(str(tiny_vae.save(tmp_path)), CPU)
    vae.require_channels("--vae", 4)
    with pytest.raises(VaeError, match=r"^--vae: got vae with latents of 4 channels, expected 8"):
        vae.require_channels("--vae", 8)


def test_the_hash_of_its_weights_is_that_of_every_name_shape_and_value(tmp_path, monkeypatch):
    vae = load_vae(str(tiny_vae.save(tmp_path)), CPU)
    first = vae.weights_sha256()
    assert Vae(tiny_vae.network(), "another name", CPU).weights_sha256() == first
    for tensor in vae.network.state_dict().values():
        value = tensor.flatten()[-1].clone()
        tensor.view(-1)[-1] = value + 1
        assert vae.weights_sha256() != first
        tensor.view(-1)[-1] = value
    assert vae.weights_sha256() == first
    weights = vae.network.state_dict()
    renamed = {f"own.{name}": tensor for name, tensor in weights.items()}
    reshaped = {name: tensor.flatten() for name, tensor in weights.items()}
    for state in (renamed, reshaped):
        monkeypatch.setattr(vae.network, "state_dict", state.copy)
        assert vae.weights_sha256() != first


def test_what_is_no_vae_is_refused(tmp_path):
    with pytest.raises(VaeError, match=r"expected a folder with config.json"):
        load_vae(str(tmp_path), CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VaeError, match=r"expected an AutoencoderKL"):
        load_vae(str(tmp_path), CPU)


def test_a_pickle_in_the_place_of_weights_is_not_loaded(tmp_path):
    tiny_vae.network().save_pretrained(tmp_path, safe_serialization=False)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.bin"}
    with pytest.raises(VaeError, match="expected an AutoencoderKL"):
        load_vae(str(tmp_path), CPU)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    folder = tiny_vae.save(tmp_path)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    del weights["encoder.conv_in.weight"]
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(VaeError, match=r"got no weights encoder.conv_in.weight \(1 missing\), expected all"):
        load_vae(str(folder), CPU)


@pytest.mark.parametrize("change", [{"latent_channels": 8}, {"block_out_channels": "x"}])
def test_a_configuration_that_does_not_fit_the_weights_is_refused(tmp_path, change):
    folder = tiny_vae.save(tmp_path)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **change}))
    with pytest.raises(VaeError, match="expected an AutoencoderKL"):
        load_vae(str(folder), CPU)


def test_latents_of_another_scale_are_refused(tmp_path):
    with pytest.raises(VaeError, match=r"scaling_factor: got 0.13025, expected 0.18215"):
        load_vae(str(tiny_vae.save(tmp_path, scaling_factor=0.13025)), CPU)


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(VaeError, match=r"pip install 'soflow\[latents\]'"):
        load_vae("anything", CPU)
