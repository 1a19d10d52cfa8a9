"""A language model as the rest of Headscope sees it: token rows in; z, v, pattern and losses out.

The only file that imports TransformerLens. Loading, in order:

1. find the weights: a `.gguf` file (converted once into the cache), a local folder, or a name on the hub (`weights.py`);
2. make the fast handle: a second module tree over the *same* parameters, with PyTorch's fused attention (SDPA);
3. wrap the first tree in a `TransformerBridge`, which computes attention step by step (eager) and shows every step;
4. check on a random batch that pattern x v is z and z W_O + b_O is the attention output, at every layer, for all that
   attribution says rests on this; a model where it fails (gates, sinks' siblings, norms between the two) is refused;
5. check on the same batch that the fast handle gives the bridge's z and logits; if not, it is dropped.

Weights are used as they are stored (nothing folded, nothing centred), so v holds the value bias and z too.
Tensors come back detached, on the lens's device. One pass at a time: a lock makes a lens safe to share between threads.
"""

import contextlib
import copy
import functools
import importlib.metadata
import inspect
import logging
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

from sae_core import vocabulary, weights
from sae_core.config import ModelSource
from sae_core.errors import LayerOutOfRange, UnsupportedModel, UsageError
from sae_core.machine import pick_device
from sae_core.norms import Norm, norm_parts, norm_scale, through_frozen_norm, through_norm
from sae_core.products import onednn_is_faster, through_onednn
from sae_core.weights import short

log = logging.getLogger("headscope.lens")

CHECK_TOKENS = 24  # length of the load-time batch, unless a sliding window asks for more ...
CHECK_WINDOW = 512  # ... up to this; beyond a longer window the fast handle is not trusted
ATTENTION_HOOKS: tuple[str, ...] = ("hook_z", "hook_v", "hook_pattern")
CHECK_HOOKS: tuple[str, ...] = (*ATTENTION_HOOKS, "hook_out")
IN_AND_OUT = ("hook_in", "hook_out")
ALONE_AT_ONCE = 4096  # rows of one token in a pass
LOGITS_AT_ONCE = 2**26  # elements of one logits tensor (256 MiB in fp32)
TURNED_AT_ONCE = 64  # positions whose rotations are asked for in a pass
PARTS_GAP = 1e-4  # how far the parts of a residual stream may miss it, as a share of their sizes


@dataclass(frozen=True)
class LensInfo:
    """What a model is, without its weights."""

    name: str
    """The name it was registered by."""
    fingerprint: str
    """`gguf:` or `weights:` and a sha256, or `commit:` and the hub's commit; equal means equal weights."""
    n_layers: int
    n_heads: int
    """Query heads in a layer."""
    n_kv_heads: int
    """Key and value heads; query head h reads v of head h // (n_heads / n_kv_heads)."""
    d_head: int
    d_model: int
    d_vocab: int
    """Rows of the unembedding; may exceed the tokenizer's vocabulary."""
    max_context: int
    """Most tokens that the model takes at once."""
    processing: dict[str, str | bool]
    """`folded`, `centred`, `dtype`, `tl_version`: how the weights were prepared. An SAE must be used as it was trained."""

    @property
    def d_in(self) -> int:
        """Width of z: n_heads x d_head."""
        return self.n_heads * self.d_head


class AttentionRead(NamedTuple):
    """One layer's attention, fp32: z[b, dest, h] = sum over src of pattern[b, h, dest, src] v[b, src, kv(h)]."""

    z: Tensor
    """[b, pos, n_heads * d_head], head-major."""
    v: Tensor
    """[b, src, n_kv_heads, d_head], the value bias included."""
    pattern: Tensor
    """[b, n_heads, dest, src]; 0 where src > dest."""


class Entry(NamedTuple):
    """One layer in a pass of the fast handle, fp32."""

    stream: Tensor
    """[b, pos, d_model]: the residual stream that enters the block."""
    z: Tensor
    """[b, pos, n_heads * d_head], head-major."""


class StreamRead(NamedTuple):
    """The residual stream before one layer's attention, in the parts that were added up to it; fp32."""

    names: tuple[str, ...]
    """`embedding`, `position` (where the model adds one), then `attention 0`, `MLP 0`, `attention 1`, ... up to the layer."""
    parts: Tensor
    """[n_parts, b, pos, d_model]; their sum is the stream. What a block adds is taken after any norm that follows it."""
    scale: Tensor
    """[b, pos]: what the layer's norm divides the stream of each token by, its epsilon included; 1 where it has no norm."""
    attention: AttentionRead
    """What the same pass gave in the layer."""


class Ending(NamedTuple):
    """How a pass ends, fp32."""

    z: Tensor
    """[b, pos, n_heads * d_head] of the layer asked for, head-major."""
    final: Tensor
    """[b, pos, d_model]: what enters the final norm."""
    logits: Tensor
    """[b, pos, d_vocab], as the model gives them."""


class Alone(NamedTuple):
    """The residual stream of tokens that each stand in a row of their own; fp32."""

    first: Tensor
    """[n, d_model]: before the first block, the embedding."""
    later: Tensor
    """[n, d_model]: after the first block, in which a token alone attends to itself; `first` in a model of one block."""


class MLPRead(NamedTuple):
    """One layer's MLP on a row, fp32: given = through its norm(stream), which divides by `scale`."""

    n_parts: int
    """How many of the row's parts add up to the stream that it reads: its own layer's attention is among them, but in a block
    that runs both side by side, as GPT-J and Pythia do."""
    stream: Tensor
    """[pos, d_model]: before the norm before it."""
    scale: Tensor
    """[pos]: what that norm divides by; 1 where there is none."""
    given: Tensor
    """[pos, d_model]: what enters the MLP."""
    out_scale: Tensor
    """[pos]: what the norm after it divides by; 1 where there is none."""


class WholeRead(NamedTuple):
    """One row's whole pass, in the parts that the residual stream is made of; fp32."""

    names: tuple[str, ...]
    """Of the parts, as `StreamRead` names them, up to the last block."""
    parts: Tensor
    """[n_parts, pos, d_model]; the first `before(layer)` of them add up to the stream before the layer, all to `final`."""
    scale: dict[int, Tensor]
    """By layer, [pos]: what the norm before its attention divides the stream by."""
    out_scale: dict[int, Tensor]
    """By layer, [pos]: what the norm after its attention divides by; 1 where there is none."""
    attention: dict[int, AttentionRead]
    """By layer, with a batch of one."""
    final: Tensor
    """[pos, d_model]: what enters the final norm."""
    final_scale: Tensor
    """[pos]: what that divides by."""
    mlps: dict[int, MLPRead]
    """By layer."""

    def before(self, layer: int) -> int:
        """How many parts stand before the layer's attention."""
        return len(self.names) if layer < 0 else self.names.index(f"attention {layer}")


class OutMap(NamedTuple):
    """How z becomes what a layer's attention adds to the stream, once the scale of a norm after it is frozen.

    added = (z . matrix + bias) / out_scale + norm_bias
    """

    matrix: Tensor
    """[d_in, d_model]: W_O with the centring and the gain of the norm after it."""
    bias: Tensor
    """[d_model]: b_O through the same; 0 where there is none."""
    norm_bias: Tensor
    """[d_model]: that norm's own bias."""


class LogitMap(NamedTuple):
    """How the final stream becomes logits, before a soft cap, once the final norm's scale is frozen.

    logit[i] = (stream / final_scale) . rows[i] + constants[i]
    """

    rows: Tensor
    """[n, d_model]: the unembedding of some tokens, with the norm's centring and gain."""
    constants: Tensor
    """[n]: the norm's bias through it, and the unembedding's own bias."""


class ValueMap(NamedTuple):
    """How the stream becomes one layer's values once the norm's scale is frozen: linear, so that each part has its own.

    v[src, kv] = stream[src] . matrix[kv] / scale[src] + norm_bias[kv] + v_bias[kv]
    """

    matrix: Tensor
    """[n_kv_heads, d_model, d_head]: W_V with the norm's centring and gain folded in."""
    norm_bias: Tensor
    """[n_kv_heads, d_head]: the norm's own bias through W_V; 0 where it has none."""
    v_bias: Tensor
    """[n_kv_heads, d_head]: 0 where the model has none."""


class Side(NamedTuple):
    """How the stream becomes the queries, or the keys, that a layer's scores are products of, once all norms' scales are frozen.

    side[pos, n] = (((stream[pos] / scale[pos]) . matrix[n] + sum of biases[n]) / own_scale[pos, n] + own_bias[n]) . turn[pos]
    """

    matrix: Tensor
    """[n, d_model, d_head], n query or key/value heads: the projection with the centring and gain of the norm before attention,
    and with the gain of a norm on queries or keys, where a model has one, as Qwen 3 does."""
    biases: dict[str, Tensor]
    """[n, d_head] each, those that are not 0: `norm bias` through the projection, and the projection's own."""
    own_scale: Tensor
    """[pos, n]: what the norm on queries or keys divides by; 1 without one."""
    own_bias: Tensor
    """[n, d_head]: that norm's own bias; 0 without one."""


