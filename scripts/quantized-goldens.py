#!/usr/bin/env python3
"""Makes goldens (expected values) of quantized weights, without aoji.

    pip install gguf==0.19.0 numpy
    scripts/quantized-goldens.py formats tests/host/quantized/goldens.json   values of small blocks and matrices: in the tree
    scripts/quantized-goldens.py requantize FILE.gguf TYPE OUT.gguf          a GGUF file with its matrices in another type
    scripts/quantized-goldens.py dequantize FILE.gguf OUT                    the same model as a Hugging Face directory in f32

GGUF's values come from the package `gguf`. Those of Hugging Face's formats are computed from codes, scales and zero points before these are
packed as each format says.
"""
import json
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
# bytes of a block, weights of a block, where its f16 numbers are
LAYOUT = {"Q4_0": (18, 32, [0]), "Q4_1": (20, 32, [0, 2]), "Q5_0": (22, 32, [0]), "Q5_1": (24, 32, [0, 2]),
          "Q8_0": (34, 32, [0]), "Q4_K": (144, 256, [0, 2]), "Q5_K": (176, 256, [0, 2]), "Q6_K": (210, 256, [208])}


def f32_hex(x):
    return np.ascontiguousarray(x, dtype="<f4").tobytes().hex()


def blocks(rng):
    """Random bytes, with scales from subnormal to large, of both signs, and zero."""
    for name in TYPES:
        size, weights, halves = LAYOUT[name]
        n = 8 if weights == 32 else 3
        data = rng.integers(0, 256, (n, size), dtype=np.uint8)
        for at in halves:
            scales = (rng.normal(size=n) * 10.0 ** rng.integers(-7, 3, n)).astype("<f2")
            scales[0] = 0 if at else scales[0]
            data[:, at:at + 2] = scales.view(np.uint8).reshape(n, 2)
        yield name, {"bytes": data.tobytes().hex(), "values": f32_hex(dequantize(data.reshape(-1), Type[name]))}


def e4m3(code):
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = mantissa / 8 * 2.0 ** -6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def words(codes, bits, axis):
    """Packs along an axis from the lowest bits up; the last word may be partly empty."""
    per = 32 // bits
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    codes = np.concatenate([codes, np.zeros(codes.shape[:-1] + (-codes.shape[-1] % per,), np.uint32)], axis=-1)
    codes = codes.reshape(codes.shape[:-1] + (-1, per))
    packed = np.zeros(codes.shape[:-1], np.uint32)
    for i in range(per):
        packed |= codes[..., i] << np.uint32(bits * i)
    return np.ascontiguousarray(np.moveaxis(packed, -1, axis))


