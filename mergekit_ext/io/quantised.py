"""Quantised checkpoints as the plain models that they stand for: each weight when it is read.

`dequantised` makes the headers of the weights from those of what is stored. The libraries that own
the formats turn codes into weights.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from mergekit_ext.errors import ConfigError, MergeError, Problem, listing, one_line, tensors_at
from mergekit_ext.io.headers import NARROW, PACKED, TensorHeader

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Where a configuration describes it, and how.
Quantisation: TypeAlias = tuple[str, dict[str, Any]]
_FIELDS = ("quantization_config", "compression_config")
_UNQUANTISED = "Give the model as it was before quantisation, or dequantise it and save that."
# Scales, zero points and tables as their writers name them: compressed-tensors, fine-grained fp8,
# bitsandbytes, MXFP4, torchao, quanto. `of` is what they belong to.
_BESIDE = re.compile(
    r"(?P<of>.+?)(?:_(?:scale|scale_inv|scales|zero_point|global_scale|blocks)"
    r"|\.(?:absmax|quant_map|quant_state\..+|SCB|_scale|_zero_point)|:_?(?:scale|qdata))"
)
# GPTQ, AWQ, HQQ, compressed-tensors: packed codes have names of their own.
_PACKED = re.compile(r".*\.(?:qweight|qzeros|W_q|weight_packed)")
# Of what quantised layers compute.
_ACTIVATIONS = re.compile(
    r".*\.(?:activation_scale|(?:input|output)_(?:scale|zero_point|global_scale)|[qkv]+_scale)"
)
_CODES = NARROW | {"I8", "U8"}
_COMPRESSED = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")


@dataclass(frozen=True)
class QuantisedHeader(TensorHeader):
    """A weight that is made of stored pieces; shape and dtype are the weight's."""

    pieces: tuple[tuple[str, TensorHeader], ...] = ()
    format: Any = None

    @property
    def stored(self) -> tuple[TensorHeader, ...]:
        return tuple(header for _, header in self.pieces)

    def load(self) -> Tensor:
        own = {header.name: header for header in self.stored}
        return self.read(lambda name: own[name].load())

    def read(self, get: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, in `dtype` or bfloat16; `get` returns what is stored under a name."""
        import torch

        pieces = {piece: get(header.name) for piece, header in self.pieces}
        wanted = dtype or torch.bfloat16
        tensor: Tensor = self.format.read(self.name, pieces).to(wanted)
        if tensor.shape != self.shape:
            raise MergeError(f"{self.name}: codes of {list(tensor.shape)} for {list(self.shape)}.")
        return tensor


# A format is made of the settings in config.json. Its `pattern` finds pieces, and `of` what they
# are; the weight's name is that and `ending`, under which there may be one more, called weight.
class _Fp8:
    """Scales of tensors or blocks (arXiv:2412.19437, section 3.3); AutoFP8 omits `_inv`."""

    pattern = re.compile(r"(?P<of>.+)_(?P<piece>scale)(?:_inv|(?<=\.weight_scale))")
    ending, needs, precision, library = "", ("weight", "scale"), "fp8", ""

    def __init__(self, settings: Mapping[str, Any]):
        self._block = settings.get("weight_block_size")

    def _grid(self, codes: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Return the block, and the shape of the scales of these codes."""
        block = self._block or codes[-2:]
        return block, (*codes[:-2], -(-codes[-2] // block[0]), -(-codes[-1] // block[1]))

    def shape(self, pieces: Mapping[str, TensorHeader]) -> Any:
        codes, scales = pieces["weight"], pieces["scale"]
        block, grid = self._grid(codes.shape)
        if math.prod(scales.shape) != math.prod(grid) or not (codes.floating and scales.floating):
            raise ValueError(f"{list(scales.shape)} scales in {scales.dtype} for blocks of {block}")
        return codes.shape

    def read(self, name: str, pieces: Mapping[str, Tensor]) -> Tensor:
        codes = pieces["weight"]
        (rows, columns), grid = self._grid(codes.shape)  # the last blocks may be smaller
        scales = pieces["scale"].reshape(grid).float().repeat_interleave(rows, -2)
        scales = scales[..., : codes.shape[-2], :].repeat_interleave(columns, -1)
        return codes.float().mul_(scales[..., : codes.shape[-1]])


class _Mxfp4:
    """Stacks of experts, transposed, in blocks of 32 numbers (OCP MX 1.0), as gpt-oss has them."""

    pattern, ending = re.compile(r"(?P<of>.+)_(?P<piece>blocks|scales)"), ""
    needs, precision, library = ("blocks", "scales"), "mxfp4", ""

    def __init__(self, settings: Mapping[str, Any]):
        pass

    def shape(self, pieces: Mapping[str, TensorHeader]) -> Any:
        blocks, scales = (pieces[piece].shape for piece in self.needs)
        if len(scales) != 3 or blocks != (*scales, 16):
            raise ValueError(f"{list(scales)} scales for blocks of {list(blocks)} bytes")
        return scales[0], 32 * scales[2], scales[1]

    def read(self, name: str, pieces: Mapping[str, Tensor]) -> Any:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        stored = (pieces[piece] for piece in self.needs)
        return convert_moe_packed_tensors(*stored, rows_per_chunk=1 << 16)


class _CompressedTensors:
    _pieces = "packed|scale|zero_point|shape|g_idx|global_scale"
    pattern = re.compile(rf"(?P<of>.+)\.(?P<piece>weight_(?:{_pieces}))")
    ending, needs, library = ".weight", ("weight_scale",), "compressed-tensors"

    def __init__(self, settings: Mapping[str, Any]):
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(dict(settings))
        self._schemes = [scheme for scheme in config.config_groups.values() if scheme.weights]
        for scheme in self._schemes:
            scheme.format = scheme.format or config.format
        formats = dict.fromkeys(scheme.format for scheme in self._schemes)
        unread = [f"the format {name}" for name in formats if name not in _COMPRESSED]
        unread += [] if self._schemes else ["no groups of weights"]
        unread += ["transformed weights"] if settings.get("transform_config") else []
        sparsity = settings.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            unread.append("sparse weights")
        if unread:
            raise ValueError(", ".join(unread))
        kinds = (f"{s.weights.type}{s.weights.num_bits}" for s in self._schemes)
        self.precision = ", ".join(dict.fromkeys(kinds)).lower()

    def shape(self, pieces: Mapping[str, TensorHeader]) -> Any:
        packed = "weight_packed" in pieces
        return pieces["weight_shape"].load().tolist() if packed else pieces["weight"].shape

    def read(self, name: str, pieces: Mapping[str, Tensor]) -> Any:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.utils.match import match_name

        module = name.removesuffix(self.ending)
        for scheme in self._schemes:  # of modules, patterns, or classes
            if any(match_name(module, t) or t.isalnum() for t in scheme.targets):
                break
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        return compressor.decompress(dict(pieces), scheme)["weight"]


class _BitsAndBytes:
    pattern = re.compile(
        r"(?P<of>.+)\.(?P<piece>SCB|weight_format"
        r"|weight\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\.bitsandbytes__(?:nf4|fp4)))"
    )
    ending, library = ".weight", "bitsandbytes"

    def __init__(self, settings: Mapping[str, Any]):
        eight = settings.get("load_in_8bit") or settings.get("_load_in_8bit")
        self.precision = "int8" if eight else settings.get("bnb_4bit_quant_type", "fp4")
        self._state = f"weight.quant_state.bitsandbytes__{self.precision}"
        self.needs = ("weight", *(["SCB"] if eight else [self._state, "weight.absmax"]))

    def shape(self, pieces: Mapping[str, TensorHeader]) -> Any:
        if self._state not in pieces:
            return pieces["weight"].shape
        return json.loads(bytes(pieces[self._state].load().tolist()))["shape"]

    def read(self, name: str, pieces: Mapping[str, Tensor]) -> Any:
        from bitsandbytes import functional

        codes, scales = pieces["weight"], pieces.get("SCB")
        if scales is not None:
            return functional.int8_vectorwise_dequant(codes, scales)
        beside = {piece: tensor for piece, tensor in pieces.items() if piece != "weight"}
        state = functional.QuantState.from_dict(beside, codes.device)
        return functional.dequantize_4bit(codes, state)


class _Packed:
    """GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978), which share their pieces."""

    pattern = re.compile(r"(?P<of>.+)\.(?P<piece>qweight|qzeros|scales|g_idx)")
    ending, needs, library = ".weight", ("qweight", "qzeros", "scales"), "compressed-tensors"

    def __init__(self, settings: Mapping[str, Any]):
        self._bits, self._group = settings.get("bits", 4), settings.get("group_size", 128)
        self._awq, layout = settings["quant_method"] == "awq", settings.get("checkpoint_format")
        layout = settings.get("version", "gemm") if self._awq else layout or "gptq"
        known = (4,) if self._awq else (2, 3, 4, 8)
        if self._bits not in known or str(layout).lower() not in ("gemm", "gptq", "gptq_v2"):
            raise ValueError(f"{self._bits} bits in the layout {layout}")
        self._first, self.precision = layout == "gptq", f"int{self._bits}"

    def shape(self, pieces: Any) -> Any:
        rows, groups = pieces["qweight"].shape[0], pieces.get("g_idx")
        inputs = rows if self._awq else rows * 32 // self._bits
        return pieces["scales"].shape[1], inputs if groups is None else groups.shape[0]

    def read(self, name: str, pieces: Mapping[str, Tensor]) -> Any:
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
        from compressed_tensors.entrypoints.convert import AutoAWQConverter

        (codes, zeros, scales), bits = (pieces[piece] for piece in self.needs), self._bits
        if self._awq:
            unpacked = AutoAWQConverter.unpack_awq(codes, zeros, bits)
            codes, zeros = (t & 15 for t in AutoAWQConverter.reverse_awq_order(*unpacked, bits))
        else:  # less half of their range each; the first layout stores zero points less one, too
            codes, half = unpack_from_int32(codes, bits, self.shape(pieces)[::-1], 0), 2**bits // 2
            zeros = unpack_from_int32(zeros, bits, scales.shape, 1).short() + half + self._first
            zeros = zeros % 2**bits - half
        inputs = torch.arange(len(codes), device=codes.device)
        groups = pieces.get("g_idx", inputs // (self._group if self._group > 0 else len(codes)))
        zeros, scales = (tensor[groups.long()] for tensor in (zeros, scales))
        return ((codes.short() - zeros) * scales.float()).T


_FORMATS: Mapping[str, Any] = {
    "fp8": _Fp8,
    "mxfp4": _Mxfp4,
    "compressed-tensors": _CompressedTensors,
    "bitsandbytes": _BitsAndBytes,
    "gptq": _Packed,
    "awq": _Packed,
}


def detach(config: Any) -> Quantisation | None:
    """Take quantisation out of a configuration (of transformers, or its JSON), and return it."""
    fields = config if isinstance(config, dict) else vars(config)
    inner = {f"{n}.": vars(p) if hasattr(p, "to_dict") else p for n, p in fields.items()}
    parts = {"": fields, **{n: part for n, part in inner.items() if isinstance(part, dict)}}
    taken = {f"config.json: {n}{f}": p.pop(f, None) for n, p in parts.items() for f in _FIELDS}
    for where, found in taken.items():
        if found:
            return where, dict(found) if isinstance(found, dict) else {"quant_method": found}
    return None


def dequantised(
    headers: Mapping[str, TensorHeader], quantisation: Quantisation | None, source: object
) -> dict[str, TensorHeader]:
    """Return the headers of the weights of a model, `source`, from those of what is stored.

    Raises `ConfigError` with everything that cannot be read.
    """

    def wrong(found: str, expected: str, remedy: str = _UNQUANTISED) -> ConfigError:
        return ConfigError([Problem(where, found, expected, remedy)], str(source))

    if quantisation is None:
        packed = (name for name, header in headers.items() if header.dtype in PACKED)
        if codes := [*dict.fromkeys([*stored_codes(headers), *packed])]:
            dtypes = ", ".join(sorted({headers[name].dtype for name in codes}))
            where, what = "weights", f"{listing(codes)} in {dtypes}"
            found = f"codes of a quantised model in {source} ({what})"
            raise wrong(found, "weights, or a `quantization_config` in config.json")
        return dict(headers)
    where, settings = quantisation
    if "load_in_4bit" in settings:
        settings.setdefault("quant_method", "bitsandbytes")
    kind = str(settings.get("quant_method"))
    make, model = _FORMATS.get(kind), f"a model quantised by {kind}"
    if make is None:
        raise wrong(model, f"one of {', '.join(_FORMATS)}")
    if make.library and find_spec(make.library.replace("-", "_")) is None:
        remedy = f"pip install 'mergekit-ext[{make.library}]'"
        raise wrong(model, f"the package {make.library}, which is not installed", remedy)
    try:
        form = make(settings)
    except Exception as error:  # of any kind: whatever a library says to settings
        raise wrong(f"{model} with {one_line(error)}", "settings that are read") from error
    weights, grouped = dict[str, TensorHeader](), defaultdict[str, dict[str, TensorHeader]](dict)
    for name, header in headers.items():
        if match := form.pattern.fullmatch(name):
            grouped[match["of"] + form.ending][match["piece"]] = header
        elif not _ACTIVATIONS.fullmatch(name):
            weights[name] = header
    problems = defaultdict[str, list[str]](list)
    for name, pieces in grouped.items():
        if name in weights:
            pieces["weight"] = weights.pop(name)
        if missing := [piece for piece in form.needs if piece not in pieces]:
            problems[f"codes or scales without {', '.join(missing)}"].append(name)
            continue
        try:
            shape = tuple(map(int, form.shape(pieces)))
            if min(shape) < 0 or math.prod(shape) > 8 * sum(h.nbytes for h in pieces.values()):
                raise ValueError(f"the shape {shape}")
        except Exception as error:  # of any kind: whatever hostile headers and tables raise
            problems[f"codes with {one_line(error)}"].append(name)
            continue
        place = (2 * math.prod(shape), None, 0)
        weights[name] = QuantisedHeader(name, "BF16", shape, *place, tuple(pieces.items()), form)
    plain = [name for name, header in weights.items() if type(header) is TensorHeader]
    codes = [n for n in plain if n.endswith("weight") and weights[n].dtype in _CODES]
    if left := [*dict.fromkeys([*codes, *stored_codes(weights)])]:
        problems["codes or scales without the other"] = left
    if not problems and len(plain) == len(weights):
        remedy = f"{_UNQUANTISED} If its files hold plain weights, remove that field."
        raise wrong(f"{model}, and no codes in its files", "codes and scales", remedy)
    if problems:
        beside = f"those of {kind}", _UNQUANTISED
        each = (Problem(tensors_at(names), what, *beside) for what, names in problems.items())
        raise ConfigError(each, str(source))
    return weights


def stored_codes(names: Collection[str]) -> list[str]:
    """Return those of `names` that hold scales or packed codes.

    A scale is one only beside the tensor that it scales: models have parameters of such names.
    """

    def scales(name: str) -> bool:
        found = _BESIDE.fullmatch(name)
        of = found["of"] if found else name
        codes = (f"{of}{end}" for end in ("", ".weight", "_blocks", "._data", ":qdata"))
        return bool(found) and any(code in stored and code != name for code in codes)

    stored = frozenset(names)
    return [name for name in names if _PACKED.fullmatch(name) or scales(name)]
