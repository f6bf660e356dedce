"""SAE files that are damaged, or say what no SAE is: one line that names the file and field, before memory is taken."""

import json
import struct
import zipfile

import pytest
import torch
from format_examples import D, F, folded
from safetensors.torch import load_file, save_file

from raysae.errors import UserError
from raysae.sae import formats

HUGE = (1 << 20, 1 << 20)  # float32 of this shape take 4 TB


def expanded(*shape):
    """A tensor of one stored number: torch.save writes 1.6 kB of it."""
    return torch.zeros(1).expand(*shape)


def refused(path, **stated):
    """The one line that `path` is refused with."""
    with pytest.raises(UserError) as caught:
        formats.read(path, **stated)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 900 and str(path) in line
    return line


# ----------------------------------------------------------------------------------------------------------------------
# The config beside weights

DEEP = "[" * 200_000 + "]" * 200_000
CFG = {
    "d_sae -16": ({"d_sae": -16}, "d_sae: cfg.json of"),
    "d_sae 0": ({"d_sae": 0}, "says 0, which is no size"),
    "d_sae 2^70": ({"d_sae": 1 << 70}, "d_sae:"),
    "d_in 2^40": ({"d_in": 1 << 40}, "but its W_enc has shape [8, 32]"),
    "d_sae true": ({"d_sae": True}, "says True, which is no size"),
    "d_sae list": ({"d_sae": [32]}, "d_sae:"),
    "architecture list": ({"architecture": ["topk"]}, "architecture ['topk']; known: standard"),
    "architecture mapping": ({"architecture": {"topk": 1}}, "architecture {'topk': 1}; known"),
    "architecture long": ({"architecture": "x" * 1_000_000}, "architecture 'xxx"),
    "block with a list": ({"architecture": ["topk"], "raysae": {"config": {"architecture": ["topk"]}}}, "known"),
    "k true": ({"k": True}, "whose config has no k"),
    "k 2^70": ({"k": 1 << 70}, "must lie in 1..d_sae=32"),
    "seed of words": ({"raysae": {"config": {"architecture": "topk", "seed": "7"}}}, "seed:"),
    "coefficient list": ({"raysae": {"config": {"architecture": "topk", "l1_coefficient": [1]}}}, "l1_coefficient:"),
    "activation_fn long": ({"activation_fn": ["x" * 1_000_000]}, "activation_fn ['xxx"),
}


@pytest.mark.parametrize("case", CFG)
def test_a_saelens_config_that_says_what_no_sae_is(case, tmp_path):
    changes, said = CFG[case]
    formats.save(folded("topk"), tmp_path / "sae")
    file = tmp_path / "sae/cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert said in refused(tmp_path / "sae")


@pytest.mark.parametrize("format,name", [("saelens", "cfg"), ("sparsify", "cfg"), ("dictionary_learning", "config")])
@pytest.mark.parametrize(
    "content,said",
    [
        (DEEP, "nested deeper than 50 levels"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", "nested deeper than 50 levels"),
        ("null", "must hold a mapping"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b"", "not JSON"),
        (b" " * (17 << 20), "a config has at most"),
    ],
    ids=["200,000 deep", "900 deep", "null", "UTF-16", "empty", "17 MB"],
)
def test_a_config_that_is_no_config(format, name, content, said, tmp_path):
    formats.write(folded("topk"), tmp_path / "sae", format)
    (tmp_path / f"sae/{name}.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused(tmp_path / "sae") and f"{name}.json" in refused(tmp_path / "sae")


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"dict_class": ["AutoEncoderTopK"]}, "dict_class ['AutoEncoderTopK']"),
        ({"k": "4"}, "k:"),
        ({"k": [4]}, "k:"),
        ({"target_l0": "6"}, "target_l0:"),
    ],
)
def test_a_dictionary_learning_config_of_wrong_types(changes, said, tmp_path):
    formats.write(folded("topk"), tmp_path / "sae", "dictionary_learning")
    config = json.loads((tmp_path / "sae/config.json").read_text())
    (tmp_path / "sae/config.json").write_text(json.dumps({"trainer": config["trainer"] | changes}))
    assert said in refused(tmp_path / "sae")


# ----------------------------------------------------------------------------------------------------------------------
# Tensors, through every reader

WEIGHTS = {
    "NaN": (lambda t: t * torch.nan, "NaN or infinite"),
    "inf": (lambda t: t + torch.inf, "NaN or infinite"),
    "float64 beyond float32": (lambda t: t.double() * 1e300, "NaN or infinite"),
    "bool": (lambda t: t > 0, "holds it as bool"),
    "int": (lambda t: t.to(torch.int32), "holds it as int32"),
    "complex": (lambda t: t.to(torch.complex64), "holds it as complex64"),
}
PICKLED = {
    "sparse": (lambda t: t.to_sparse(), "holds it as sparse_coo"),
    "csr": (lambda t: t.to_sparse_csr() if t.ndim == 2 else t.to_sparse(), "holds it as sparse_cs"),
    "meta": (lambda t: t.to("meta"), "holds it as meta"),
    "one number": (lambda t: expanded(*t.shape), "over 1 stored numbers"),
}
PLACES = {  # format: (file, the tensor that is changed)
    "saelens": ("sae_weights.safetensors", "W_enc"),
    "sparsify": ("sae.safetensors", "W_dec"),
    "dictionary_learning": ("ae.pt", "encoder.weight"),
    "state_dict": ("sae.pt", "encoder.weight"),
    "openai": ("8.pt", "decoder.weight"),
}