def matrix(rng, name, rows, cols, group, bits, zeros, order=None):
    """Codes [rows, cols], a scale and a zero point for each group, packed as `name` says."""
    groups = -(-cols // group)
    scales = (rng.uniform(0.5, 2, (rows, groups)) * 1e-2).astype("<f2")
    codes = rng.integers(0, 1 << bits, (rows, cols))
    points = rng.integers(0, 1 << bits, (rows, groups)) if zeros else np.full((rows, groups), 1 << bits - 1)
    of = order if order is not None else np.arange(cols) // group
    values = (codes - points[:, of]).astype(np.float32) * scales.astype(np.float32)[:, of]
    entry = {"rows": rows, "cols": cols, "group": [1, group], "scale": "F16", "values": f32_hex(values)}
    if name.startswith("gptq"):
        stored = (points - (0 if name.startswith("gptq_v2") else 1)) % (1 << bits)
        codes, scales, points = words(codes, bits, 1).T, scales.T, words(stored, bits, 0).T
    elif name == "awq":
        nibble = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # nibble i of a word is row 8 w + nibble[i]
        pack = lambda m: words(m.reshape(-1, 8, m.shape[1])[:, nibble].reshape(m.shape), 4, 0).T
        codes, scales, points = pack(codes), scales.T, pack(points)
    else:
        codes, points = words(codes, bits, 1), words(points, bits, 0)
    raw = lambda x: np.ascontiguousarray(x).tobytes().hex()
    entry |= {"bits": bits, "codes": raw(codes), "scales": raw(scales)}
    if zeros or name.startswith(("gptq", "awq")):
        entry["zeros"] = raw(points)
    if order is not None:
        entry["groups"] = raw(order.astype("<i4"))
    return entry


def byte_matrix(rng, name, rows, cols, high, wide, dtype):
    """A byte for each code, a scale for each tile."""
    codes = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
    if name.startswith("e4m3"):
        codes[codes & 127 == 127] = 0x7E  # what is no number
        q = np.array([e4m3(int(code)) for code in codes.flat], np.float32).reshape(codes.shape)
    else:
        q = codes.view(np.int8).astype(np.float32)
    scales = rng.uniform(0.5, 2, (-(-rows // high), -(-cols // wide))).astype(np.float32)
    if dtype == "BF16":
        scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    tiled = np.repeat(np.repeat(scales, high, 0)[:rows], wide, 1)[:, :cols]
    stored = (scales.view(np.uint32) >> 16).astype("<u2") if dtype == "BF16" else scales.astype("<f4")
    return {"rows": rows, "cols": cols, "group": [high, wide], "scale": dtype, "bits": 8, "values": f32_hex(q * tiled),
            "codes": codes.tobytes().hex(), "scales": stored.tobytes().hex()}


def formats(out):
    rng = np.random.default_rng(15)
    order = rng.permutation(np.arange(32) // 16)
    grouped = {
        "e4m3 row": byte_matrix(rng, "e4m3", 16, 32, 1, 32, "BF16"),
        "e4m3 block": byte_matrix(rng, "e4m3", 16, 32, 5, 12, "F32"),
        "e4m3 tensor": byte_matrix(rng, "e4m3", 16, 32, 16, 32, "F32"),
        "int8 row": byte_matrix(rng, "int8", 16, 32, 1, 32, "BF16"),
        "packed": matrix(rng, "packed", 16, 32, 16, 4, False),
        "packed zeros": matrix(rng, "packed", 16, 32, 8, 4, True),
        "packed 8": matrix(rng, "packed", 16, 32, 32, 8, True),
        "packed odd": matrix(rng, "packed", 10, 32, 16, 4, True),
        "packed order": matrix(rng, "packed", 16, 32, 16, 4, True, order),
        "gptq": matrix(rng, "gptq", 16, 32, 16, 4, True),
        "gptq order": matrix(rng, "gptq", 16, 32, 16, 4, True, order),
        "gptq 8": matrix(rng, "gptq", 16, 32, 16, 8, True),
        "gptq_v2": matrix(rng, "gptq_v2", 16, 32, 16, 4, True),
        "awq": matrix(rng, "awq", 16, 32, 16, 4, True),
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in grouped.items()]
    blocks_ = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in blocks(rng)]
    text = '{"blocks": {\n' + ",\n".join(blocks_) + '\n}, "grouped": {\n' + ",\n".join(lines) + "\n}}\n"
    Path(out).write_text(text)


def tensors(reader):
    for t in reader.tensors:
        yield t, dequantize(t.data, t.tensor_type).reshape([int(n) for n in reversed(t.shape)]).astype(np.float32)


def requantize(source, kind, out):
    """Matrices in another type, vectors in F32; F16, BF16 and F32 count as types."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value, kinds = field.contents(), field.types
        writer.add_key_value(field.name, value, kinds[0], sub_type=kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None)
    for t, values in tensors(reader):
        to = Type[kind] if values.ndim == 2 else Type.F32
        writer.add_tensor(t.name, quantize(values, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantized(source, out):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(source)
    key = lambda name: reader.fields[name].contents() if name in reader.fields else None
    heads, kv_heads = key("llama.attention.head_count"), key("llama.attention.head_count_kv")
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    ends = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight"}
    header, data, at = {}, [], 0
    for t, w in tensors(reader):
        if t.name in ends:
            name = ends[t.name]
        else:
            _, layer, own, _ = t.name.split(".")
            name = f"model.layers.{layer}.{names[own]}.weight"
            n = {"attn_q": heads, "attn_k": kv_heads}.get(own)
            if n:  # neighbours rotate together there, halves here
                w = w.reshape(n, w.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)
        header[name] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": [at, at + w.nbytes]}
        at += w.nbytes
        data.append(np.ascontiguousarray(w, dtype="<f4").tobytes())
    text = json.dumps(header).encode()
    with open(out / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.writelines(data)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
              "hidden_size": key("llama.embedding_length"), "intermediate_size": key("llama.feed_forward_length"),
              "num_hidden_layers": key("llama.block_count"), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
              "rms_norm_eps": key("llama.attention.layer_norm_rms_epsilon"), "rope_theta": key("llama.rope.freq_base"),
              "max_position_embeddings": key("llama.context_length"), "vocab_size": len(key("tokenizer.ggml.tokens")),
              "bos_token_id": key("tokenizer.ggml.bos_token_id"), "eos_token_id": key("tokenizer.ggml.eos_token_id"),
              "tie_word_embeddings": "lm_head.weight" not in header}
    (out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    commands = {"formats": formats, "requantize": requantize, "dequantize": dequantized}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
