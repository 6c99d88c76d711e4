"""LyCORIS networks mean to lycoris-lora what they mean to us: its own modules give our output from our files."""

import pytest
import torch
from lycoris.modules import get_module, make_module
from safetensors.torch import load_file
from torch import nn

from library.networks.file import save_network
from library.networks.metadata import Description
from tests.networks.support import both, network_on, relative
from tests.networks.test_contract import TABLES, label

OWN = [table for table in TABLES if table["network_module"] != "full"]


@pytest.mark.parametrize("table", OWN, ids=label)
def test_lycoris_applies_our_file_as_we_do(tmp_path, table: dict) -> None:
    ours, _ = both(tmp_path / "base")
    network = network_on(ours, **table)
    (file,) = save_network(tmp_path / "n.safetensors", network.export(), Description("n"), dtype=torch.float32)
    tensors = load_file(file)
    checked = 0
    for path, linear in ours.linears().items():
        name = "lora_unet_" + path.replace(".", "_")
        kind, weights = get_module(tensors, name)
        if kind is None:
            assert linear.adapter is None
            continue
        plain = nn.Linear(linear.in_features, linear.out_features)
        plain.load_state_dict({"weight": linear.weight, "bias": linear.bias})
        with torch.no_grad():
            module = make_module(kind, weights, name, plain)
        module.apply_to()
        x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(1))
        assert relative(plain(x), linear(x)) < 2e-5, path
        checked += 1
    assert checked == len(network.by_path) == 20