def changed(tmp_path, format, change):
    """(what is read, options) of a TopK SAE with `change` made to one of its weights."""
    file, name = PLACES[format]
    p = folded("topk").parameters
    if format == "state_dict":
        linear = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"]}
        tensors = linear | {"decoder.weight": p["W_dec"].T, "decoder.bias": p["b_dec"]}
    elif format == "openai":
        linear = {"encoder.weight": p["W_enc"].T, "latent_bias": p["b_enc"], "normalize": False}
        tensors = linear | {"decoder.weight": p["W_dec"].T, "pre_bias": p["b_dec"]}
    else:
        formats.write(folded("topk"), tmp_path / "sae", format)
        path = tmp_path / "sae" / file
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    (tmp_path / "sae").mkdir(exist_ok=True)
    tensors[name] = change(tensors[name].contiguous())
    path = tmp_path / "sae" / file
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    one_file = format in formats.FILES
    return (path if one_file else path.parent), ({"activation": "topk:4"} if one_file else {})


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize(
    "kind,format",
    [(kind, format) for kind in WEIGHTS for format in PLACES]
    + [(kind, format) for kind in PICKLED for format in ("dictionary_learning", "state_dict", "openai")],
)
def test_a_weight_that_is_none(kind, format, tmp_path):
    change, said = (WEIGHTS | PICKLED)[kind]
    path, stated = changed(tmp_path, format, change)
    line = refused(path, **stated)
    assert said in line and line.startswith((PLACES[format][1], "W_enc", "W_dec", "b_enc"))


@pytest.mark.parametrize("shape", [(D, 0), (0, F), (0, 0)])
def test_an_sae_of_no_latents_or_inputs(shape, tmp_path):
    d_in, d_sae = shape
    tensors = {"W_enc": torch.zeros(shape), "b_enc": torch.zeros(d_sae), "W_dec": torch.zeros(d_sae, d_in)}
    formats.save(folded("relu"), tmp_path / "sae")
    save_file({**tensors, "b_dec": torch.zeros(d_in)}, tmp_path / "sae/sae_weights.safetensors")
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    (tmp_path / "sae/cfg.json").write_text(json.dumps(cfg | {"d_in": d_in, "d_sae": d_sae}))
    refused(tmp_path / "sae")
    linear = {"encoder.weight": torch.zeros(d_sae, d_in), "encoder.bias": torch.zeros(d_sae)}
    more = {"decoder.weight": torch.zeros(d_in, d_sae), "decoder.bias": torch.zeros(d_in)}
    torch.save(linear | more, tmp_path / "sae.pt")
    assert "its shape must be [d_in, d_sae]" in refused(tmp_path / "sae.pt", activation="relu")


def test_two_kilobytes_that_ask_for_terabytes(tmp_path):
    d_sae, d_in = HUGE
    linear = {"encoder.weight": expanded(*HUGE), "encoder.bias": expanded(d_sae)}
    torch.save(linear | {"decoder.weight": expanded(d_in, d_sae), "decoder.bias": expanded(d_in)}, tmp_path / "sae.pt")
    assert (tmp_path / "sae.pt").stat().st_size < 4096
    assert "over 1 stored numbers" in refused(tmp_path / "sae.pt", activation="relu")
    folder = tmp_path / "sae"
    formats.write(folded("matryoshka"), folder, "dictionary_learning")
    state = torch.load(folder / "ae.pt")
    torch.save(state | {"group_sizes": torch.ones(1, dtype=torch.int64).expand(1 << 40)}, folder / "ae.pt")
    assert "group_sizes" not in formats.read(folder).metadata or len(formats.read(folder).metadata["group_sizes"]) < F


class Asks:
    """Unpickled, it takes 17 GB; torch's weights-only reader allows it."""

    def __reduce__(self):
        return bytearray, (17_000_000_000,)


def test_a_pickle_that_asks_for_memory_is_not_run(tmp_path):
    torch.save({"encoder.weight": torch.zeros(F, D), "more": Asks()}, tmp_path / "sae.pt")
    assert "pickled code (__builtin__.bytearray), which is never run" in refused(tmp_path / "sae.pt")


def test_a_packed_archive_is_not_unpacked(tmp_path):
    torch.save({"encoder.weight": torch.zeros(1000, 1000)}, tmp_path / "a.pt")
    stored = zipfile.ZipFile(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "sae.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    assert (tmp_path / "sae.pt").stat().st_size < 20_000
    assert "or is damaged" in refused(tmp_path / "sae.pt", activation="relu")


# ----------------------------------------------------------------------------------------------------------------------
# Files cut short


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 0.5, -1])
def test_a_safetensors_file_that_is_cut_short_is_called_that(kept, tmp_path):
    formats.save(folded("topk"), tmp_path / "sae")
    file = tmp_path / "sae/sae_weights.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    line = refused(tmp_path / "sae")
    assert "is cut short" in line and "pickle" not in line


@pytest.mark.parametrize("length", [0x80, 0x280])
def test_a_header_whose_length_starts_like_a_pickle_is_none(length, tmp_path):
    formats.save(folded("topk"), tmp_path / "sae")
    header = json.dumps({"W_enc": {"dtype": "F32", "shape": [8, 32], "data_offsets": [0, 1024]}}).encode()
    content = struct.pack("<Q", length) + header.ljust(length) + bytes(1000)
    (tmp_path / "sae/sae_weights.safetensors").write_bytes(content)
    assert f"is cut short: {8 + length + 1000:,} bytes of {8 + length + 1024:,}" in refused(tmp_path / "sae")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_pt_file_that_is_cut_short(share, tmp_path):
    torch.save({"encoder.weight": torch.zeros(F, D)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "sae.pt").write_bytes(whole[: int(share * len(whole))])
    assert "or is damaged" in refused(tmp_path / "sae.pt", activation="relu")