class ScoreRead(NamedTuple):
    """One layer's attention scores on a row, with what they are made of; fp32.

    scores[h, dest, src] = queries[dest, h] . keys[src, kv(h)] * scaling, before a soft cap and the mask.
    """

    names: tuple[str, ...]
    """Of the stream's parts before the layer, as `StreamRead` names them."""
    parts: Tensor
    """[n_parts, pos, d_model]"""
    scale: Tensor
    """[pos]: what the norm before attention divides by."""
    queries: Side
    keys: Side
    turn: Tensor
    """[pos, d_head, d_head]: the rotation by a token's position, of queries and keys; identity where positions are added."""
    scaling: float
    scores: Tensor
    """[n_heads, dest, src]: of the model's own rotated queries and keys where these are seen, else the scores seen."""
    cap: float | None
    """The soft cap, as Gemma 2 has it: cap tanh(score / cap) goes into the softmax."""
    allowed: Tensor
    """bool [dest, src]: what the mask lets through, a sliding window's included."""
    attention: AttentionRead
    """What the same pass gave in the layer, with a batch of one."""


Replace = Callable[[Tensor], Tensor]
"""What to put in a tensor's place: gets it, gives one of the same shape."""


class Out(NamedTuple):
    """A replacement of an attention block's output (z W_O + b_O, before any norm after it) rather than of its z."""

    replace: Replace
    """[b, pos, d_model] in and out."""


class Changed(NamedTuple):
    """A pass with z of some layers replaced on the way, fp32."""

    z: dict[int, Tensor]
    """[b, pos, d_in] of the layers asked for, as it came there: before what replaces it."""
    logits: Tensor
    """[b, pos, d_vocab], as the model gives them."""


class Step(NamedTuple):
    """What comes after the tokens so far."""

    logits: Tensor
    """[b, d_vocab] of the next token, fp32."""
    past: Any
    """Keys and values of all tokens so far, for the next step; the step that takes them changes them."""


class Effect(NamedTuple):
    """What a replacement does to the prediction of each next token."""

    losses: Tensor
    """Cross-entropy, [b, pos - 1] in nats, fp32."""
    kl: Tensor
    """KL divergence from the model's own prediction to this one, [b, pos - 1] in nats, fp32."""


class _Stop(Exception):
    """Raised in a hook once all that was asked for has been seen, so that the rest is not computed."""


