"""Builds a small random network whose masks are neither empty nor full, so that comparing masks is meaningful."""

import torch

from mal_train.kernel.networks.network import MalNetwork, ModelConfig


def spread_network(seed: int = 1) -> MalNetwork:
    """Returns vit-micro/16 with narrow heads, logits around 0, and a teacher that differs slightly from the student."""
    torch.manual_seed(seed)
    network = MalNetwork(
        ModelConfig("vit-micro/16", mask_head_num_convs=2, mask_head_hidden_channel=16, mask_head_out_channel=16)
    )
    with torch.no_grad():
        for half in (network.student, network.teacher):
            # Without a common component, the filters respond to edges instead of adding one bias to the crop.
            last = half.roi_head.mlp2
            last.weight.sub_(last.weight.mean(0)).mul_(2)
            last.bias.sub_(last.bias.mean())
            for name, weight in half.mask_head.named_parameters():
                if name.endswith("weight"):
                    weight.sub_(weight.mean((1, 2, 3), keepdim=True)).mul_(2)
        for parameter in network.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return network
