"""Packed copies of networks, compared with the networks themselves."""

import pytest
import torch

from mal_train.kernel.networks import packing
from mal_train.kernel.networks.heads import ConvRelu
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.kernel.networks.packing import PackedConvRelu, PackedLinear, packed


@pytest.fixture(autouse=True)
def _packs_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_is_packing_faster", lambda: True)


ARCHS = ["vit-micro/16", "vit-demo/8", "fan_tiny_12_p16_224", "fan_tiny_8_p4_hybrid"]


def small_network(arch: str) -> MalNetwork:
    torch.manual_seed(0)
    return MalNetwork(ModelConfig(arch, mask_head_hidden_channel=16, mask_head_out_channel=16)).eval()


@pytest.mark.parametrize("arch", ARCHS)
def test_a_packed_network_has_the_logits_of_the_network_in_float32(arch: str) -> None:
    student = small_network(arch).student
    x, sizes = torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    with torch.inference_mode():
        torch.testing.assert_close(packed(student, torch.float32)(x, sizes), student(x, sizes), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_packed_network_is_close_to_autocast_in_bfloat16(arch: str) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16 kernels of oneDNN, so nothing is packed")
    student = small_network(arch).student
    assert any(isinstance(layer, PackedLinear) for layer in packed(student, torch.bfloat16).modules())
    x, sizes = torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    with torch.inference_mode():
        exact = student(x, sizes)
        with torch.autocast("cpu", torch.bfloat16):
            autocast, ours = student(x, sizes), packed(student, torch.bfloat16)(x, sizes)
    # GELU before instead of after rounding to bfloat16: the error must not grow.
    assert float((ours - exact).abs().mean()) <= 1.2 * float((autocast - exact).abs().mean()) + 1e-6


@pytest.mark.parametrize("count", [1, 2, 5, 17])
@pytest.mark.parametrize("threads", [1, 2])
def test_packed_layers_do_not_depend_on_the_batch_in_float32(count: int, threads: int) -> None:
    torch.manual_seed(0)
    linear, convolution = torch.nn.Linear(64, 96), ConvRelu(16, 32, 3, padding=1)
    fast_linear, fast_convolution = packed(linear, torch.float32), packed(convolution, torch.float32)
    assert isinstance(fast_linear, PackedLinear)
    assert isinstance(fast_convolution, PackedConvRelu)
    tokens, maps = torch.randn(count, 37, 64), torch.randn(count, 16, 14, 14)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            assert torch.equal(fast_linear(tokens)[:1], fast_linear(tokens[:1]))
            assert torch.equal(fast_convolution(maps)[:1], fast_convolution(maps[:1]))
            torch.testing.assert_close(fast_convolution(maps), convolution(maps), atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_packing_leaves_the_network_as_it_was() -> None:
    network = small_network("vit-micro/16")
    names = [(name, tensor.dtype) for name, tensor in network.state_dict().items()]
    packed(network.student, torch.bfloat16)
    assert [(name, tensor.dtype) for name, tensor in network.state_dict().items()] == names
    assert isinstance(network.student.mask_head.convs[0], ConvRelu)


def test_weights_are_packed_only_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear(8, 8)
    assert isinstance(packed(linear, torch.float32), PackedLinear)
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert isinstance(packed(linear, torch.float32), torch.nn.Linear)