class Lens:
    """A loaded model. Make one with `load_lens`.

    `row_start` is the token put at position 0 of every row; see `vocabulary.row_start` for the rule.
    `fast` says whether `read_z` uses the fast handle.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, fingerprint: str, device: torch.device) -> None:
        """Wrap a transformers model (eager attention, fp32, on `device`), which is changed in place.

        Raises UnsupportedModel where TransformerLens cannot wrap it or its attention is not pattern x v.
        """
        self.device = device
        self.tokenizer_fingerprint = vocabulary.tokenizer_fingerprint(tokenizer)
        self.row_start = vocabulary.row_start(tokenizer, name)
        self._tokenizer = tokenizer
        self._lock = threading.RLock()
        self._text_config = model.config.get_text_config()
        model.requires_grad_(False)
        model.eval()
        # The bridge rebuilds the tree that it wraps, so names and the second handle are taken first.
        paths = {id(module): path for path, module in model.named_modules()}
        self._unembed = model.get_output_embeddings()
        fast = _fast_handle(model, self._text_config)
        if fast is not None and device.type == "cpu" and onednn_is_faster():
            through_onednn(fast)
        self._model = model
        self._bridge = _bridge(model, name)
        self._o_paths = [_output_projection(block, paths, name, layer) for layer, block in enumerate(self._bridge.blocks)]
        self._window: int | None = None
        batch = self._check_batch()
        found, logits = self._check_pass(batch, name)
        self.info = self._checked_info(found, name, fingerprint)
        self._fast: Any = fast if fast is not None and self._agrees(fast, batch, found, logits) else None
        self._block_paths = [paths.get(id(getattr(block, "original_component", None)), "") for block in self._bridge.blocks]
        self._resumes = self._fast is not None and self._agrees_resumed(batch)
        self._hands_over = self._resumes and self._agrees_handed_over(batch, found)

    @property
    def fast(self) -> bool:
        """Whether `read_z` and `token_losses` use the fast handle rather than the bridge."""
        return self._fast is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that it holds, those of its handles counted once."""
        handles = [self._model, *([self._fast] if self._fast is not None else []), *self._halves.values()]
        held = {id(t): t.nbytes for handle in handles for t in (*handle.parameters(), *handle.buffers())}
        return sum(held.values())

    # Text

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without the special tokens that a tokenizer puts around a text by itself.

        Special tokens written out in a text (`<|im_start|>`) are recognised.
        """
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return ids

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token as shown to people, one string per token.

        Spaces and newlines stand as they are, so joined texts give the original wherever characters are whole. A token
        that holds part of a character shows these bytes as `<0xE2>`; an id without a token shows as `<id 50300>`.
        """
        texts = self._vocabulary
        return [texts[i] if 0 <= i < len(texts) else f"<id {i}>" for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens that the model wrote, special ones included; part of a character is the replacement character."""
        text: str = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    @functools.cached_property
    def _vocabulary(self) -> list[str]:
        return vocabulary.vocabulary_texts(self._tokenizer)

    @property
    def text_end(self) -> int | None:
        """Id of the token that ends a text the model writes; None where its tokenizer names none."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    # Passes

    def check_layer(self, layer: int) -> None:
        """Raise LayerOutOfRange where the model lacks the layer."""
        if not 0 <= layer < self.info.n_layers:
            raise LayerOutOfRange(
                f"{self.info.name} has {self.info.n_layers} layers, counted from 0, so there is no layer {layer}; "
                f"choose one from 0 to {self.info.n_layers - 1}.",
                field="layer",
            )

    def read_z(self, tokens: Tensor, layers: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
        """z of the layers asked for: [b, pos, d_in] each, in `dtype`; the pass stops at the last of them.

        `dtype` bfloat16 runs the pass in bfloat16 where there is a fast handle, which then holds a second copy of the
        weights, made when first asked for; else the pass is fp32 and only the result is rounded.
        Raises LayerOutOfRange, and UsageError for tokens that the model cannot take.
        """
        for layer in layers:
            self.check_layer(layer)
        if not layers:
            return {}
        tokens = self._checked_tokens(tokens)
        if not self._fast_reads(tokens.shape[1]):
            with self._bridge_taps(dict.fromkeys(layers, ("hook_z",)), stop=True) as found:
                _run(self._model, tokens)
            return {layer: found[layer]["hook_z"].flatten(2).to(dtype) for layer in layers}
        handle = self._fast if dtype == torch.float32 else self._half(dtype)
        with self._fast_taps(handle, layers, stop=True) as z:
            _run(handle, tokens)
        return {layer: z[layer].to(dtype) for layer in layers}

    def read_attention(self, tokens: Tensor, layer: int) -> AttentionRead:
        """z, v and pattern of one layer in fp32, through the bridge; the pass stops at z.

        Raises LayerOutOfRange, and UsageError for tokens that the model cannot take.
        """
        return self.read_attentions(tokens, [layer])[layer]

    def read_attentions(
        self, tokens: Tensor, layers: Sequence[int], streams: Mapping[int, Tensor] | None = None
    ) -> dict[int, AttentionRead]:
        """`read_attention` of several layers; all are held at once, so the caller bounds rows x layers.

        Where the fast handle serves, it runs as far as the last layer, and the bridge only the attention of those asked for;
        with what `read_streams` gave for these tokens, of every layer, the fast handle is not needed either. Else one pass
        of the bridge, which stops at z of the last layer.
        """
        for layer in layers:
            self.check_layer(layer)
        if not layers:
            return {}
        tokens = self._checked_tokens(tokens)
        if not self.keeps_streams(tokens.shape[1]):
            return self._read_attentions(tokens, layers)
        if streams is None:
            streams = {layer: read.stream for layer, read in self.read_streams(tokens, layers).items()}
        found: dict[int, AttentionRead] = {}
        for layer in layers:
            # A bridge's block hands what is set on it to the module that it wraps, so that one is taken.
            blocks = [block.original_component for block in self._bridge.blocks[: layer + 1]]
            with self._lock, _taken_up(blocks, streams[layer].to(self.device)):
                found |= self._read_attentions(tokens, [layer])
        return found

    def _read_attentions(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, AttentionRead]:
        with self._bridge_taps(dict.fromkeys(layers, ATTENTION_HOOKS), stop=True) as found:
            _run(self._model, tokens)
        return {
            layer: AttentionRead(got["hook_z"].flatten(2), got["hook_v"], got["hook_pattern"]) for layer, got in found.items()
        }

    def keeps_streams(self, pos: int) -> bool:
        """Whether `read_streams` serves for rows of so many tokens: where the fast handle does, and its blocks pass nothing but
        a stream."""
        return self._hands_over and self._fast_reads(pos)

    def read_streams(self, tokens: Tensor, layers: Sequence[int]) -> dict[int, Entry]:
        """What enters the layers' blocks, and z, in fp32; the pass stops at z of the last layer.

        Raises LayerOutOfRange, UsageError for tokens that the model cannot take, ValueError where `keeps_streams` does not hold.
        """
        for layer in layers:
            self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        if not self.keeps_streams(tokens.shape[1]):
            raise ValueError(f"{self.info.name} gives no streams of rows of {tokens.shape[1]} tokens")
        streams: dict[int, Tensor] = {}

        def enter(_: nn.Module, args: tuple[Any, ...], *, layer: int) -> None:
            streams[layer] = args[0].detach()

        with self._fast_taps(self._fast, layers, stop=True) as z, contextlib.ExitStack() as stack:
            for layer in set(layers):
                block = self._fast.get_submodule(self._block_paths[layer])
                stack.callback(block.register_forward_pre_hook(functools.partial(enter, layer=layer)).remove)
            _run(self._fast, tokens)
        return {layer: Entry(streams[layer], z[layer]) for layer in layers}

    def follow_attention(
        self, tokens: Tensor, layers: Sequence[int], look: Callable[[int, AttentionRead], None], *, to_end: bool = False
    ) -> Tensor | None:
        """Call `look` with each of the layers and its attention as soon as the pass has it, so that the pattern of one layer is
        held at a time, however many there are.

        The pass stops at z of the last layer; with `to_end` it goes on to the final norm, and gives what enters that,
        [b, pos, d_model]. Raises as `read_attention`.
        """
        for layer in layers:
            self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        waiting: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
        final: list[Tensor] = []

        def take(value: Tensor, *, hook: Any, layer: int, name: str) -> None:  # noqa: ARG001 - TransformerLens passes it
            waiting[layer][name] = value.detach()
            if len(waiting[layer]) == len(names):
                got = waiting.pop(layer)
                look(layer, AttentionRead(got["hook_z"].flatten(2), got["hook_v"], got["hook_pattern"]))
                if not waiting and not to_end:
                    raise _Stop

        def end(value: Tensor, *, hook: Any) -> None:  # noqa: ARG001 - as above
            final.append(value.detach())
            raise _Stop

        names = ATTENTION_HOOKS
        taps: list[tuple[str, Callable[..., None]]] = [
            (f"blocks.{layer}.attn.{name}", functools.partial(take, layer=layer, name=name))
            for layer in waiting
            for name in names
        ]
        if to_end:
            taps.append(("ln_final.hook_in", end))
        if taps:
            with self._lock, torch.no_grad(), contextlib.suppress(_Stop), self._bridge.hooks(fwd_hooks=taps):
                _run(self._model, tokens)
        return final[0] if final else None

    def read_stream(self, tokens: Tensor, layer: int) -> StreamRead:
        """The residual stream before the layer, part by part, with what its attention read; one pass, which stops at z.

        Raises LayerOutOfRange, UsageError for tokens that the model cannot take, and UnsupportedModel where the parts that
        can be seen do not add up to the stream, or the stream does not give v through the layer's norm and W_V.
        """
        return self._read_stream(tokens, layer, [])[0]

    def _read_stream(self, tokens: Tensor, layer: int, more: Sequence[str]) -> tuple[StreamRead, dict[str, Tensor]]:
        """`read_stream`, with what more hooks of the layer's attention saw, by name; those that did not fire are left out."""
        self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        position = ["pos_embed.hook_out"] if "pos_embed" in self._bridge._modules else []
        added = {
            f"{kind} {block}": f"blocks.{block}.{hook}"
            for block in range(layer)
            for kind, hook in (("attention", "hook_attn_out"), ("MLP", "hook_mlp_out"))
        }
        ends = {"blocks.0.hook_in", f"blocks.{layer}.hook_in"}
        own = [f"blocks.{layer}.attn.{hook}" for hook in ("hook_v", "hook_pattern", "hook_z")]
        beside = {hook: f"blocks.{layer}.attn.{hook}" for hook in more}
        with self._taps([*ends, *position, *added.values(), *own, *beside.values()], stop=True) as found:
            _run(self._model, tokens)
        if missing := [hook for hook in (*ends, *position, *added.values()) if hook not in found]:
            self._refuse_parts(f"{missing[0]} cannot be seen")
        names, parts = ["embedding"], [found["blocks.0.hook_in"]]
        if position:
            names.append("position")
            parts.append(found[position[0]].expand_as(parts[0]))
            parts[0] = parts[0] - parts[1]
        names += added
        parts += [found[hook] for hook in added.values()]
        v, pattern, z = (found[hook] for hook in own)
        stream = found[f"blocks.{layer}.hook_in"]
        read = StreamRead(
            tuple(names),
            torch.stack(parts),
            norm_scale(stream, self._first_norm(layer)),
            AttentionRead(z.flatten(2), v, pattern),
        )
        self._check_parts(read, stream, layer)
        return read, {hook: found[name] for hook, name in beside.items() if name in found}

    def read_ending(self, tokens: Tensor, layer: int) -> Ending:
        """z of one layer, what enters the final norm, and the logits, from one pass of the bridge.

        Raises LayerOutOfRange, and UsageError for tokens that the model cannot take.
        """
        self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        names = [f"blocks.{layer}.attn.hook_z", "ln_final.hook_in"]
        with self._taps(names, stop=False) as found:
            logits = _run(self._model, tokens)
        return Ending(found[names[0]].flatten(2), found[names[1]], logits.float())

    def next_logits(self, tokens: Tensor) -> Tensor:
        """The model's own logits of what comes after rows [b, pos]: [b, d_vocab], fp32. Those of the positions before are not
        made, where the model can leave them out.

        Raises UsageError for tokens that the model cannot take.
        """
        tokens = self._checked_tokens(tokens)
        handle = self._fast if self._fast_reads(tokens.shape[1]) else self._model
        some = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(handle.forward).parameters else {}
        with self._lock, torch.no_grad():
            logits: Tensor = handle(input_ids=tokens, use_cache=False, **some).logits
        return logits[:, -1].float()

    def read_whole(self, tokens: Tensor, layers: Sequence[int], mlps: Sequence[int] = ()) -> WholeRead:
        """One row [1, pos] from end to end: every part of the stream, the attention of some layers, the MLP of some; one pass.

        Raises LayerOutOfRange, UsageError for tokens that the model cannot take, and UnsupportedModel where the parts that can be
        seen do not add up to the stream at the layers or at the end, z does not give what the attention adds, or the stream not
        what enters an MLP.
        """
        for layer in (*layers, *mlps):
            self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        position = ["pos_embed.hook_out"] if "pos_embed" in self._bridge._modules else []
        added = {
            f"{kind} {block}": f"blocks.{block}.{hook}"
            for block in range(self.info.n_layers)
            for kind, hook in (("attention", "hook_attn_out"), ("MLP", "hook_mlp_out"))
        }
        own = [f"blocks.{layer}.attn.{hook}" for layer in layers for hook in (*ATTENTION_HOOKS, "hook_out")]
        around = [f"blocks.{layer}.mlp.{hook}" for layer in mlps for hook in IN_AND_OUT]
        ends = {"blocks.0.hook_in", "ln_final.hook_in", *(f"blocks.{layer}.hook_in" for layer in layers)}
        with self._taps([*ends, *position, *added.values(), *own, *around], stop=True) as found:
            _run(self._model, tokens)
        if missing := [hook for hook in (*ends, *position, *added.values(), *around) if hook not in found]:
            self._refuse_parts(f"{missing[0]} cannot be seen")
        names, parts = ["embedding"], [found["blocks.0.hook_in"]]
        if position:
            names.append("position")
            parts.append(found[position[0]].expand_as(parts[0]))
            parts[0] = parts[0] - parts[1]
        names += added
        parts += [found[hook] for hook in added.values()]
        attention, scale, out_scale = {}, {}, {}
        whole = torch.stack(parts)
        for layer in layers:
            z, v, pattern, out = (found[f"blocks.{layer}.attn.{hook}"] for hook in (*ATTENTION_HOOKS, "hook_out"))
            attention[layer] = AttentionRead(z.flatten(2), v, pattern)
            stream = found[f"blocks.{layer}.hook_in"]
            scale[layer] = norm_scale(stream, self._first_norm(layer))[0]
            out_scale[layer] = norm_scale(out, self._post_norm(layer))[0]
            before = names.index(f"attention {layer}")
            self._check_parts(
                StreamRead(tuple(names[:before]), whole[:before], scale[layer][None], attention[layer]),
                stream,
                layer,
            )
            to = self.out_map(layer)
            gap = _gap((attention[layer].z[0] @ to.matrix + to.bias) / out_scale[layer][:, None] + to.norm_bias, parts[before][0])
            if not gap <= 10 * PARTS_GAP:
                self._refuse_parts(f"z does not give what the attention of layer {layer} adds (off by {gap:.1%})")
        final = found["ln_final.hook_in"]
        gap = float(((whole.sum(0) - final).norm(dim=-1) / whole.norm(dim=-1).sum(0).clamp_min(1e-12)).max())
        if not gap <= PARTS_GAP:
            self._refuse_parts(f"what its blocks are seen to add misses the stream at the end by {gap:.1%}")
        last = norm_scale(final, self._bridge.ln_final.original_component)
        around_mlp = {
            layer: self._mlp_read(layer, names, whole[:, 0], *(found[f"blocks.{layer}.mlp.{hook}"][0] for hook in IN_AND_OUT))
            for layer in mlps
        }
        return WholeRead(tuple(names), whole[:, 0], scale, out_scale, attention, final[0], last[0], around_mlp)

    def _mlp_read(self, layer: int, names: Sequence[str], parts: Tensor, given: Tensor, out: Tensor) -> MLPRead:
        """What the MLP reads: the stream after its layer's attention, or before it where both run side by side; whichever its
        norm makes into what was seen to enter it."""
        before, after = self.mlp_norms(layer)
        out_scale = norm_scale(out, self._mlp_post_norm(layer))
        gap = _gap(after.map(out) / out_scale[:, None] + after.bias, parts[names.index(f"MLP {layer}")])
        if not gap <= 10 * PARTS_GAP:
            self._refuse_parts(f"the output of the MLP of layer {layer} is not what it adds (off by {gap:.1%})")
        norm, gaps = self._mlp_norm(layer), []
        for n_parts in (names.index(f"MLP {layer}"), names.index(f"attention {layer}")):
            stream = parts[:n_parts].sum(0)
            scale = norm_scale(stream, norm)
            gaps.append(_gap(before.map(stream) / scale[:, None] + before.bias, given))
            if gaps[-1] <= 10 * PARTS_GAP:
                return MLPRead(n_parts, stream, scale, given, out_scale)
        return self._refuse_parts(
            f"the stream and a norm do not give what enters the MLP of layer {layer} (off by {min(gaps):.1%})"
        )

    def read_scores(self, tokens: Tensor, layer: int) -> ScoreRead:
        """The scores of one layer's attention on one row [1, pos], and how the stream's parts make them; one pass.

        Raises as `read_stream` does, and UnsupportedModel where queries and keys made from the stream do not give the scores that
        the model's softmax gets: where they come by another way than a projection, a norm and a rotation, as with ALiBi.
        """
        self.check_layer(layer)
        attn = self._bridge.blocks[layer].attn
        # Not every model has all of these. They come before z, at which the pass stops once all have fired.
        more = ["q.hook_out", "k.hook_out", "hook_attn_scores"]
        more += [name for name in ("hook_rot_q", "hook_rot_k", "hook_cos", "hook_sin") if name in attn._modules]
        read, seen = self._read_stream(tokens, layer, more)
        if missing := [hook for hook in ("q.hook_out", "k.hook_out", "hook_attn_scores") if hook not in seen]:
            self._refuse_scores(layer, f"{missing[0]} cannot be seen")
        heads, d_head = self.info.n_heads, self.info.d_head
        turn = self._turn(layer, tokens.shape[1], seen)
        queries = self._side(layer, "q", "query", seen["q.hook_out"][0].view(-1, heads, d_head))
        keys = self._side(layer, "k", "key", seen["k.hook_out"][0].view(-1, self.info.n_kv_heads, d_head))
        inner = attn.original_component
        scaling = float(getattr(inner, "scaling", None) or d_head**-0.5)
        if getattr(self._text_config, "scale_attn_by_inverse_layer_idx", False):
            scaling /= layer + 1
        cap, hooked = getattr(inner, "attn_logit_softcapping", None), seen["hook_attn_scores"][0]
        allowed = (hooked > -1e4).all(0).tril()
        scores = hooked
        if "hook_rot_q" in seen and "hook_rot_k" in seen:
            q, k = (seen[name][0] for name in ("hook_rot_q", "hook_rot_k"))
            scores = torch.einsum("dhe,she->hds", q, k.repeat_interleave(heads // self.info.n_kv_heads, dim=1)) * scaling
        given = ScoreRead(
            read.names, read.parts[:, 0], read.scale[0], queries, keys, turn, scaling, scores, cap, allowed, read.attention
        )
        self._check_scores(given, hooked, layer)
        return given

    def alone(self, ids: Sequence[int]) -> Alone:
        """The streams of tokens that each stand alone: what later layers know a token by.

        After the first block, since models do not hand on their embedding as it is: its MLP rewrites it ("effective embedding",
        McDougall et al. 2023; Gould et al. 2023 take MLP 0's output for the same reason).
        """
        names = ["blocks.0.hook_in", *(["blocks.1.hook_in"] if self.info.n_layers > 1 else [])]
        parts = []
        for some in torch.split(torch.tensor(list(ids)), ALONE_AT_ONCE):
            with self._taps(names, stop=True) as found:
                _run(self._model, self._checked_tokens(some[:, None]))
            parts.append((found[names[0]][:, 0], found[names[-1]][:, 0]))
        first, later = zip(*parts, strict=True)
        return Alone(torch.cat(first), torch.cat(later))

    def token_losses(self, tokens: Tensor, layer: int | None = None, replace: Replace | Out | None = None) -> Tensor:
        """Cross-entropy of each next token: [b, pos - 1] in nats, fp32.

        With `layer` and `replace`, that layer's z [b, pos, d_in] is replaced by `replace(z)` on the way: zeros, a mean,
        or an SAE's reconstruction; with `Out(replace)` its attention output is. Rows may be split over several passes, so
        `replace` must treat rows on their own.
        """
        if (layer is None) != (replace is None):
            raise ValueError("layer and replace belong together")
        return self.losses_with(tokens, 0 if layer is None else layer, [replace])[0]

    def losses_with(self, tokens: Tensor, layer: int, replacements: Sequence[Replace | Out | None]) -> list[Tensor]:
        """`token_losses` with each of several replacements at one layer, or with none (None): [b, pos - 1] each, in order.

        What lies before the layer is computed once for all of them where the model allows it, which is checked when the
        model is loaded: then n replacements at layer l of L cost little more than 1 + (n - 1) (L - l) / L passes.
        """
        self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        if not replacements:
            return []
        rows = self.logit_rows(tokens.shape[1])
        parts = []
        for part in torch.split(tokens, rows):
            # Closed at once when something fails, since it holds hooks.
            with self._lock, torch.no_grad(), contextlib.closing(self._logits(part, layer, replacements)) as passes:
                parts.append([_next_token_losses(logits, part) for logits in passes])
        return [torch.cat(losses) for losses in zip(*parts, strict=True)]

    def logit_rows(self, pos: int) -> int:
        """Rows of so many tokens whose logits are held at once: more of them are read in several passes."""
        return max(1, LOGITS_AT_ONCE // (pos * self.info.d_vocab))

    def effects_with(self, tokens: Tensor, layer: int, replacements: Sequence[Replace | Out]) -> list[Effect]:
        """Losses and KL divergences: of the model as it is (its divergence is 0), then with each replacement at one layer."""
        self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        rows = self.logit_rows(tokens.shape[1])
        parts: list[list[Effect]] = []
        for part in torch.split(tokens, rows):
            clean: list[Tensor] = []
            parts.append([])
            with self._lock, torch.no_grad():
                for logits in self._logits(part, layer, [None, *replacements]):
                    losses = _next_token_losses(logits, part)
                    if not clean:  # log-probabilities of the next token, row by row: all of them at once are too many
                        clean = [row[:-1].float().log_softmax(-1) for row in logits]
                        parts[-1].append(Effect(losses, torch.zeros_like(losses)))
                        continue
                    kl = torch.stack([_divergence(p, row[:-1].float()) for p, row in zip(clean, logits, strict=True)])
                    parts[-1].append(Effect(losses, kl))
        return [Effect(*map(torch.cat, zip(*effects, strict=True))) for effects in zip(*parts, strict=True)]

    def answers_with(
        self, tokens: Tensor, layer: int, replacements: Sequence[Replace | None], at: Tensor, ids: Tensor
    ) -> list[Tensor]:
        """Logits [b, k] of the tokens `ids` [b, k] at one position of each row, `at` [b], with each replacement of one layer's z;
        None is the model as it is. Logits of all rows are held at once, so the caller bounds them (`logit_rows`)."""
        self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        rows, at, ids = torch.arange(len(tokens), device=self.device), at.to(self.device), ids.to(self.device)
        with self._lock, torch.no_grad():
            return [logits[rows, at].gather(1, ids).float() for logits in self._logits(tokens, layer, replacements)]

    def run_with(self, tokens: Tensor, replacements: Mapping[int, Replace], read: Sequence[int] = ()) -> Changed:
        """One whole pass in which z [b, pos, d_in] of several layers is replaced, each layer getting what the replacements
        before it made; z of the layers in `read` comes back. All logits are held at once, so the caller bounds the rows
        (`logit_rows`).

        Raises LayerOutOfRange, UsageError for tokens that the model cannot take, and what a replacement raises.
        """
        layers = {*replacements, *read}
        for layer in layers:
            self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        found: dict[int, Tensor] = {}

        def pass_on(z: Tensor, *, layer: int) -> Tensor:
            if layer in read:
                found[layer] = z.detach().float()
            return replacements[layer](z) if layer in replacements else z

        fast = self._fast_reads(tokens.shape[1])
        patch = self._fast_patch if fast else self._bridge_patch
        with self._lock, torch.no_grad(), contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(patch(layer, functools.partial(pass_on, layer=layer)))
            logits = _run(self._fast if fast else self._model, tokens)
        return Changed(found, logits.float())

    @functools.cached_property
    def keeps_past(self) -> bool:
        """Whether a pass that takes up keys and values of earlier tokens gives what whole ones give; tried when first asked, and
        where it does not, the log says why. Out of memory, it raises, and is tried again when next asked."""
        batch = self._check_batch()
        try:
            with self._lock, torch.no_grad():
                for handle in [self._model] if self._fast is None else [self._model, self._fast]:
                    whole, half = _run(handle, batch)[:, -1], batch.shape[1] // 2
                    first = handle(input_ids=batch[:, :half], use_cache=True)
                    logits = handle(input_ids=batch[:, half:], past_key_values=first.past_key_values, use_cache=True).logits
                    gap = _gap(logits[:, -1], whole)
                    if not gap <= 1e-4:
                        return self._no_past(f"its logits are off by {gap:.1e}")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code raises
            return self._no_past(f"{type(error).__name__}: {error}")
        return True

    def _no_past(self, why: str) -> Literal[False]:
        log.warning(
            "%s takes up no keys and values of earlier tokens, so it writes by whole passes, slower: %s", self.info.name, why
        )
        return False

    def go_on(self, tokens: Tensor, replacements: Mapping[int, Replace], past: Any, length: int) -> Step:
        """What comes after `tokens` [b, pos], which follow those of the steps before (`past`; None at first); z of the new
        positions is replaced as in `run_with`. `length` is how many tokens there will be in the end.

        Raises as `run_with`, and ValueError where `keeps_past` does not hold.
        """
        if not self.keeps_past:
            raise ValueError(f"{self.info.name} takes no keys and values of earlier tokens")
        for layer in replacements:
            self.check_layer(layer)
        tokens = self._checked_tokens(tokens)
        fast = self._fast_reads(length)
        patch = self._fast_patch if fast else self._bridge_patch
        with self._lock, torch.no_grad(), contextlib.ExitStack() as stack:
            for layer, replacement in replacements.items():
                stack.enter_context(patch(layer, replacement))
            found = (self._fast if fast else self._model)(input_ids=tokens, past_key_values=past, use_cache=True)
        return Step(found.logits[:, -1].float(), found.past_key_values)

    # Weights

    def W_O(self, layer: int) -> Tensor:  # noqa: N802 - the field's name
        """[n_heads, d_head, d_model]."""
        self.check_layer(layer)
        W_O: Tensor = self._bridge.blocks[layer].attn.W_O.detach()
        return W_O

    def b_O(self, layer: int) -> Tensor | None:  # noqa: N802 - the field's name
        """[d_model], or None where the model has none."""
        self.check_layer(layer)
        b_O: Tensor | None = self._bridge.blocks[layer].attn.b_O
        return None if b_O is None else b_O.detach().flatten()

    def v_bias(self, layer: int) -> Tensor | None:
        """[n_kv_heads, d_head]: what every v holds whatever its token is; None where the model has no such bias.

        Raises LayerOutOfRange, and UnsupportedModel where v does not come from one affine map.
        """
        _, bias = self._value_projection(layer)
        return bias.view(self.info.n_kv_heads, self.info.d_head) if bias.any() else None

    def value_map(self, layer: int) -> ValueMap:
        """How the stream before the layer becomes its v. Raises as `v_bias` does."""
        matrix, bias = self._value_projection(layer)
        gain, norm_bias, centres = norm_parts(self._first_norm(layer), matrix.shape[0], self.device)
        folded = gain[:, None] * matrix
        # Centring takes the mean off the stream; off the matrix's columns it does the same to the product.
        folded = folded - folded.mean(0) if centres else folded
        shape = (self.info.n_kv_heads, self.info.d_head)
        return ValueMap(folded.view(-1, *shape).transpose(0, 1).contiguous(), (norm_bias @ matrix).view(shape), bias.view(shape))

    def out_map(self, layer: int) -> OutMap:
        """How the layer's z becomes what its attention adds to the stream."""
        W_O, b_O = self.W_O(layer).flatten(0, 1), self.b_O(layer)
        gain, norm_bias, centres = norm_parts(self._post_norm(layer), W_O.shape[1], self.device)
        both = torch.cat([W_O, (torch.zeros_like(W_O[0]) if b_O is None else b_O)[None]])
        both = (both - both.mean(-1, keepdim=True) if centres else both) * gain
        return OutMap(both[:-1], both[-1], norm_bias)

    def mlp_norms(self, layer: int) -> tuple[Norm, Norm]:
        """What of the norms before and after the layer's MLP is the same for every token."""
        self.check_layer(layer)
        d_model, device = self.info.d_model, self.device
        return norm_parts(self._mlp_norm(layer), d_model, device), norm_parts(self._mlp_post_norm(layer), d_model, device)

    def logit_map(self, tokens: Sequence[int]) -> LogitMap:
        """How the final stream becomes the logits of these tokens, and, in a last row, the mean over the vocabulary."""
        ids = torch.tensor(list(tokens), device=self.device)
        rows = torch.cat([self._unembed.weight.detach()[ids], self._mean_unembedding[None]])
        gain, bias, centres = norm_parts(self._bridge.ln_final.original_component, rows.shape[1], self.device)
        constants, own = rows @ bias, getattr(self._unembed, "bias", None)
        if own is not None:
            constants = constants + torch.cat([own.detach()[ids], own.detach().mean()[None]])
        folded = rows * gain
        return LogitMap(folded - folded.mean(-1, keepdim=True) if centres else folded, constants)

    def logits_of(self, final: Tensor) -> Tensor:
        """Logits [..., d_vocab] of what enters the final norm [..., d_model], by the model's own modules; before a soft cap."""
        with self._lock, torch.no_grad():
            logits: Tensor = self._unembed(self._bridge.ln_final.original_component(final))
        return logits

    def values(self, streams: Tensor, layer: int) -> Tensor:
        """v of streams [n, d_model] that stand before the layer, through its norm with the norm's own scale, less what is the
        same for every token (both biases): [n, n_kv_heads, d_head]. Raises as `v_bias` does."""
        scale = norm_scale(streams, self._first_norm(layer))
        return torch.einsum("nd,kde->nke", streams / scale[:, None], self.value_map(layer).matrix)

    def logit_weights(self, vectors: Tensor, layer: int) -> Tensor:
        """What directions of z write straight to the logits: [n, d_in] -> [n, d_vocab], centred over the vocabulary.

        vector -> W_O -> (gain of the norm after attention, where a model has one, as Gemma 2 does) -> final norm's
        centring (LayerNorm) and gain -> unembedding. The norms' 1/rms, which depend on the token, the biases, and a
        model's constant multipliers are left out: within a row only differences and their order mean something.
        """
        self.check_layer(layer)
        block = self._bridge.blocks[layer]
        written = vectors.to(self.device, torch.float32) @ self.W_O(layer).flatten(0, 1)
        if "ln1_post" in block._modules:
            written = through_norm(written, block.ln1_post.original_component)
        normed = through_norm(written, self._bridge.ln_final.original_component)
        logits: Tensor = normed @ self._unembed.weight.T
        return logits - logits.mean(-1, keepdim=True)

    def head_logits(self, z: Tensor, layer: int, final: Tensor, tokens: Tensor) -> Tensor:
        """What each head writes straight to the logit of a token, above what it writes to the mean token: [n, n_heads].

        At n destinations: z [n, d_in] of the layer, what enters the final norm there, final [n, d_model], and the tokens [n].
        As `logit_weights`, but with the norms' 1/rms as they are at the destinations ("frozen"): so all that is written to the
        stream adds up to the token's logit above the mean, but for the biases of the norms and of the unembedding, the
        model's constant multipliers and a soft cap on the logits.
        """
        self.check_layer(layer)
        block, W_O = self._bridge.blocks[layer], self.W_O(layer)
        written = torch.einsum("nhd,hdm->nhm", z.view(len(z), *W_O.shape[:2]), W_O)
        if "ln1_post" in block._modules:
            b_O = self.b_O(layer)
            whole = written.sum(1) if b_O is None else written.sum(1) + b_O
            written = through_frozen_norm(written, block.ln1_post.original_component, whole)
        normed = through_frozen_norm(written, self._bridge.ln_final.original_component, final)
        return torch.einsum("nhm,nm->nh", normed, self._unembed.weight.detach()[tokens] - self._mean_unembedding)

    def direct_logits(self, vectors: Tensor, layer: int, z: Tensor, final: Tensor) -> Tensor:
        """What parts of z write straight to the logits, above what they write to the mean token: [n, d_vocab].

        vectors [n, d_in] are the parts, at n destinations where z [n, d_in] is the whole and `final` [n, d_model] enters the
        final norm. As `head_logits`: norms frozen, so what all parts of the stream write adds up; before a soft cap.
        """
        self.check_layer(layer)
        block, W_O = self._bridge.blocks[layer], self.W_O(layer).flatten(0, 1)
        written = (vectors.to(self.device, torch.float32) @ W_O)[:, None]
        if "ln1_post" in block._modules:
            b_O = self.b_O(layer)
            whole = z @ W_O if b_O is None else z @ W_O + b_O
            written = through_frozen_norm(written, block.ln1_post.original_component, whole)
        normed = through_frozen_norm(written, self._bridge.ln_final.original_component, final)[:, 0]
        logits: Tensor = normed @ self._unembed.weight.detach().T
        return logits - logits.mean(-1, keepdim=True)

    @functools.cached_property
    def _mean_unembedding(self) -> Tensor:
        mean: Tensor = self._unembed.weight.detach().mean(0)
        return mean

    # Within

    def _value_projection(self, layer: int) -> tuple[Tensor, Tensor]:
        """W_V [d_model, n_kv_heads * d_head] and its bias. hook_v is the projection's output, or this is not the v that attention
        used."""
        return self._projection(layer, "v", "values")

    def _projection(self, layer: int, name: str, words: str) -> tuple[Tensor, Tensor]:
        """The matrix and the bias of `q`, `k` or `v`, asked of the projection itself, since models store them in many ways."""
        self.check_layer(layer)
        attn = self._bridge.blocks[layer].attn
        projection = getattr(attn._modules.get(name), "original_component", None)
        if projection is None or getattr(attn, f"hook_{name}") is not attn._modules[name].hook_out:
            raise UnsupportedModel(f"The {words} of {self.info.name} cannot be taken apart: they come from no one projection.")
        with torch.no_grad():
            bias: Tensor = projection(torch.zeros(1, 1, self.info.d_model, device=self.device))[0, 0]
            matrix: Tensor = projection(torch.eye(self.info.d_model, device=self.device)[None])[0] - bias
        return matrix, bias

    def _side(self, layer: int, name: str, word: str, projected: Tensor) -> Side:
        """`Side` of the queries or keys, of which `projected` [pos, n, d_head] is what the projection gave."""
        matrix, bias = self._projection(layer, name, "queries" if name == "q" else "keys")
        pos, n, d_head = projected.shape
        if matrix.shape[1] != n * d_head:
            self._refuse_scores(layer, f"its {word} projection gives more than {n} heads")
        gain, norm_bias, centres = norm_parts(self._first_norm(layer), matrix.shape[0], self.device)
        folded = gain[:, None] * matrix
        folded = folded - folded.mean(0) if centres else folded
        own_gain, own_bias, own_scale = torch.ones(n, d_head), torch.zeros(n, d_head), torch.ones(pos, n)
        attn = self._bridge.blocks[layer].attn
        norm = getattr(attn._modules.get(f"{name}_norm"), "original_component", None)
        if norm is not None:
            whole = getattr(attn, "_qk_norm_phase", None) == "pre_reshape"  # OLMo 2 norms all heads as one
            width = n * d_head if whole else d_head
            own = norm_parts(norm, width, self.device)
            if own.centres:
                self._refuse_scores(layer, f"a norm on its {word} vectors centres them")
            own_gain, own_bias = (one.expand(n, d_head) if not whole else one.view(n, d_head) for one in (own.gain, own.bias))
            scale = norm_scale(projected.flatten(1) if whole else projected, norm)
            own_scale = scale[:, None].expand(pos, n) if whole else scale
        own_gain, own_bias, own_scale = (one.to(self.device) for one in (own_gain, own_bias, own_scale))
        biases = {"norm bias": (norm_bias @ matrix).view(n, d_head) * own_gain, f"{word} bias": bias.view(n, d_head) * own_gain}
        by_head = folded.view(-1, n, d_head).transpose(0, 1) * own_gain[:, None]
        return Side(by_head, {key: value for key, value in biases.items() if value.any()}, own_scale, own_bias)

    def _turn(self, layer: int, pos: int, seen: Mapping[str, Tensor]) -> Tensor:
        """[pos, d_head, d_head]: what the layer's rotary embedding makes of a query or key at each position, whatever its
        convention: the attention's own code is given the basis vectors."""
        basis, attn = torch.eye(self.info.d_head, device=self.device), self._bridge.blocks[layer].attn
        if "hook_cos" not in seen:
            return basis.expand(pos, -1, -1)
        cos, sin = (seen[name].expand(1, pos, -1) for name in ("hook_cos", "hook_sin"))
        with torch.no_grad():
            if "hook_rot_q" not in seen:
                if not hasattr(attn, "_apply_rotary_pos_emb"):
                    self._refuse_scores(layer, "its rotary embedding cannot be asked")
                every = basis[None, :, None].expand(1, -1, pos, -1)
                turned: Tensor = attn._apply_rotary_pos_emb(every, every, cos, sin)[0][0].transpose(0, 1)
                return turned
            some = [self._turned(layer, basis, cos[:, at], sin[:, at]) for at in torch.arange(pos).split(TURNED_AT_ONCE)]
            return torch.cat(some)

    def _turned(self, layer: int, basis: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attn = self._bridge.blocks[layer].attn
        normed = "q_norm" in attn._modules
        got: list[Tensor] = []

        def put(value: Tensor, *, hook: Any) -> Tensor:  # noqa: ARG001 - TransformerLens passes it
            if value.shape[-1] != len(basis):  # all heads as one
                return basis.repeat(1, value.shape[-1] // len(basis))[:, None].expand_as(value)
            return basis.view(len(basis), 1, 1, -1).expand_as(value)

        def take(value: Tensor, *, hook: Any) -> None:  # noqa: ARG001 - as above
            got.append(value[:, :, 0].transpose(0, 1))
            raise _Stop

        nothing = torch.zeros(len(basis), cos.shape[1], self.info.d_model, device=self.device)
        hooks = [
            (f"blocks.{layer}.attn.{'hook_q_normed' if normed else 'q.hook_out'}", put),
            (f"blocks.{layer}.attn.hook_rot_q", take),
        ]
        with self._lock, contextlib.suppress(_Stop), self._bridge.hooks(fwd_hooks=hooks):
            attn(hidden_states=nothing, position_embeddings=(cos, sin), attention_mask=None)
        return got[0]

    def _first_norm(self, layer: int) -> nn.Module | None:
        """The norm between the stream and the layer's attention; None where there is none, as in OLMo 2."""
        block = self._bridge.blocks[layer]
        return block.ln1.original_component if "ln1" in block._modules else None

    def _post_norm(self, layer: int) -> nn.Module | None:
        """The norm between the attention's output and the stream, where a model has one, as Gemma 2 and OLMo 2 do."""
        block = self._bridge.blocks[layer]
        return block.ln1_post.original_component if "ln1_post" in block._modules else None

    def _mlp_norm(self, layer: int) -> nn.Module | None:
        """The norm before the layer's MLP: one of its own, or in a block that runs attention and MLP side by side the one before
        both; None where there is none, as in OLMo 2."""
        modules = self._bridge.blocks[layer]._modules
        name = "ln2" if "ln2" in modules else "" if "ln2_post" in modules else "ln1"
        return modules[name].original_component if name in modules else None

    def _mlp_post_norm(self, layer: int) -> nn.Module | None:
        """The norm between the MLP's output and the stream, where a model has one, as Gemma 2 and OLMo 2 do."""
        block = self._bridge.blocks[layer]
        return block.ln2_post.original_component if "ln2_post" in block._modules else None

    def _check_parts(self, read: StreamRead, stream: Tensor, layer: int) -> None:
        """Per token, against the sizes of what is summed: large parts cancel, and fp32 rounds each."""
        sizes = read.parts.norm(dim=-1).sum(0)
        gap = float(((read.parts.sum(0) - stream).norm(dim=-1) / sizes.clamp_min(1e-12)).max())
        if not gap <= PARTS_GAP:
            self._refuse_parts(f"what its blocks are seen to add misses the stream before layer {layer} by {gap:.1%}")
        values = self.value_map(layer)
        by_map = torch.einsum("bsd,kde->bske", stream / read.scale[..., None], values.matrix) + values.norm_bias + values.v_bias
        gap = _gap(by_map, read.attention.v)
        if not gap <= 10 * PARTS_GAP:
            self._refuse_parts(f"its norm and W_V do not give the values of layer {layer} (off by {gap:.1%})")

    def _check_scores(self, read: ScoreRead, hooked: Tensor, layer: int) -> None:
        """From the stream, through the sides, to what was seen before the softmax."""
        stream = read.parts.sum(0) / read.scale[:, None]
        q, k = (side_of(side, read.turn, stream) + constant_of(side, read.turn).sum(0) for side in (read.queries, read.keys))
        k = k.repeat_interleave(self.info.n_heads // self.info.n_kv_heads, dim=1)
        made = torch.einsum("dhe,she->hds", q, k) * read.scaling
        for scores, seen in ((made, read.scores), (read.scores, hooked)):
            capped = scores if seen is read.scores or read.cap is None else read.cap * (scores / read.cap).tanh()
            gap = float((capped - seen)[:, read.allowed].abs().max() / seen[:, read.allowed].abs().max().clamp_min(1e-6))
            if not gap <= 10 * PARTS_GAP:
                self._refuse_scores(layer, f"its queries and keys do not give its scores (off by {gap:.1%})")

    def _refuse_scores(self, layer: int, why: str) -> NoReturn:
        raise UnsupportedModel(
            f"Why {self.info.name} attended where it did cannot be split in layer {layer}: {why}. Its DFA is not affected.",
            field="layer",
        )

    def _refuse_parts(self, why: str) -> NoReturn:
        raise UnsupportedModel(
            f"{self.info.name} cannot be split by component: {why}. Its DFA by head and source is not affected.", field="layer"
        )

    def _checked_tokens(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens must be integers [batch, pos], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] > self.info.max_context:
            raise UsageError(
                f"{self.info.name} takes at most {self.info.max_context} tokens at once, not {tokens.shape[1]}; cut them.",
                field="context",
            )
        tokens = tokens.to(self.device, torch.int64)
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= self.info.d_vocab):
            raise UsageError(f"These tokens are not {self.info.name}'s: its ids go from 0 to {self.info.d_vocab - 1}.")
        return tokens

    def _fast_reads(self, pos: int) -> bool:
        return self._fast is not None and (self._window is None or pos <= self._window)

    @contextlib.contextmanager
    def _bridge_taps(self, hooks: dict[int, tuple[str, ...]], *, stop: bool) -> Iterator[dict[int, dict[str, Tensor]]]:
        """`_taps` on hooks of the layers' attention; what they collect is there, by layer, when the pass has ended."""
        found: dict[int, dict[str, Tensor]] = {layer: {} for layer in hooks}
        places = {f"blocks.{layer}.attn.{name}": (layer, name) for layer, names in hooks.items() for name in names}
        with self._taps(list(places), stop=stop) as named:
            yield found
        for place, value in named.items():
            layer, name = places[place]
            found[layer][name] = value

    @contextlib.contextmanager
    def _taps(self, names: Sequence[str], *, stop: bool) -> Iterator[dict[str, Tensor]]:
        """Collects the hooks named from the bridge's pass run inside; `stop` ends it when the last has fired."""
        found: dict[str, Tensor] = {}

        def keep(value: Tensor, *, hook: Any, name: str) -> None:  # noqa: ARG001 - TransformerLens passes it
            found[name] = value.detach()
            if stop and len(found) == len(names):
                raise _Stop

        taps = [(name, functools.partial(keep, name=name)) for name in names]
        # no_grad, not inference_mode: callers train on what comes back.
        with self._lock, torch.no_grad(), contextlib.suppress(_Stop), self._bridge.hooks(fwd_hooks=taps):
            yield found

    @contextlib.contextmanager
    def _fast_taps(self, handle: Any, layers: Sequence[int], *, stop: bool) -> Iterator[dict[int, Tensor]]:
        """Collects z of the layers from the fast handle's pass run inside; `stop` ends it at the last of them."""
        found: dict[int, Tensor] = {}
        last = max(layers)

        def keep(_: nn.Module, args: tuple[Tensor, ...], *, layer: int) -> None:
            found[layer] = args[0].detach()
            if stop and layer == last:
                raise _Stop

        with self._lock, torch.no_grad(), contextlib.suppress(_Stop), contextlib.ExitStack() as stack:
            for layer in set(layers):
                module = handle.get_submodule(self._o_paths[layer])
                stack.callback(module.register_forward_pre_hook(functools.partial(keep, layer=layer)).remove)
            yield found

    def _logits(self, tokens: Tensor, layer: int, replacements: Sequence[Replace | Out | None]) -> Generator[Tensor]:
        """Logits with each replacement; made one at a time, since one is large."""
        if not self._fast_reads(tokens.shape[1]):
            for replacement in replacements:
                with self._bridge_patch(layer, replacement):
                    yield _run(self._model, tokens)
        elif self._resumes and len(replacements) > 1:
            yield from self._resumed(tokens, layer, replacements)
        else:
            for replacement in replacements:
                with self._fast_patch(layer, replacement):
                    yield _run(self._fast, tokens)

    def _resumed(self, tokens: Tensor, layer: int, replacements: Sequence[Replace | Out | None]) -> Iterator[Tensor]:
        """Logits with each replacement, from the fast handle; blocks before `layer` work in the first pass only.

        What enters block `layer` is kept. In later passes it is put there again, and the blocks before give back what
        they get. What a model does around its blocks (embedding, positions, masks) runs each time, being cheap.
        """
        blocks = [self._fast.get_submodule(path) for path in self._block_paths[: layer + 1]]
        entered: list[Tensor] = []
        tap = blocks[layer].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        try:
            with self._fast_patch(layer, replacements[0]):
                yield _run(self._fast, tokens)
        finally:
            tap.remove()
        with _taken_up(blocks, entered[0]):
            for replacement in replacements[1:]:
                with self._fast_patch(layer, replacement):
                    yield _run(self._fast, tokens)

    @contextlib.contextmanager
    def _fast_patch(self, layer: int, replacement: Replace | Out | None) -> Iterator[None]:
        def swap_z(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_replaced(replacement, args[0]), *args[1:])

        def swap_out(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return _replaced(replacement, out)

        if replacement is None:
            yield
            return
        projection = self._fast.get_submodule(self._o_paths[layer])
        at_out = isinstance(replacement, Out)
        hook = projection.register_forward_hook(swap_out) if at_out else projection.register_forward_pre_hook(swap_z)
        try:
            yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def _bridge_patch(self, layer: int, replacement: Replace | Out | None) -> Iterator[None]:
        def swap(value: Tensor, *, hook: Any) -> Tensor:  # noqa: ARG001 - TransformerLens passes it
            return _replaced(replacement, value.flatten(2)).view_as(value)

        if replacement is None:
            yield
            return
        name = "hook_out" if isinstance(replacement, Out) else "hook_z"
        with self._bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.{name}", swap)]):
            yield

    def _half(self, dtype: torch.dtype) -> Any:
        """The fast handle over parameters rounded to `dtype`. Buffers (rotary frequencies) stay fp32, as in transformers."""
        with self._lock:
            if dtype not in self._halves:
                memo: dict[int, Any] = {id(p): nn.Parameter(p.to(dtype), requires_grad=False) for p in self._fast.parameters()}
                self._halves[dtype] = copy.deepcopy(self._fast, memo)
            return self._halves[dtype]

    @functools.cached_property
    def _halves(self) -> dict[torch.dtype, Any]:
        return {}

    # Load-time checks

    def _check_batch(self) -> Tensor:
        """Random tokens, [2, pos], longer than a short sliding window, so that the window cuts.

        With a long window the fast handle stays unproven beyond it, so it serves only rows that the window does not cut.
        """
        length = CHECK_TOKENS
        window = getattr(self._text_config, "sliding_window", None)
        if window and window < CHECK_WINDOW:
            length = max(length, window + 8)
        elif window:
            self._window = window
        length = min(length, int(self._bridge.cfg.n_ctx))
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self._unembed.weight.shape[0], (2, length), generator=generator).to(self.device)

    def _check_pass(self, batch: Tensor, name: str) -> tuple[dict[int, dict[str, Tensor]], Tensor]:
        """All layers' attention, and the logits, from the bridge."""
        hooks = dict.fromkeys(range(len(self._bridge.blocks)), CHECK_HOOKS)
        try:
            with self._bridge_taps(hooks, stop=False) as found:
                logits = _run(self._model, batch)
        except Exception as error:
            raise UnsupportedModel(f"{name} cannot be used: its attention cannot be read ({short(error)}).") from error
        return found, logits

    def _checked_info(self, found: dict[int, dict[str, Tensor]], name: str, fingerprint: str) -> LensInfo:
        """What the batch shows of the model's shape, once the identities that attribution rests on hold at every layer."""
        shapes = set()
        for layer, got in found.items():
            if missing := [hook for hook in CHECK_HOOKS if hook not in got]:
                raise UnsupportedModel(f"{name} cannot be used: layer {layer} does not show {', '.join(missing)}.")
            z, v, pattern, out = (got[hook] for hook in CHECK_HOOKS)
            z = z.reshape(*z.shape[:2], pattern.shape[1], -1)
            self._check_layer_identities(name, layer, z, v, pattern, out)
            shapes.add((pattern.shape[1], v.shape[2], v.shape[3]))
        if len(shapes) != 1:
            raise UnsupportedModel(f"{name} cannot be used: its layers differ in heads or head width: {sorted(shapes)}.")
        n_heads, n_kv_heads, d_head = shapes.pop()
        d_vocab, d_model = self._unembed.weight.shape
        version = importlib.metadata.version("transformer_lens")
        return LensInfo(
            name=name,
            fingerprint=fingerprint,
            n_layers=len(found),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            d_model=d_model,
            d_vocab=d_vocab,
            max_context=int(self._bridge.cfg.n_ctx),
            processing={"folded": False, "centred": False, "dtype": "float32", "tl_version": version},
        )

    def _check_layer_identities(self, name: str, layer: int, z: Tensor, v: Tensor, pattern: Tensor, out: Tensor) -> None:
        if v.ndim != 4 or pattern.shape[1] % v.shape[2] or v.shape[3] != z.shape[3]:
            raise UnsupportedModel(
                f"{name} cannot be used: in layer {layer} v {list(v.shape)} does not fit z {list(z.shape)} head by head."
            )
        spread = v.repeat_interleave(pattern.shape[1] // v.shape[2], dim=2)
        gap = _gap(torch.einsum("bhds,bshe->bdhe", pattern, spread), z)
        if not gap <= 1e-4:
            raise UnsupportedModel(
                f"{name} cannot be used: in layer {layer} pattern times v is not z (off by {gap:.1%} of its largest entry), "
                "so attribution to source tokens would be wrong."
            )
        attn = self._bridge.blocks[layer].attn
        written = z.flatten(2) @ attn.W_O.flatten(0, 1)
        gap = _gap(written if attn.b_O is None else written + attn.b_O.flatten(), out)
        if not gap <= 1e-4:
            raise UnsupportedModel(
                f"{name} cannot be used: in layer {layer} z W_O + b_O is not the attention output (off by {gap:.1%} of its "
                "largest entry), so what features write would be wrong."
            )

    def _agrees(self, fast: Any, batch: Tensor, found: dict[int, dict[str, Tensor]], logits: Tensor) -> bool:
        """Whether the fast handle gives the bridge's z at every layer, and its logits."""
        try:
            with self._fast_taps(fast, list(found), stop=False) as quick:
                quick_logits = _run(fast, batch)
        except Exception:
            return False  # the bridge serves; a handle that cannot run is only a lost speed-up
        gaps = [_gap(quick[layer], got["hook_z"].flatten(2)) for layer, got in found.items()]
        return all(gap <= 1e-3 for gap in [*gaps, _gap(quick_logits, logits)])

    def _agrees_resumed(self, batch: Tensor) -> bool:
        """Whether a pass taken up at a block gives what the whole pass gives; not so where blocks pass more than a stream."""
        try:
            with self._lock, torch.no_grad():
                whole, resumed = self._resumed(batch, len(self._block_paths) // 2, [None, None])
        except Exception:
            return False  # whole passes serve as well, only slower
        return _gap(resumed, whole) <= 1e-6

    def _agrees_handed_over(self, batch: Tensor, found: dict[int, dict[str, Tensor]]) -> bool:
        """Whether the bridge gives the same attention when it takes up at a block what the fast handle brought there."""
        self._hands_over = True
        layers = sorted({len(found) // 2, len(found) - 1})
        try:
            reads = self.read_attentions(batch, layers)
        except Exception:
            return False  # the bridge's own passes serve as well, only slower
        gaps = [
            _gap(part, found[layer][hook].view_as(part))
            for layer in layers
            for hook, part in zip(ATTENTION_HOOKS, reads[layer], strict=True)
        ]
        return all(gap <= 1e-3 for gap in gaps)


def load_lens(source: ModelSource, *, name: str, device: str = "cpu", cache: Path) -> Lens:
    """Load a model: a `.gguf` file, a local folder, or a name on the hub.

    A gguf is converted once into `cache/models/<its sha256>`. Local models never touch the network. Hub models are
    fetched by huggingface_hub (its own cache; the token comes from `HF_TOKEN`); code that a repository brings is not run.
    `device` is torch's, or `auto`: the first GPU, else the CPU.

    Raises UnknownModel, UnreadableModel, UnsupportedModel, DiskFull.
    """
    place, found = torch.device(pick_device(device)), weights.find(source, cache)
    with weights.refusals(found, place):
        model, tokenizer, fingerprint = weights.read(found)
        return Lens(model.to(place), tokenizer, name=name, fingerprint=fingerprint, device=place)


# Handles


def _bridge(model: Any, name: str) -> Any:
    try:
        architecture = determine_architecture_from_hf_config(model.config)  # type: ignore[no-untyped-call]
        bridge = build_bridge_from_module(model, architecture, hf_config=copy.deepcopy(model.config), model_name=name)
    except Exception as error:
        raise UnsupportedModel(f"{name} cannot be used: TransformerLens does not wrap it ({short(error)}).") from error
    return bridge.eval()


def _output_projection(block: Any, paths: dict[int, str], name: str, layer: int) -> str:
    """Where W_O sits in the model's own tree; its input is z."""
    attn = block._modules.get("attn")
    path = paths.get(id(getattr(getattr(attn, "o", None), "original_component", None)))
    if path is None:
        raise UnsupportedModel(f"{name} cannot be used: layer {layer} has no attention with an output projection.")
    return path


def _fast_handle(model: Any, text_config: Any) -> Any:
    """A second tree of modules over the same parameters, with fused attention; None where fusing would change the result.

    Fused attention knows no soft cap on the scores and no sinks, and a random batch may not show it, so a model that has
    these is never given one.
    """
    if getattr(text_config, "attn_logit_softcapping", None) or any("sink" in path for path, _ in model.named_parameters()):
        return None
    # A deep copy that meets a parameter finds it in the memo: modules and buffers are new, weights are shared.
    handle = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    try:
        handle.set_attn_implementation("sdpa")
    except ValueError:
        return None
    return handle


def side_of(side: Side, turn: Tensor, streams: Tensor) -> Tensor:
    """What streams [pos, d_model], already divided by the norm's scale, give to a side: [pos, n, d_head]. Linear."""
    return torch.einsum("phe,pef->phf", torch.einsum("pd,hde->phe", streams, side.matrix) / side.own_scale[..., None], turn)


def constant_of(side: Side, turn: Tensor) -> Tensor:
    """What is in a side whatever the stream is: [n_biases, pos, n, d_head], by the names of `biases`, then the own norm's."""
    given = [bias / side.own_scale[..., None] for bias in side.biases.values()] + [side.own_bias.expand(len(turn), -1, -1)]
    return torch.einsum("bphe,pef->bphf", torch.stack(given), turn)


def _run(model: Any, tokens: Tensor) -> Tensor:
    """Logits, [b, pos, d_vocab]. No attention mask is given: rows have no padding, and a pad token's id may be a real token."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _next_token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """[b, pos, d_vocab] and [b, pos] -> [b, pos - 1]. The last position predicts nothing we know: ignoring it there is
    cheaper than cutting it off the logits, which would copy them."""
    targets = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=-100)
    return losses.view(tokens.shape)[:, :-1]


def _divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """sum over the vocabulary of p log(p / q): [..., d_vocab] log p and unnormalised log q -> [...]."""
    return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)


def _replaced(replacement: Replace | Out | None, value: Tensor) -> Tensor:
    """What stands in place of `value`, in its dtype and shape."""
    replace = replacement.replace if isinstance(replacement, Out) else replacement
    return value if replace is None else replace(value).to(value.dtype).view_as(value)


def _give_back(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    """A block that does nothing."""
    return hidden


@contextlib.contextmanager
def _taken_up(blocks: Sequence[nn.Module], stream: Tensor) -> Iterator[None]:
    """A model whose first `blocks` these are goes on from the last with `stream`; those before it give back what they get."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (stream, *args[1:])

    with contextlib.ExitStack() as stack:
        stack.callback(blocks[-1].register_forward_pre_hook(enter).remove)
        for block in blocks[:-1]:
            block.forward = _give_back
            stack.callback(block.__dict__.pop, "forward", None)
        yield


def _gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest entry; nan stays nan, and compares as unequal."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
