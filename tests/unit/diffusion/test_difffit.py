"""DiffFit: what is trained, the adapter that it leaves, and folding."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddsr_core.diffusion.difffit import (
    ROWS,
    TABLE,
    Adapter,
    extract,
    fold,
    initialize_rows,
    load_adapter,
    save_adapter,
    table_rows,
    unfreeze,
)
from ddsr_core.diffusion.dit import DIT_XL_2_512, DiT
from ddsr_core.errors import InputError
from tests.helpers.tiny_base import SHAPE, tiny_dit

LABELS = {label: label for label in range(3)}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((5, 4, 4, 4), generator=generator)
    return x, torch.tensor([0, 10, 300, 700, 999]), torch.tensor([0, 1, 2, 12, 1])


def trained(gamma_blocks: int = 2) -> tuple[DiT, Adapter]:
    """A model whose adapter has taken values of its own."""
    model = tiny_dit()
    trainable = unfreeze(model, gamma_blocks)
    rows = table_rows(LABELS, SHAPE.null_row)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable.items():
            if name != TABLE:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        trainable[TABLE][rows] += torch.randn((len(rows), SHAPE.hidden), generator=generator)
    return model, Adapter(extract(trainable, rows), LABELS, "base", gamma_blocks)


def test_counts_of_dit_xl_2_512():
    with torch.device("meta"):
        model = DiT(DIT_XL_2_512)
        trainable = unfreeze(model, 14)
    sizes = {name: p.numel() for name, p in trainable.items()}
    assert sum(sizes.values()) == 1_739_552
    assert sum(n for name, n in sizes.items() if "bias" in name) == 489_632
    assert sum(n for name, n in sizes.items() if "gamma" in name) == 96_768
    assert sizes[TABLE] == 1_153_152
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(sizes)
    adapter = sum(n for name, n in sizes.items() if name != TABLE) + 8 * DIT_XL_2_512.hidden
    assert adapter == 595_616


def test_gammas_start_as_ones_in_the_first_blocks_only_and_change_nothing():
    model = tiny_dit()
    with torch.no_grad():
        before = model(*inputs())
        trainable = unfreeze(model, 2)
        assert torch.equal(model(*inputs()), before)
    gammas = {name for name in trainable if "gamma" in name}
    assert {name.split(".")[1] for name in gammas} == {"0", "1"}
    assert len(gammas) == 8


def test_more_gamma_blocks_than_blocks_means_all():
    assert len([name for name in unfreeze(tiny_dit(), 99) if "gamma" in name]) == 4 * SHAPE.depth


def test_only_the_rows_of_the_batch_get_gradient_and_adamw_leaves_the_others_alone():
    model = tiny_dit()
    trainable = unfreeze(model, 2)
    table = model.y_embedder.embedding_table.weight
    before = table.detach().clone()
    optimizer = torch.optim.AdamW(list(trainable.values()), lr=1e-2, weight_decay=0.0, fused=True)
    x, t, y = inputs()
    for _ in range(3):
        optimizer.zero_grad()
        model(x, t, y).square().mean().backward()
        optimizer.step()
    assert table.grad is not None
    touched = table_rows(LABELS, SHAPE.null_row)
    assert table.grad.abs().sum(1).nonzero().flatten().tolist() == touched
    changed = (table.detach() != before).any(1).nonzero().flatten().tolist()
    assert changed == touched


@pytest.mark.parametrize("gamma_blocks", [0, 2, 3])
def test_folded_equals_unfolded(gamma_blocks: int):
    model, _ = trained(gamma_blocks)
    with torch.no_grad():
        before = model(*inputs())
        fold(model)
        torch.testing.assert_close(model(*inputs()), before, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == set(tiny_dit().state_dict())


def test_an_adapter_read_back_gives_the_model_back(tmp_path: Path):
    model, adapter = trained()
    save_adapter(tmp_path, adapter, adapter.tensors, {"steps": 3})
    again = tiny_dit()
    load_adapter(tmp_path, "raw").apply(again, "base")
    with torch.no_grad():
        assert torch.equal(again(*inputs()), model(*inputs()))


def test_an_adapter_holds_only_what_can_have_changed(tmp_path: Path):
    _, adapter = trained()
    save_adapter(tmp_path, adapter, adapter.tensors, {})
    stored = load_file(tmp_path / "adapter.safetensors")
    assert stored[ROWS].shape == (len(LABELS) + 1, SHAPE.hidden)
    assert TABLE not in stored
    assert all(name == ROWS or "bias" in name or "gamma" in name for name in stored)


def test_raw_and_averaged_weights_are_told_apart(tmp_path: Path):
    _, adapter = trained()
    save_adapter(tmp_path, adapter, {name: value + 1 for name, value in adapter.tensors.items()}, {})
    difference = load_adapter(tmp_path, "ema").tensors[ROWS] - load_adapter(tmp_path, "raw").tensors[ROWS]
    assert torch.allclose(difference, torch.ones_like(difference))


def test_labels_of_ten_and_more_keep_their_rows(tmp_path: Path):
    label_map = {label: label for label in range(12)}
    model = tiny_dit()
    trainable = unfreeze(model, 0)
    with torch.no_grad():
        trainable[TABLE].copy_(torch.arange(13.0)[:, None].expand(13, SHAPE.hidden))
    adapter = Adapter(extract(trainable, table_rows(label_map, SHAPE.null_row)), label_map, "base", 0)
    save_adapter(tmp_path, adapter, adapter.tensors, {})
    again = tiny_dit()
    loaded = load_adapter(tmp_path)
    loaded.apply(again, "base")
    assert loaded.label_map == label_map
    rows = again.y_embedder.embedding_table.weight.detach()[:, 0]
    assert rows[[loaded.label_map[2], loaded.label_map[10], SHAPE.null_row]].tolist() == [2, 10, 12]


def test_another_base_is_refused():
    _, adapter = trained()
    with pytest.raises(InputError, match="another base model"):
        adapter.apply(tiny_dit(), "other")


def test_tensors_that_do_not_fit_are_refused_by_name():
    _, adapter = trained()
    bias = "blocks.0.attn.qkv.bias"
    short = Adapter({**adapter.tensors, bias: torch.zeros(1)}, LABELS, "base", 2)
    with pytest.raises(InputError, match=bias.replace(".", r"\.")):
        short.apply(tiny_dit(), "base")


def test_a_folder_without_an_adapter_and_a_damaged_one(tmp_path: Path):
    with pytest.raises(InputError, match="no adapter here"):
        load_adapter(tmp_path)
    _, adapter = trained()
    save_adapter(tmp_path, adapter, adapter.tensors, {})
    facts = json.loads((tmp_path / "adapter.json").read_text())
    del facts["label_map"]
    (tmp_path / "adapter.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="damaged"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_ema.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="damaged"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("start", ["imagenet_rows", "null"])
def test_first_values_of_the_rows(start: str):
    model, reference = tiny_dit(), tiny_dit()
    initialize_rows(model, LABELS, start)
    table, before = model.y_embedder.embedding_table.weight, reference.y_embedder.embedding_table.weight
    for row in LABELS.values():
        assert torch.equal(table[row], before[row if start == "imagenet_rows" else SHAPE.null_row])
    assert torch.equal(table[3:], before[3:])
