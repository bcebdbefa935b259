"""GGUF: block formats against decoders written from their definition, the rotary permutation, metadata, errors, `load`."""

from __future__ import annotations

import struct

import gguf as ggml
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meetjax.errors import MeetjaxError
from meetjax.models import sites
from meetjax.models.gguf import Tensor, dequantise, read_gguf_config, read_header, unpermute
from meetjax.models.load import load

WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 32, 64, 4, 2, 2
TOKENS = ["<|end|>", *(chr(c) for c in range(33, 91)), "AB"]
BASE = {
    "context_length": 64,
    "embedding_length": WIDTH,
    "feed_forward_length": HIDDEN,
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def random_tensors(arch: str, *, head: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors under llama.cpp's names in (out, in) layout, in the row order of the file."""
    rng, kv = np.random.default_rng(seed), WIDTH // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    if head:
        shapes["output.weight"] = (len(TOKENS), WIDTH)
    block = {
        "attn_norm.weight": (WIDTH,),
        "ffn_norm.weight": (WIDTH,),
        "attn_q.weight": (WIDTH, WIDTH),
        "attn_k.weight": (kv, WIDTH),
        "attn_v.weight": (kv, WIDTH),
        "attn_output.weight": (WIDTH, WIDTH),
        "ffn_gate.weight": (HIDDEN, WIDTH),
        "ffn_up.weight": (HIDDEN, WIDTH),
        "ffn_down.weight": (WIDTH, HIDDEN),
    }
    if arch == "qwen2":
        block |= {"attn_q.bias": (WIDTH,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in block.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path, arch="llama", tensors=None, kind=Kind.F32, meta=None, drop=(), tokenizer=True):
    """A GGUF file as llama.cpp's converter lays it out: matrices in `kind`, vectors in float32."""
    writer = ggml.GGUFWriter(path, arch)
    keys = {f"{arch}.{key}": value for key, value in BASE.items()} | (meta or {})
    for key, value in keys.items():
        if key not in drop:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
        writer.add_token_merges(["A B"])
        writer.add_eos_token_id(0)
    for name, tensor in (random_tensors(arch) if tensors is None else tensors).items():
        if tensor.ndim == 2 and kind != Kind.F32:
            writer.add_tensor(name, ggml.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def error_of(call) -> str:
    with pytest.raises(MeetjaxError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reference decoders: one block of bytes -> its values, element by element, from the block layouts of ggml.


def half(raw: bytes) -> np.float32:
    return np.float32(struct.unpack("<e", raw)[0])


def decode_q8_0(b: bytes) -> list:
    return [half(b[:2]) * np.float32(q) for q in struct.unpack("<32b", b[2:])]


def decode_q4_0(b: bytes) -> list:
    d, q = half(b[:2]), b[2:]
    return [d * np.float32((x & 15) - 8) for x in q] + [d * np.float32((x >> 4) - 8) for x in q]


def decode_q4_1(b: bytes) -> list:
    d, m, q = half(b[:2]), half(b[2:4]), b[4:]
    return [d * np.float32(x & 15) + m for x in q] + [d * np.float32(x >> 4) + m for x in q]


def fifth_bits(raw: bytes) -> list[int]:
    bits = int.from_bytes(raw, "little")
    return [(bits >> j & 1) << 4 for j in range(32)]


def decode_q5_0(b: bytes) -> list:
    d, high, q = half(b[:2]), fifth_bits(b[2:6]), b[6:]
    low = [x & 15 for x in q] + [x >> 4 for x in q]
    return [d * np.float32((lo | hi) - 16) for lo, hi in zip(low, high, strict=True)]


def decode_q5_1(b: bytes) -> list:
    d, m, high, q = half(b[:2]), half(b[2:4]), fifth_bits(b[4:8]), b[8:]
    low = [x & 15 for x in q] + [x >> 4 for x in q]
    return [d * np.float32(lo | hi) + m for lo, hi in zip(low, high, strict=True)]


def scale_and_min(j: int, s: bytes) -> tuple[int, int]:
    """Eight 6-bit scales and eight 6-bit minima in twelve bytes."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4


def decode_q4_k(b: bytes) -> list:
    d, dmin, scales, q, out = half(b[:2]), half(b[2:4]), b[4:16], b[16:], []
    for j in range(8):
        scale, low = scale_and_min(j, scales)
        for x in q[32 * (j // 2) : 32 * (j // 2) + 32]:
            out.append(d * np.float32(scale) * np.float32(x >> 4 if j % 2 else x & 15) - dmin * np.float32(low))
    return out


def decode_q5_k(b: bytes) -> list:
    d, dmin, scales, high, q, out = half(b[:2]), half(b[2:4]), b[4:16], b[16:48], b[48:], []
    for j in range(8):
        scale, low = scale_and_min(j, scales)
        for i, x in enumerate(q[32 * (j // 2) : 32 * (j // 2) + 32]):
            value = (x >> 4 if j % 2 else x & 15) + (16 if high[i] >> j & 1 else 0)
            out.append(d * np.float32(scale) * np.float32(value) - dmin * np.float32(low))
    return out


def decode_q6_k(b: bytes) -> list:
    low, high, scales, d, out = b[:128], b[128:192], struct.unpack("<16b", b[192:208]), half(b[208:]), [None] * 256
    for part in range(2):
        for i in range(32):
            for quarter in range(4):
                nibble = low[64 * part + 32 * (quarter % 2) + i] >> (4 if quarter > 1 else 0) & 15
                value = (nibble | (high[32 * part + i] >> 2 * quarter & 3) << 4) - 32
                out[128 * part + 32 * quarter + i] = d * np.float32(scales[8 * part + 2 * quarter + i // 16]) * np.float32(value)
    return out


DECODERS = {  # kind -> (bytes in a block, where its half-precision scales lie, decoder)
    Kind.Q8_0: (34, (0,), decode_q8_0),
    Kind.Q4_0: (18, (0,), decode_q4_0),
    Kind.Q4_1: (20, (0, 2), decode_q4_1),
    Kind.Q5_0: (22, (0,), decode_q5_0),
    Kind.Q5_1: (24, (0, 2), decode_q5_1),
    Kind.Q4_K: (144, (0, 2), decode_q4_k),
    Kind.Q5_K: (176, (0, 2), decode_q5_k),
    Kind.Q6_K: (210, (208,), decode_q6_k),
}


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_block_formats(kind):
    size, scales, decode = DECODERS[kind]
    rng = np.random.default_rng(int(kind))
    blocks = [bytearray(rng.bytes(size)) for _ in range(6)]
    for block in blocks:
        for at in scales:
            block[at : at + 2] = struct.pack("<e", rng.normal())
    values = np.array([decode(bytes(block)) for block in blocks], np.float32).reshape(3, -1)
    data = np.frombuffer(b"pad" + b"".join(blocks), np.uint8)
    np.testing.assert_array_equal(dequantise(data, Tensor(values.shape, kind, 3)), values)


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1], ids=lambda kind: kind.name
)
def test_load_every_kind(tmp_path, kind):
    tensors = random_tensors("qwen2", head=True)
    model = load(write_gguf(tmp_path / "tiny.gguf", "qwen2", tensors, kind))
    assert model.name == f"tiny (GGUF {kind.name})"
    assert jax.tree.map(np.shape, model.params) == sites.shapes(model.config)
    # Half a step of the coarsest grid: the range of a block of 32 normal values, at most 8, over 2^bits - 1 steps.
    bound = {Kind.F32: 0, Kind.F16: 2e-3, Kind.BF16: 2e-2, Kind.Q8_0: 0.04}.get(kind, 0.3 if kind.name.startswith("Q5") else 0.6)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for layer in range(LAYERS):
        for site, name in names.items():
            found, original = model.params["blocks"][site][layer], tensors[f"blk.{layer}.{name}.weight"].T
            assert np.abs(found - original).max() <= bound
        np.testing.assert_array_equal(model.params["blocks"]["q_bias"][layer], tensors[f"blk.{layer}.attn_q.bias"])
        np.testing.assert_array_equal(model.params["blocks"]["attn_norm"][layer], tensors[f"blk.{layer}.attn_norm.weight"])
    assert np.abs(model.params["embed"] - tensors["token_embd.weight"]).max() <= bound
    assert np.abs(model.params["head"] - tensors["output.weight"].T).max() <= bound
    np.testing.assert_array_equal(model.params["norm"], tensors["output_norm.weight"])


def test_unpermuted_rows_turn_interleaved_rope_into_half_split_rope():
    rng, width = np.random.default_rng(0), 8
    interleaved, x, angle = rng.normal(size=(3 * width, 5)), rng.normal(size=5), rng.normal(size=width // 2)
    pairs = (interleaved @ x).reshape(3, width // 2, 2)
    rotated = np.stack(
        [pairs[..., 0] * np.cos(angle) - pairs[..., 1] * np.sin(angle), pairs[..., 0] * np.sin(angle) + pairs[..., 1] * np.cos(angle)], -1
    )
    halves = (unpermute(interleaved, 3) @ x).reshape(3, 2, width // 2)
    first, second = halves[:, 0] * np.cos(angle) - halves[:, 1] * np.sin(angle), halves[:, 0] * np.sin(angle) + halves[:, 1] * np.cos(angle)
    np.testing.assert_allclose(np.concatenate([rotated[..., 0], rotated[..., 1]], -1), np.concatenate([first, second], -1), rtol=1e-12)


def test_llama_query_and_key_rows_are_unpermuted_and_qwen2_rows_are_not(tmp_path):
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # a head of 8: the first of every pair, then the second
    rows = np.concatenate([8 * head + np.array(order) for head in range(HEADS)])
    tensors = random_tensors("llama")
    blocks = load(write_gguf(tmp_path / "a.gguf", "llama", tensors)).params["blocks"]
    np.testing.assert_array_equal(blocks["q"][1], tensors["blk.1.attn_q.weight"][rows].T)
    np.testing.assert_array_equal(blocks["k"][1], tensors["blk.1.attn_k.weight"][rows[: 8 * KV_HEADS]].T)
    np.testing.assert_array_equal(blocks["v"][1], tensors["blk.1.attn_v.weight"].T)
    tensors = random_tensors("qwen2")
    blocks = load(write_gguf(tmp_path / "b.gguf", "qwen2", tensors)).params["blocks"]
    np.testing.assert_array_equal(blocks["q"][1], tensors["blk.1.attn_q.weight"].T)


def test_llama_biases_are_read_and_unpermuted(tmp_path):
    tensors, rng = random_tensors("llama"), np.random.default_rng(1)
    for layer in range(LAYERS):
        for name, size in {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2, "attn_output": WIDTH}.items():
            tensors[f"blk.{layer}.{name}.bias"] = rng.normal(size=size).astype(np.float32)
    model = load(write_gguf(tmp_path / "a.gguf", "llama", tensors))
    assert model.config.biases == ("k", "o", "q", "v")
    np.testing.assert_array_equal(model.params["blocks"]["q_bias"][0][:8], tensors["blk.0.attn_q.bias"][[0, 2, 4, 6, 1, 3, 5, 7]])
    np.testing.assert_array_equal(model.params["blocks"]["o_bias"][0], tensors["blk.0.attn_output.bias"])


def test_config_from_metadata(tmp_path):
    meta = {
        "llama.rope.freq_base": 5e5,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 3,
    }
    config = load(write_gguf(tmp_path / "a.gguf", meta=meta)).config
    assert (config.model_type, config.vocab, config.width, config.hidden, config.layers) == ("llama", len(TOKENS), 32, 64, 2)
    assert (config.heads, config.kv_heads, config.head_width, config.max_position) == (4, 2, 8, 64)
    assert config.norm_eps == 1e-5 and config.rope_theta == 5e5  # the decimals of config.json, not their float32 neighbours
    assert config.tied_head and config.biases == () and config.sliding_window is None
    assert config.bos_token_id == 1 and config.eos_token_ids == (0, 3)
    untied = load(write_gguf(tmp_path / "b.gguf", tensors=random_tensors("llama", head=True), meta={"llama.attention.sliding_window": 16}))
    assert not untied.config.tied_head and untied.config.sliding_window == 16 and untied.config.model_type == "mistral"


def llama3_factors(factor: float, theta: float = 5e5) -> np.ndarray:
    """What llama.cpp's converter stores: the divisor of every rotary frequency."""
    out = []
    for i in range(0, WIDTH // HEADS, 2):
        wavelength = 2 * np.pi * theta ** (i / (WIDTH // HEADS))
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_rope_scaling(tmp_path):
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    config = load(write_gguf(tmp_path / "a.gguf", meta=linear)).config
    assert (config.rope_scaling.kind, config.rope_scaling.factor) == ("linear", 2.5)
    theta = {"llama.rope.freq_base": 5e5}
    tensors = random_tensors("llama") | {"rope_freqs.weight": llama3_factors(8.0)}
    scaling = load(write_gguf(tmp_path / "b.gguf", tensors=tensors, meta=theta)).config.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == ("llama3", 8.0, 1.0, 4.0)
    assert scaling.original_max_position == 8192
    tensors["rope_freqs.weight"] = llama3_factors(8.0) * np.array([1, 1.1, 1, 1], np.float32)
    assert "rope_freqs.weight" in error_of(lambda: load(write_gguf(tmp_path / "c.gguf", tensors=tensors, meta=theta)))
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    assert "yarn" in error_of(lambda: load(write_gguf(tmp_path / "d.gguf", meta=yarn)))


def test_header_agrees_with_the_reader_of_gguf(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", kind=Kind.Q8_0)
    header, _ = read_header(path)
    reader = ggml.GGUFReader(path)
    assert header.meta == {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    theirs = {t.name: Tensor(tuple(t.shape.tolist()[::-1]), t.tensor_type, t.data_offset) for t in reader.tensors}
    assert header.tensors == theirs


def test_sharded_equals_plain(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", kind=Kind.Q4_1)
    plain = load(path)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = {3: PartitionSpec(None, "data", "model"), 2: PartitionSpec("model"), 1: PartitionSpec("data")}

    def is_shape(node):
        return isinstance(node, tuple)

    shardings = jax.tree.map(lambda shape: NamedSharding(mesh, spec[len(shape)]), sites.shapes(plain.config), is_leaf=is_shape)
    sharded = load(path, shardings=shardings)
    assert sharded.params["blocks"]["q"].sharding.shard_shape((2, 32, 32)) == (2, 8, 16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), plain.params, sharded.params)
    assert plain.fingerprint == sharded.fingerprint == load(path, dtype="bfloat16").fingerprint


def test_broken_files(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    content = path.read_bytes()
    for keep in (0, 3, 20, 300, 1000):
        path.write_bytes(content[:keep])
        assert "not a whole GGUF file" in error_of(lambda: load(path))
    path.write_bytes(content[:-200])
    message = error_of(lambda: load(path))
    assert "ends inside tensor blk.1." in message and f"{len(content) - 200} bytes" in message
    path.write_bytes(b"GGML" + content[4:])
    assert "magic" in error_of(lambda: load(path))
    path.write_bytes(content[:4] + b"\x00\x00\x00\x03" + content[8:])
    assert "little-endian" in error_of(lambda: load(path))
    assert "no such file" in error_of(lambda: load(tmp_path / "none.gguf"))


def test_tensor_errors(tmp_path):
    good, name = random_tensors("llama"), "blk.1.ffn_up.weight"
    cases = {
        "is missing": {key: tensor for key, tensor in good.items() if key != name},
        "shape of": good | {name: np.zeros((WIDTH, HIDDEN), np.float32)},
        "unexpected tensor": good | {"blk.1.ffn_up.weight.extra": good[name]},
    }
    for number, (what, tensors) in enumerate(cases.items()):
        path = write_gguf(tmp_path / f"{number}.gguf", tensors=tensors)
        message = error_of(lambda: load(path))  # noqa: B023
        assert what in message and name in message and str(path) in message
    path = tmp_path / "type.gguf"
    writer = ggml.GGUFWriter(path, "llama")
    writer.add_tensor(name, np.zeros((2, 84), np.uint8), raw_dtype=Kind.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = error_of(lambda: load(path))
    assert name in message and "Q2_K" in message and "Q4_K" in message


@pytest.mark.parametrize("key", [f"llama.{key}" for key in BASE if not key.endswith("_kv")])
def test_missing_metadata_names_the_key(tmp_path, key):
    assert key in error_of(lambda: load(write_gguf(tmp_path / "a.gguf", drop=(key,))))


def test_other_models_are_refused(tmp_path):
    path = tmp_path / "a.gguf"
    assert "general.architecture" in error_of(lambda: load(write_gguf(path, "gemma")))
    assert "expert_count" in error_of(lambda: load(write_gguf(path, meta={"llama.expert_count": 8})))
    assert "rope.dimension_count" in error_of(lambda: load(write_gguf(path, meta={"llama.rope.dimension_count": 4})))
    assert "split" in error_of(lambda: load(write_gguf(path, meta={"split.count": 2})))
    assert "attention.head_count" in error_of(lambda: load(write_gguf(path, meta={"llama.attention.head_count": "4"})))
    header, data = read_header(write_gguf(path, tensors={}))
    assert "token_embd.weight" in error_of(lambda: read_gguf_config(header, data, "a.gguf"))
