"""Starting weights: matching tensors are loaded and reported, weights of another network are refused."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mal_train.core.errors import ConfigError, UnknownLayout, Untrusted
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.lineage import NOT_STATED
from mal_train.kernel.checkpoint.trust import TrustPolicy, read_signing_key, sign_file, write_signing_key
from mal_train.kernel.convert import pretrained
from mal_train.kernel.convert.pretrained import load_pretrained, published_license
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from tests.reference import shared

MICRO = ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=4)


def make_network(seed: int = 0, config: ModelConfig = MICRO) -> MalNetwork:
    torch.manual_seed(seed)
    return MalNetwork(config)


def backbone(seed: int = 7) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in make_network(seed).student.backbone.state_dict().items()}


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def backbone_equals(network: MalNetwork, weights: dict[str, Tensor]) -> bool:
    loaded = network.student.backbone.state_dict()
    return all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_the_deit_file_loads_into_the_backbone_except_its_classifier() -> None:
    network = make_network(config=ModelConfig("vit-deit-tiny/16"))
    path = shared("weights", "deit_tiny_patch16_224.pt")
    report = load_pretrained(network, str(path))
    assert len(report.loaded) == 150
    assert report.unused == ("head.weight", "head.bias")
    assert {name.split(".")[0] for name in report.missing} == {"roi_head", "mask_head"}
    assert all(part in str(report) for part in ("150 tensors", "roi_head (4), mask_head (8)", "head.weight"))


def test_the_teacher_is_a_copy_of_the_loaded_student(tmp_path: Path) -> None:
    network = make_network()
    load_pretrained(network, save(tmp_path / "a.pt", backbone()))
    for student, teacher in zip(network.student.parameters(), network.teacher.parameters(), strict=True):
        assert torch.equal(student, teacher)
    assert not any(p.requires_grad for p in network.teacher.parameters())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.base_encoder.", "model."])
@pytest.mark.parametrize("wrap", [False, True])
def test_prefixes_and_wrappers_of_published_backbones_are_removed(tmp_path: Path, prefix: str, wrap: bool) -> None:
    weights = {f"{prefix}{name}": tensor for name, tensor in backbone().items()}
    network = make_network()
    load_pretrained(network, save(tmp_path / "a.pth", {"model": weights} if wrap else weights))
    assert backbone_equals(network, backbone())


def test_the_base_encoder_of_a_moco_checkpoint_loads_into_the_backbone(tmp_path: Path) -> None:
    weights = {f"module.base_encoder.{name}": tensor for name, tensor in backbone().items()}
    weights |= {f"module.momentum_encoder.{name}": tensor + 1.0 for name, tensor in backbone().items()}
    weights["module.predictor.0.weight"] = torch.zeros(4, 4)
    network = make_network()
    content = {"epoch": 300, "arch": "vit_base", "state_dict": weights, "optimizer": {"state": {}}}
    report = load_pretrained(network, save(tmp_path / "vit-b-300ep.pth.tar", content))
    assert backbone_equals(network, backbone())
    assert "module.predictor.0.weight" in report.unused


def test_an_arch_without_timm_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="vit-mocov3-base/16"):
        load_pretrained(make_network(), "vit-mocov3-base/16")


def test_safetensors_files_load(tmp_path: Path) -> None:
    save_file(backbone(), tmp_path / "a.safetensors")
    network = make_network()
    report = load_pretrained(network, str(tmp_path / "a.safetensors"))
    assert backbone_equals(network, backbone())
    assert (report.lineage.starting_weights, report.lineage.license) == ("a.safetensors", NOT_STATED)


def test_a_position_table_of_another_grid_is_resampled_and_reported(tmp_path: Path) -> None:
    weights = backbone()
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], torch.full((1, 36, 48), 0.5)], dim=1)
    network = make_network()
    report = load_pretrained(network, save(tmp_path / "a.pt", weights))
    assert report.resampled == ("backbone.pos_embed",)
    table = network.student.backbone.get_parameter("pos_embed")
    torch.testing.assert_close(table.detach()[:, 1:], torch.full((1, 64, 48), 0.5))


def test_a_patch_convolution_of_another_size_is_resampled_and_reported(tmp_path: Path) -> None:
    weights = backbone()
    weights["patch_embed.proj.weight"] = torch.zeros(48, 3, 8, 8)
    assert load_pretrained(make_network(), save(tmp_path / "a.pt", weights)).resampled == (
        "backbone.patch_embed.proj.weight",
    )


def test_a_conv_stem_stays_random_with_weights_of_a_linear_stem(tmp_path: Path) -> None:
    network = make_network(config=ModelConfig("vit-demo/8"))
    torch.manual_seed(3)
    donor = timm.models.VisionTransformer(img_size=96, patch_size=8, embed_dim=192, depth=4, num_heads=3, num_classes=0)
    report = load_pretrained(network, save(tmp_path / "a.pt", donor.state_dict()))
    assert any(name.startswith("backbone.patch_embed.proj.0") for name in report.missing)
    assert report.unused == ("patch_embed.proj.weight", "patch_embed.proj.bias")


def test_weights_of_another_width_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", backbone())
    network = make_network(config=ModelConfig("vit-deit-tiny/16"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ConfigError, match=r"model\.arch"):
        load_pretrained(network, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def _deeper(weights: dict[str, Tensor]) -> None:
    weights |= {name.replace("blocks.1.", "blocks.2."): t for name, t in weights.items() if "blocks.1." in name}


def _shallower(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if "blocks.1." in name]:
        del weights[name]


def _layer_scale(weights: dict[str, Tensor]) -> None:
    weights["blocks.0.ls1.gamma"] = torch.ones(48)


def _distilled(weights: dict[str, Tensor]) -> None:
    weights["dist_token"] = torch.ones(1, 1, 48)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_deeper, r"blocks\.2"),
        (_shallower, r"backbone\.blocks\.1"),
        (_layer_scale, r"blocks\.0\.ls1\.gamma"),
        (_distilled, "dist_token"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path: Path, change: object, named: str) -> None:
    weights = backbone()
    assert callable(change)
    change(weights)
    with pytest.raises(ConfigError, match=named):
        load_pretrained(make_network(), save(tmp_path / "a.pt", weights))


def test_non_finite_weights_are_refused(tmp_path: Path) -> None:
    weights = backbone()
    weights["norm.weight"][3] = float("nan")
    with pytest.raises(ConfigError, match=r"norm\.weight"):
        load_pretrained(make_network(), save(tmp_path / "a.pt", weights))


def test_a_file_without_matching_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match=r"layer1\.weight"):
        load_pretrained(make_network(), save(tmp_path / "resnet.pt", {"layer1.weight": torch.zeros(1)}))


def test_a_malckpt_also_loads_into_the_heads(tmp_path: Path) -> None:
    donor = make_network(9)
    path = tmp_path / "donor.malckpt"
    settings = LabelerConfig(crop_size=64)
    provenance = {"starting_weights_licence": "Apache-2.0"}
    save_checkpoint(path, Checkpoint(MICRO, settings, donor.state_dict(), [], provenance), None)
    network = make_network()
    report = load_pretrained(network, str(path))
    assert report.missing == report.unused == ()
    assert torch.equal(network.student.roi_head.mlp1.weight, donor.student.roi_head.mlp1.weight)
    assert report.lineage.license == "Apache-2.0"


def test_the_lineage_names_the_weights_read_even_if_the_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest.malckpt"
    first, second = ({"starting_weights_licence": license} for license in ("Apache-2.0", "MIT"))
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(), make_network().state_dict(), [], first), None)
    sha256 = load_checkpoint(path, None).sha256

    def load_and_replace(*args: Any, **options: Any) -> Checkpoint:
        loaded = load_checkpoint(*args, **options)
        save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(), make_network(9).state_dict(), [], second), None)
        return loaded

    monkeypatch.setattr(pretrained, "load_checkpoint", load_and_replace)
    lineage = load_pretrained(make_network(), str(path)).lineage
    assert lineage.ancestors[-1] == {"checkpoint": path.name, "sha256": sha256, **first}


def test_a_checkpoint_of_tao_also_loads_into_the_heads(tmp_path: Path) -> None:
    donor = make_network(9)
    weights = {
        name.replace(".weight", ".conv.weight").replace(".bias", ".conv.bias")
        if ".mask_head." in name
        else name: tensor
        for name, tensor in donor.state_dict().items()
    }
    network = make_network()
    load_pretrained(network, save(tmp_path / "tao.pth", {"state_dict": weights}))
    for loaded, expected in zip(network.parameters(), donor.parameters(), strict=True):
        assert torch.equal(loaded, expected)


def test_heads_of_another_width_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "donor.malckpt"
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(crop_size=64), make_network().state_dict(), [], {}), None)
    with pytest.raises(ConfigError, match="mask head"):
        load_pretrained(make_network(config=ModelConfig("vit-micro/16", mask_head_hidden_channel=16)), str(path))


def test_a_timm_name_is_loaded_by_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    # timm reads a file instead of the hub: name check, construction and loading are the real ones.
    overlay = {"file": str(shared("weights", "deit_tiny_patch16_224.pt"))}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=overlay))
    network = make_network(config=ModelConfig("vit-deit-tiny/16"))
    report = load_pretrained(network, "deit_tiny_patch16_224.fb_in1k")
    assert len(report.loaded) == 150
    stored = torch.load(overlay["file"], weights_only=True)["blocks.5.attn.qkv.weight"]
    assert torch.equal(network.student.backbone.state_dict()["blocks.5.attn.qkv.weight"], stored)
    assert load_pretrained(network, "vit-deit-tiny/16").loaded == report.loaded


def test_a_failed_download_is_a_configuration_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ConfigError, match=r"no route to host.*train\.pretrained_model_path.*null"):
        load_pretrained(make_network(config=ModelConfig("vit-deit-tiny/16")), "deit_tiny_patch16_224.fb_in1k")


def test_the_error_of_an_unknown_timm_name_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="deit_small_patch16_224"):
        load_pretrained(make_network(), "deit_smal_patch16_224")


def test_a_missing_file_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"weights/absent\.pt"):
        load_pretrained(make_network(), "weights/absent.pt")


@pytest.mark.parametrize(
    ("source", "license"),
    [
        ("deit_tiny_patch16_224.fb_in1k", "Apache-2.0"),
        ("vit_base_patch16_224.mae", "CC-BY-NC-4.0"),
        ("vit-deit-small/16", "Apache-2.0"),
        ("vit-mae-base/16", "CC-BY-NC-4.0"),
    ],
)
def test_the_license_of_starting_weights_is_known_by_their_name(source: str, license: str) -> None:
    assert published_license(source) == license


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_starting_weights_of_other_programs_need_a_signature_like_checkpoints(tmp_path: Path, name: str) -> None:
    path, key = tmp_path / name, tmp_path / "signing.pem"
    (save_file if path.suffix == ".safetensors" else torch.save)(backbone(), path)
    signer = write_signing_key(key)
    trust = TrustPolicy(signers=(signer,))
    with pytest.raises(Untrusted):
        load_pretrained(make_network(), str(path), trust=trust)
    sign_file(path, read_signing_key(f"file:{key}", "key"))
    network = make_network()
    load_pretrained(network, str(path), trust=trust)
    assert backbone_equals(network, backbone())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(Untrusted):
        load_pretrained(make_network(), str(path), trust=trust)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_starting_weights_are_checked_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for reader in ("torch.load", "load", "load_file"):
        monkeypatch.setattr(f"mal_train.kernel.convert.torch_weights.{reader}", None)
    path = tmp_path / name
    path.write_bytes(b"not the file")
    with pytest.raises(Untrusted):
        load_pretrained(make_network(), str(path), trust=TrustPolicy(sha256=("0" * 64,)))


def test_what_is_parsed_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, inner = tmp_path / "a.pt", TrustPolicy.check
    torch.save(backbone(), path)
    trust = TrustPolicy(sha256=(hashlib.sha256(path.read_bytes()).hexdigest(),))

    def exchanged(*args: Any) -> Any:
        found = inner(*args)
        torch.save({name: torch.zeros_like(tensor) for name, tensor in backbone().items()}, path)
        return found

    monkeypatch.setattr(TrustPolicy, "check", exchanged)
    network = make_network()
    load_pretrained(network, str(path), trust=trust)
    assert backbone_equals(network, backbone())


@pytest.mark.parametrize("source", ["vit-deit-tiny/16", "deit_tiny_patch16_224.fb_in1k"])
@pytest.mark.parametrize(
    "trust",
    [TrustPolicy(sha256=("0" * 64,)), TrustPolicy(signers=("ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=",))],
)
def test_weights_that_are_downloaded_have_no_signature(source: str, trust: TrustPolicy) -> None:
    with pytest.raises(ConfigError, match=source):
        load_pretrained(make_network(), source, trust=trust)
