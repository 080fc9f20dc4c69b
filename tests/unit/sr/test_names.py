"""Weights under public names: files as their authors wrote them load here, and ours open in spandrel."""

import pytest
import torch
from spandrel import ModelLoader
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.RCAN import RCAN

from ddsr_core.errors import ConfigError
from ddsr_core.sr.basicsr_compat import import_basicsr
from ddsr_core.sr.networks import build_network, own_names, public_names, recognize
from ddsr_core.sr.weights import load_network, save_weights

SMALL_RCAN = {"feat": 16, "groups": 2, "blocks": 3, "reduction": 4, "scale": 4}
SMALL_RRDB = {"feat": 8, "blocks": 2, "grow": 32, "scale": 4}


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def enlarged_by_spandrel(path, lr):
    """Through its own loader; the clone because its RCAN writes into its input."""
    descriptor = ModelLoader("cpu").load_from_file(path)
    with torch.no_grad():
        return descriptor.architecture.id, descriptor.model.eval()(lr.clone())


def as_first_esrgan(state, blocks):
    """Real-ESRGAN's names to those of ESRGAN's first files, written out from the two lists of layers."""
    outer = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}", "conv_up1": "model.3"}
    outer |= {"conv_up2": "model.6", "conv_hr": "model.8", "conv_last": "model.10"}
    inner = {
        f"body.{i}.rdb{j}.conv{k}": f"model.1.sub.{i}.RDB{j}.conv{k}.0"
        for i in range(blocks)
        for j in (1, 2, 3)
        for k in range(1, 6)
    }
    names = outer | inner
    return {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in state.items()}


def as_realsr(state, blocks):
    """Real-ESRGAN's names to RealSR's and BSRGAN's."""
    outer = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    renamed = {}
    for name, value in state.items():
        place, _, kind = name.rpartition(".")
        place = outer.get(place, place).replace("body.", "RRDB_trunk.").replace(".rdb", ".RDB")
        renamed[f"{place}.{kind}"] = value
    return renamed


def test_the_authors_rcan_key_by_key():
    """Full size: spandrel's class has the authors' names and shapes, and its weights come back as they were."""
    theirs = shapes(RCAN().state_dict())
    with torch.device("meta"):
        ours = build_network("rcan").state_dict()
    assert shapes(public_names("rcan", ours)) == theirs
    assert len(theirs) == 1634  # 10 x 20 blocks of 8, 15 convolutions outside them, the two mean shifts
    back = own_names("rcan", public_names("rcan", ours))
    assert shapes(back) == shapes(ours)
    assert all(back[name] is ours[name] for name in ours)
    assert recognize(public_names("rcan", ours))[0] == "rcan"


def test_rcan_file_in_and_out(tmp_path):
    torch.manual_seed(0)
    theirs = RCAN(n_resgroups=2, n_resblocks=3, n_feats=16, reduction=4).eval()
    torch.save({"params_ema": theirs.state_dict()}, tmp_path / "rcan.pth")
    loaded = load_network(tmp_path / "rcan.pth")
    lr = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        sr = loaded.module(lr)
        torch.testing.assert_close(sr, theirs(lr.clone()), rtol=0, atol=1e-5)
    assert (loaded.scale, type(loaded.module).__module__) == (4, "ddsr_core.sr.archs.rcan")

    save_weights(tmp_path / "ours", loaded.module, "rcan", SMALL_RCAN, 4, {})
    for name in ("weights.pth", "weights.safetensors"):
        architecture, again = enlarged_by_spandrel(tmp_path / "ours" / name, lr)
        assert architecture == "RCAN"
        torch.testing.assert_close(again, sr, rtol=0, atol=1e-5)
    assert torch.equal(load_network(tmp_path / "ours").module(lr), sr)


def test_basicsrs_rcan_file_loads(tmp_path):
    torch.manual_seed(0)
    theirs = import_basicsr("archs.rcan_arch").RCAN(3, 3, num_feat=16, num_group=2, num_block=3, squeeze_factor=4).eval()
    torch.save({"params": theirs.state_dict()}, tmp_path / "rcan.pth")
    lr = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        torch.testing.assert_close(load_network(tmp_path / "rcan.pth").module(lr), theirs(lr), rtol=0, atol=1e-6)


