"""Starting weights: what fits is loaded and told, what belongs to another network is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mal_train.core.errors import ConfigError, UnknownLayout
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.lineage import NOT_STATED
from mal_train.kernel.convert import pretrained
from mal_train.kernel.convert.pretrained import load_pretrained, published_license
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from tests.reference import shared

MICRO = ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=4)


def network(seed: int = 0, config: ModelConfig = MICRO) -> MalNetwork:
    torch.manual_seed(seed)
    return MalNetwork(config)


def backbone(seed: int = 7) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network(seed).student.backbone.state_dict().items()}


def save(path: Path, content: object) -> str:
    torch.save(content, path)
    return str(path)


def same(ours: MalNetwork, weights: dict[str, Tensor]) -> bool:
    found = ours.student.backbone.state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_the_deit_file_fills_the_backbone_and_leaves_its_classifier() -> None:
    ours = network(config=ModelConfig("vit-deit-tiny/16"))
    path = shared("weights", "deit_tiny_patch16_224.pt")
    report = load_pretrained(ours, str(path))
    assert len(report.loaded) == 150
    assert report.left_over == ("head.weight", "head.bias")
    assert {name.split(".")[0] for name in report.missing} == {"roi_head", "mask_head"}
    assert "150 tensors loaded; starting random: roi_head (4), mask_head (8); left over: head.weight" in str(report)


def test_the_teacher_follows_the_loaded_student(tmp_path: Path) -> None:
    ours = network()
    load_pretrained(ours, save(tmp_path / "a.pt", backbone()))
    for student, teacher in zip(ours.student.parameters(), ours.teacher.parameters(), strict=True):
        assert torch.equal(student, teacher)
    assert not any(p.requires_grad for p in ours.teacher.parameters())


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.base_encoder.", "model."])
@pytest.mark.parametrize("wrap", [False, True])
def test_prefixes_and_wrappers_of_published_backbones_are_seen_through(tmp_path: Path, prefix: str, wrap: bool) -> None:
    weights = {f"{prefix}{name}": tensor for name, tensor in backbone().items()}
    ours = network()
    load_pretrained(ours, save(tmp_path / "a.pth", {"model": weights} if wrap else weights))
    assert same(ours, backbone())


def test_a_moco_checkpoint_fills_the_backbone_from_its_base_encoder(tmp_path: Path) -> None:
    weights = {f"module.base_encoder.{name}": tensor for name, tensor in backbone().items()}
    weights |= {f"module.momentum_encoder.{name}": tensor + 1.0 for name, tensor in backbone().items()}
    weights["module.predictor.0.weight"] = torch.zeros(4, 4)
    ours = network()
    content = {"epoch": 300, "arch": "vit_base", "state_dict": weights, "optimizer": {"state": {}}}
    report = load_pretrained(ours, save(tmp_path / "vit-b-300ep.pth.tar", content))
    assert same(ours, backbone())
    assert "module.predictor.0.weight" in report.left_over


def test_an_arch_whose_weights_timm_lacks_asks_for_a_file() -> None:
    with pytest.raises(ConfigError, match="timm has none for this arch; give a file"):
        load_pretrained(network(), "vit-mocov3-base/16")


def test_safetensors_files_load(tmp_path: Path) -> None:
    save_file(backbone(), tmp_path / "a.safetensors")
    ours = network()
    report = load_pretrained(ours, str(tmp_path / "a.safetensors"))
    assert same(ours, backbone())
    assert (report.origin.starting_weights, report.origin.license) == ("a.safetensors", NOT_STATED)


def test_another_grid_of_positions_is_resampled_and_told(tmp_path: Path) -> None:
    weights = backbone()
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], torch.full((1, 36, 48), 0.5)], dim=1)
    ours = network()
    report = load_pretrained(ours, save(tmp_path / "a.pt", weights))
    assert report.resampled == ("backbone.pos_embed",)
    table = ours.student.backbone.get_parameter("pos_embed")
    torch.testing.assert_close(table.detach()[:, 1:], torch.full((1, 64, 48), 0.5))


def test_another_patch_size_is_resampled_and_told(tmp_path: Path) -> None:
    weights = backbone()
    weights["patch_embed.proj.weight"] = torch.zeros(48, 3, 8, 8)
    assert load_pretrained(network(), save(tmp_path / "a.pt", weights)).resampled == (
        "backbone.patch_embed.proj.weight",
    )


def test_a_conv_stem_keeps_its_random_start_under_weights_of_a_linear_one(tmp_path: Path) -> None:
    ours = network(config=ModelConfig("vit-demo/8"))
    torch.manual_seed(3)
    donor = timm.models.VisionTransformer(img_size=96, patch_size=8, embed_dim=192, depth=4, num_heads=3, num_classes=0)
    report = load_pretrained(ours, save(tmp_path / "a.pt", donor.state_dict()))
    assert any(name.startswith("backbone.patch_embed.proj.0") for name in report.missing)
    assert report.left_over == ("patch_embed.proj.weight", "patch_embed.proj.bias")


def test_weights_of_another_width_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", backbone())
    ours = network(config=ModelConfig("vit-deit-tiny/16"))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ConfigError, match=r"has shape .* belong to another model.arch"):
        load_pretrained(ours, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


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
    ("change", "message"),
    [
        (_deeper, "holds blocks.2"),
        (_shallower, "lacks backbone.blocks.1"),
        (_layer_scale, "holds blocks.0.ls1.gamma"),
        (_distilled, "holds dist_token"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path: Path, change: object, message: str) -> None:
    weights = backbone()
    assert callable(change)
    change(weights)
    with pytest.raises(ConfigError, match=message):
        load_pretrained(network(), save(tmp_path / "a.pt", weights))


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    weights = backbone()
    weights["norm.weight"][3] = float("nan")
    with pytest.raises(ConfigError, match=r"norm.weight holds NaN"):
        load_pretrained(network(), save(tmp_path / "a.pt", weights))


def test_loading_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match=r"nothing in it fits our backbones; it begins with layer1\.weight"):
        load_pretrained(network(), save(tmp_path / "resnet.pt", {"layer1.weight": torch.zeros(1)}))


def test_a_checkpoint_of_ours_fills_heads_too(tmp_path: Path) -> None:
    donor = network(9)
    path = tmp_path / "donor.malckpt"
    settings = LabelerConfig(crop_size=64)
    provenance = {"starting_weights_licence": "Apache-2.0"}
    save_checkpoint(path, Checkpoint(MICRO, settings, donor.state_dict(), [], provenance), None)
    ours = network()
    report = load_pretrained(ours, str(path))
    assert report.missing == report.left_over == ()
    assert torch.equal(ours.student.roi_head.mlp1.weight, donor.student.roi_head.mlp1.weight)
    assert report.origin.license == "Apache-2.0"


def test_the_origin_names_the_weights_that_were_read_though_the_file_has_moved_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest.malckpt"
    first, second = ({"starting_weights_licence": license} for license in ("Apache-2.0", "MIT"))
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(), network().state_dict(), [], first), None)
    sha256 = load_checkpoint(path, None).sha256

    def load_and_move_on(*args: Any, **options: Any) -> Checkpoint:
        read = load_checkpoint(*args, **options)
        save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(), network(9).state_dict(), [], second), None)
        return read

    monkeypatch.setattr(pretrained, "load_checkpoint", load_and_move_on)
    origin = load_pretrained(network(), str(path)).origin
    assert origin.lineage[-1] == {"checkpoint": path.name, "sha256": sha256, **first}


def test_a_checkpoint_of_tao_fills_heads_too(tmp_path: Path) -> None:
    donor = network(9)
    weights = {
        name.replace(".weight", ".conv.weight").replace(".bias", ".conv.bias")
        if ".mask_head." in name
        else name: tensor
        for name, tensor in donor.state_dict().items()
    }
    ours = network()
    load_pretrained(ours, save(tmp_path / "tao.pth", {"state_dict": weights}))
    for found, expected in zip(ours.parameters(), donor.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_heads_of_another_width_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "donor.malckpt"
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(crop_size=64), network().state_dict(), [], {}), None)
    with pytest.raises(ConfigError, match="settings of the mask head"):
        load_pretrained(network(config=ModelConfig("vit-micro/16", mask_head_hidden_channel=16)), str(path))


def test_a_timm_name_goes_through_timms_own_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    # timm reads a file in place of the hub: its name check, construction and loading are the real ones.
    overlay = {"file": str(shared("weights", "deit_tiny_patch16_224.pt"))}
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=overlay))
    ours = network(config=ModelConfig("vit-deit-tiny/16"))
    report = load_pretrained(ours, "deit_tiny_patch16_224.fb_in1k")
    assert len(report.loaded) == 150
    stored = torch.load(overlay["file"], weights_only=True)["blocks.5.attn.qkv.weight"]
    assert torch.equal(ours.student.backbone.state_dict()["blocks.5.attn.qkv.weight"], stored)
    assert load_pretrained(ours, "vit-deit-tiny/16").loaded == report.loaded


def test_a_failed_download_says_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ConfigError, match=r"no route to host.*give its path"):
        load_pretrained(network(config=ModelConfig("vit-deit-tiny/16")), "deit_tiny_patch16_224.fb_in1k")


def test_a_name_that_timm_lacks_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'deit_small_patch16_224"):
        load_pretrained(network(), "deit_smal_patch16_224")


def test_a_missing_file_is_a_mistake_of_the_setting() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_pretrained(network(), "weights/absent.pt")


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        ("deit_tiny_patch16_224.fb_in1k", "Apache-2.0"),
        ("vit_base_patch16_224.mae", "CC-BY-NC-4.0"),
        ("vit-deit-small/16", "Apache-2.0"),
        ("vit-mae-base/16", "CC-BY-NC-4.0"),
    ],
)
def test_the_license_of_starting_weights_is_known_by_their_name(source: str, license: str) -> None:
    assert published_license(source) == license