def test_the_authors_rrdbnet_key_by_key():
    """Full size: ESRGAN's first files are spandrel's class, Real-ESRGAN's are basicsr's; both lists are whole."""
    with torch.device("meta"):
        ours = build_network("rrdbnet").state_dict()
        first = ESRGAN().state_dict()
        second = import_basicsr("archs.rrdbnet_arch").RRDBNet(3, 3).state_dict()
    assert len(ours) == 702  # 23 x 3 x 5 + 6 convolutions
    assert shapes(public_names("rrdbnet", ours)) == shapes(second)
    assert shapes(own_names("rrdbnet", first)) == shapes(ours)
    assert shapes(as_first_esrgan(ours, 23)) == shapes(first)
    for state in (ours, first, as_realsr(ours, 23)):
        assert recognize(state) == ("rrdbnet", {"feat": 64, "blocks": 23, "grow": 32, "scale": 4})


@pytest.mark.parametrize("naming", [as_first_esrgan, as_realsr, lambda state, blocks: state])
def test_rrdbnet_files_of_every_naming(naming, tmp_path):
    torch.manual_seed(0)
    theirs = import_basicsr("archs.rrdbnet_arch").RRDBNet(3, 3, num_feat=8, num_block=2, num_grow_ch=32).eval()
    torch.save(naming(theirs.state_dict(), 2), tmp_path / "rrdb.pth")
    loaded = load_network(tmp_path / "rrdb.pth")
    lr = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        sr = loaded.module(lr)
        torch.testing.assert_close(sr, theirs(lr), rtol=0, atol=1e-6)
    torch.testing.assert_close(enlarged_by_spandrel(tmp_path / "rrdb.pth", lr)[1], sr, rtol=0, atol=1e-6)

    save_weights(tmp_path / "ours", loaded.module, "rrdbnet", SMALL_RRDB, 4, {})
    architecture, again = enlarged_by_spandrel(tmp_path / "ours/weights.pth", lr)
    assert architecture == "ESRGAN"
    torch.testing.assert_close(again, sr, rtol=0, atol=1e-6)


def test_an_x2_file_of_realesrgan_is_opened_as_our_network(tmp_path):
    network = ESRGAN(num_filters=8, num_blocks=1, in_nc=12, shuffle_factor=2).eval()
    torch.save(network.state_dict(), tmp_path / "x.pth")
    loaded, lr = load_network(tmp_path / "x.pth"), torch.rand(1, 3, 8, 10)
    assert (loaded.name, loaded.scale) == ("rrdbnet-small", 2)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(lr), network(lr), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("extra", "scale"), [({"scale": 2}, 2), ({"plus": True}, 4)])
def test_other_members_of_the_family_are_left_to_spandrel(extra, scale, tmp_path):
    network = ESRGAN(num_filters=8, num_blocks=1, **extra).eval()
    torch.save(network.state_dict(), tmp_path / "x.pth")
    loaded = load_network(tmp_path / "x.pth")
    assert (loaded.name, loaded.scale) == ("ESRGAN", scale)


def test_the_authors_srformer_keys():
    with torch.device("meta"):
        ours = build_network("srformer-light").state_dict()
    public = public_names("srformer-light", {name: torch.zeros(value.shape) for name, value in ours.items()})
    block = "layers.0.residual_group.blocks.1."
    found = {name.removeprefix(block): tuple(value.shape) for name, value in public.items() if name.startswith(block)}
    assert found["mlp.dwconv.depthwise_conv.0.weight"] == (120, 1, 5, 5)
    assert found["attn.aligned_relative_position_index"] == (256, 64)
    assert found["attn_mask"] == (4, 256, 64)
    assert own_names("srformer-light", public).keys() == ours.keys()
    assert recognize(public)[0] == "srformer-light"


@pytest.mark.parametrize(("head", "scale"), [("classical", 2), ("classical", 3), ("classical", 4), ("real", 4)])
def test_files_of_the_large_srformers_open(tmp_path, head, scale):
    torch.manual_seed(0)
    kwargs = {"embed": 24, "depths": [2, 1], "heads": [2, 2], "window": 8, "mlp_ratio": 2.0, "scale": scale, "head": head}
    network = build_network("srformer", kwargs).eval()
    state = public_names("srformer", network.state_dict())
    assert {name for name in state if not name.startswith("layers.")} == OUTER | HEAD_OF[head, scale]
    assert recognize(state)[1] == kwargs
    torch.save({"params": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "srformer.pth")
    loaded, lr = load_network(tmp_path / "srformer.pth"), torch.rand(1, 3, 11, 9)
    assert loaded.scale == scale
    with torch.no_grad():
        sr = loaded.module(lr)
        torch.testing.assert_close(sr, network(lr), rtol=0, atol=0)
    assert sr.shape == (1, 3, 11 * scale, 9 * scale)
    save_weights(tmp_path / "ours", loaded.module, "srformer", kwargs, scale, {})
    with torch.no_grad():
        torch.testing.assert_close(load_network(tmp_path / "ours").module(lr), sr, rtol=0, atol=1e-6)


#: Names outside the transformer's layers, written out from the authors' list of layers.
OUTER = {f"{name}.{kind}" for name in ("conv_first", "patch_embed.norm", "norm", "conv_after_body")
         for kind in ("weight", "bias")}  # fmt: skip
HEAD_OF = {
    key: {f"{name}.{kind}" for name in ("conv_before_upsample.0", "conv_last", *names) for kind in ("weight", "bias")}
    for key, names in {
        ("classical", 2): ("upsample.0",), ("classical", 3): ("upsample.0",), ("classical", 4): ("upsample.0", "upsample.2"),
        ("real", 4): ("conv_up1", "conv_up2", "conv_hr"),
    }.items()
}  # fmt: skip


def test_the_large_srformer_has_its_size():
    with torch.device("meta"):
        state = build_network("srformer").state_dict()
    # published: 10.5 million parameters, and 529 rows in each table of biases for windows of 24 pixels
    assert state["layers.0.residual_group.blocks.0.attn.relative_position_bias_table"].shape == (529, 6)
    assert recognize(state)[0] == "srformer"


def test_no_head_at_a_scale_that_it_does_not_have():
    with pytest.raises(ConfigError, match="no head 'real' for x2"):
        build_network("srformer", {"head": "real", "scale": 2})


@pytest.mark.parametrize(("head", "upsampler"), [("classical", "pixelshuffle"), ("real", "nearest+conv")])
def test_the_large_srformers_agree_with_spandrels_extra_architectures(head, upsampler):
    extra = pytest.importorskip("spandrel_extra_arches.architectures.SRFormer", reason="partly non-commercial, absent")
    torch.manual_seed(0)
    size = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 8, "mlp_ratio": 2}
    theirs = extra.SRFormer(upscale=4, img_size=16, upsampler=upsampler, **size).eval()
    state = own_names("srformer", theirs.state_dict())
    name, kwargs = recognize(theirs.state_dict())
    assert kwargs["head"] == head
    ours = build_network(name, kwargs).eval()
    ours.load_state_dict(state)
    lr = torch.rand(1, 3, 24, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(lr), theirs(lr), rtol=0, atol=2e-6)


def test_srformer_opens_in_spandrels_extra_architectures(tmp_path):
    """On an image of three windows a side, where the masks in the file do not fit and are made anew."""
    extra = pytest.importorskip("spandrel_extra_arches", reason="spandrel_extra_arches, partly non-commercial, is absent")
    extra.install(ignore_duplicates=True)
    torch.manual_seed(0)
    kwargs = {"embed": 16, "depths": [2, 2], "heads": [2, 2], "window": 8, "mlp_ratio": 2.0, "scale": 4}
    network = build_network("srformer-light", kwargs).eval()
    save_weights(tmp_path, network, "srformer-light", kwargs, 4, {})
    lr = torch.rand(1, 3, 24, 20)
    for name in ("weights.pth", "weights.safetensors"):
        architecture, sr = enlarged_by_spandrel(tmp_path / name, lr)
        assert architecture == "SRFormer"
        with torch.no_grad():
            torch.testing.assert_close(sr, network(lr), rtol=0, atol=2e-6)
