"""One decoder block at a time: built by transformers on the meta device, filled from the shards.

The model's own forward is run once with every block replaced by a recorder; what the recorders
were called with (masks, position embeddings, sliding windows) is what each real block is later
called with. So a block-wise pass is the whole model's pass, whatever the family does in between.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.checkpoint.safety import require_finite
from quantkit.errors import InputRejected
from quantkit.model.families import make_known
from quantkit.model.sites import ModelLayout, Site, read_weight

if TYPE_CHECKING:
    from quantkit.checkpoint.reader import Checkpoint

Watcher = Callable[[Site, torch.Tensor], None]


class BlockRunner:
    """Runs a causal language model block by block; holds no weights between calls.

    Hidden states are [batch, sequence, hidden] on `device` in `dtype` (default: the stored type
    of the embedding). A batch is a full rectangle of tokens: no padding, no KV cache.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: ModelLayout,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.checkpoint, self.layout = checkpoint, layout
        self.device = torch.device(device)
        self.dtype = dtype or checkpoint.tensors[layout.embedding].dtype
        self._model = _skeleton(checkpoint.config, self.dtype)
        self._inner = self._model.model
        self._blocks: list[nn.Module] = list(self._inner.layers)
        self._recorders = [_Recorder(block) for block in self._blocks]
        self._inner.layers = nn.ModuleList(self._recorders)
        self._norm, self._inner.norm = self._inner.norm, nn.Identity()
        self._inner.rotary_emb.to(self.device)
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._ahead: _Ahead | None = None
        self.keep_head = False  # True: the head's weights stay in memory after the first `head`
        self._head: dict[str, nn.Parameter] | None = None

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Turn token ids [batch, sequence] into the first block's input.

        Only the embedding rows in use are read. Raises InputRejected for ids outside the
        vocabulary.
        """
        self._check_ids(tokens)
        used, position = torch.unique(tokens.cpu(), return_inverse=True)
        return self._embedded(self._embedding_rows(used).to(self.device, self.dtype), position)

    @torch.no_grad()
    def embed_all(self, batches: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """`embed` of each batch [batch, sequence].

        On a GPU the embedding is read once, and its rows in use stay there until the last batch.
        """
        if self.device.type == "cpu" or len(batches) < 2:
            yield from map(self.embed, batches)
            return
        self._check_ids(torch.stack([edge(b) for b in batches for edge in (torch.min, torch.max)]))
        used = torch.unique(torch.cat([batch.flatten() for batch in batches]).cpu())
        rows = self._embedding_rows(used).to(self.device, self.dtype)
        for batch in batches:
            yield self._embedded(rows, torch.searchsorted(used, batch.cpu()))

    def _check_ids(self, tokens: torch.Tensor) -> None:
        if tokens.numel() and not (0 <= int(tokens.min()) <= int(tokens.max()) < self.layout.vocab):
            raise InputRejected(
                f"token ids reach {int(tokens.max())}; the vocabulary has {self.layout.vocab}",
                "tokenize with the tokenizer of this checkpoint",
            )

    def _embedded(self, rows: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The first block's input for tokens that are `position` [batch, sequence] in `rows`."""
        table = self._inner.embed_tokens
        table.padding_idx = None  # would point outside the rows in use
        table.weight = nn.Parameter(rows, requires_grad=False)
        try:
            self._inner(input_ids=position.to(self.device), use_cache=False)
            first = self._recorders[0].take()
            for recorder in self._recorders:
                recorder.seen = None
        finally:
            table.weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        return first

    def _embedding_rows(self, used: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
        name, parts = self.layout.embedding, []
        for start in range(0, self.layout.vocab, chunk):
            wanted = used[(used >= start) & (used < start + chunk)] - start
            if len(wanted):
                stop = min(start + chunk, self.layout.vocab)
                rows = self.checkpoint.read_rows(name, slice(start, stop))
                parts.append(rows[wanted])
        return _finite(name, torch.cat(parts))

    def prefetch(self, i: int) -> None:
        """Start reading block `i` on a thread; the next `load(i)` takes what it read."""
        if self._ahead is None or self._ahead.layer != i:
            self._ahead = _Ahead(i, self._read)

    def load(self, i: int, override: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """Build block `i` with its weights on the device.

        `override` replaces weights by name: a tensor's name, or `<module>.weight` of any linear
        (also one that lives inside a fused tensor). Raises InputRejected for NaN or infinity.
        """
        state = self._ahead.result() if self._ahead and self._ahead.layer == i else self._read(i)
        self._ahead = None
        at = f"model.layers.{i}."
        for name, tensor in (override or {}).items():
            self._replace(i, state, name, tensor)
        block = copy.deepcopy(self._blocks[i])
        for name, tensor in state.items():
            state[name] = tensor.to(self.device, non_blocking=True).to(self.dtype)
        missing, unexpected = block.load_state_dict(state, strict=False, assign=True)
        if missing or unexpected:
            raise InputRejected(f"{at[:-1]}: no tensors for {', '.join(missing + unexpected)}")
        return block.requires_grad_(False).eval()

    def forward(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run a loaded block on hidden states [batch, sequence, hidden]; same shape out."""
        attention: Any = block.self_attn
        arguments = self._call_arguments(*hidden.shape[:2])[attention.layer_idx]
        output = block(hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def capture(
        self,
        block: nn.Module,
        i: int,
        hidden: torch.Tensor,
        watch: Watcher,
        *,
        every_expert: bool = False,
    ) -> torch.Tensor:
        """Run block `i` and show every site's input: `watch(site, x [tokens, width])`.

        A mixture's experts are shown the tokens routed to them; with `every_expert` each is also
        shown the tokens it was not chosen for (the block's output stays the routed one). An
        expert without tokens is not shown.
        """
        sites = self.layout.layer_sites(i)
        with ExitStack() as stack:
            for site in sites:
                if site.expert is None:
                    module = block.get_submodule(_hook_point(site))
                    hook = module.register_forward_pre_hook(_shower(site, watch))
                    stack.callback(hook.remove)
            down = {s.expert: s for s in sites if s.expert is not None}
            if down:
                experts = block.get_submodule("mlp.experts")
                stack.enter_context(_watched_experts(experts, down, watch, every_expert))
            return self.forward(block, hidden)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn the last block's output into logits [batch, sequence, vocabulary].

        Gradients flow back to `hidden` when it asks for them.
        """
        layout = self.layout
        parts = self._head or self._head_weights()
        if self.keep_head:
            self._head = parts
        norm = copy.deepcopy(self._norm)
        norm.weight = parts[layout.final_norm]
        projection = nn.Linear(layout.hidden, layout.vocab, bias=False, device="meta")
        projection.weight = parts[layout.lm_head or layout.embedding]
        kept = self._model.lm_head
        self._inner.norm, self._model.lm_head = norm, projection
        self._recorders[0].replacement = hidden
        differentiable = torch.is_grad_enabled() and hidden.requires_grad
        try:
            with torch.set_grad_enabled(differentiable):
                return self._model(inputs_embeds=torch.zeros_like(hidden), use_cache=False).logits
        finally:
            self._inner.norm, self._model.lm_head = nn.Identity(), kept
            self._recorders[0].replacement = None
            for recorder in self._recorders:
                recorder.seen = None

    def _head_weights(self) -> dict[str, nn.Parameter]:
        layout, parts = self.layout, {}
        for name in (layout.final_norm, layout.lm_head or layout.embedding):
            tensor = _finite(name, self.checkpoint.read(name)).to(self.device, self.dtype)
            parts[name] = nn.Parameter(tensor, requires_grad=False)
        return parts

    def _call_arguments(self, batch: int, sequence: int) -> list[dict[str, Any]]:
        shape = (batch, sequence)
        if shape not in self._arguments:
            while len(self._arguments) > 1:  # masks are large: keep the usual and the last batch's
                self._arguments.pop(next(iter(self._arguments)))
            size = (batch, sequence, self.layout.hidden)
            zeros = torch.zeros(size, device=self.device, dtype=self.dtype)
            with torch.no_grad():
                self._inner(inputs_embeds=zeros, use_cache=False)
            self._arguments[shape] = [recorder.arguments() for recorder in self._recorders]
        return self._arguments[shape]

    def _read(self, i: int) -> dict[str, torch.Tensor]:
        at, state = f"model.layers.{i}.", {}
        for name, meta in self._blocks[i].named_parameters():
            if meta.dim() == 3:
                state[name] = self._stack(i, name, tuple(meta.shape))
            else:
                stored = self.layout.renames.get(at + name, at + name)
                tensor = _finite(stored, self._read_tensor(stored))
                if tensor.shape != meta.shape:
                    raise InputRejected(
                        f"{stored} has shape {tuple(tensor.shape)}; "
                        f"its configuration makes it {tuple(meta.shape)}"
                    )
                state[name] = tensor
        return state

    def _read_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor into memory that a GPU copies from without waiting (on the thread)."""
        if self.device.type != "cuda":
            return self.checkpoint.read(name)
        info = self.checkpoint.tensors[name]
        return self.checkpoint.read(
            name, torch.empty(info.shape, dtype=info.dtype, pin_memory=True)
        )

    def _stack(self, i: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Gather all experts' weights into the fused tensor [experts, out, in] of the memory."""
        fused = f"model.layers.{i}.{name}"
        if fused in self.checkpoint.tensors:
            return _finite(fused, self._read_tensor(fused))
        stacked: torch.Tensor | None = None
        for linear, expert, rows in self._experts(i, name):
            weight = _finite(linear.tensor, read_weight(self.checkpoint, linear))
            if stacked is None:
                stacked = torch.empty(shape, dtype=weight.dtype)
            stacked[expert, rows] = weight
        assert stacked is not None
        return stacked

    def _experts(self, i: int, name: str) -> Iterator[tuple[Any, int, slice]]:
        """Walk (linear, expert, rows) of a fused parameter: gate above up, or down alone."""
        for site in self.layout.layer_sites(i):
            if name.endswith("gate_up_proj") and site.kind == "mlp_in":
                for n, linear in enumerate(site.linears):
                    width = linear.shape[0]
                    yield linear, n // 2, slice(n % 2 * width, (n % 2 + 1) * width)
            elif name.endswith("down_proj") and site.expert is not None:
                yield site.linears[0], site.expert, slice(None)

    def _replace(
        self, i: int, state: dict[str, torch.Tensor], name: str, tensor: torch.Tensor
    ) -> None:
        at, memory = f"model.layers.{i}.", {v: k for k, v in self.layout.renames.items()}
        short = memory.get(name, name).removeprefix(at)
        if short in state:
            state[short] = tensor
            return
        for fused in (n for n, t in state.items() if t.dim() == 3):
            for linear, expert, rows in self._experts(i, fused):
                if f"{linear.module}.weight" == name:
                    state[fused][expert, rows] = tensor.to(state[fused].dtype)
                    return
        raise KeyError(f"block {i} has no weight {name}")


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: its meta weights must stay unseen
        self.seen: tuple[torch.Tensor, dict[str, Any]] | None = None
        self.replacement: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # a model may ask its layer's type

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.seen = (hidden_states, arguments)
        return hidden_states if self.replacement is None else self.replacement

    def take(self) -> torch.Tensor:
        assert self.seen is not None
        return self.seen[0]

    def arguments(self) -> dict[str, Any]:
        assert self.seen is not None
        seen, self.seen = self.seen, None
        return seen[1]


class _Ahead:
    """Reads one block on a thread."""

    def __init__(self, layer: int, read: Callable[[int], dict[str, torch.Tensor]]) -> None:
        self.layer, self._read = layer, read
        self._state: dict[str, torch.Tensor] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._state = self._read(self.layer)
        except BaseException as error:  # raised again where the block is asked for
            self._error = error

    def result(self) -> dict[str, torch.Tensor]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._state


def _skeleton(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build the transformers model without weights; nothing in the checkpoint is executed."""
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    make_known(plain.get("model_type"))
    try:
        built = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        built._experts_implementation = "eager"  # the same sums as the watched experts below
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(built, dtype=dtype)
    except Exception as error:  # transformers checks configurations by many exception types
        text = " ".join(str(error).split())[:200]
        raise InputRejected(f"config.json does not describe a model: {text}") from error
    return model.eval()


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    require_finite(name, tensor)
    return tensor


def _hook_point(site: Site) -> str:
    if site.kind == "mlp_in":
        return "mlp"  # dense or mixture, the block's input is the site
    return site.linears[0].module.split(".", 3)[3]


def _shower(site: Site, watch: Watcher) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def show(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        watch(site, inputs[0].reshape(-1, site.width))

    return show


@contextmanager
def _watched_experts(
    experts: Any, sites: Mapping[int, Site], watch: Watcher, every_expert: bool
) -> Iterator[None]:
    """Put a loop over the experts in place of the fused module, showing each down input."""

    def forward(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        final = torch.zeros_like(hidden)
        for e, site in sites.items():
            token, slot = torch.where(chosen == e)
            if every_expert:
                watch(site, _expert_product(experts, e, hidden))
            if not len(token):
                continue
            # Slot-major order, as transformers sums: token order inside each slot.
            order = torch.argsort(slot, stable=True)
            token, slot = token[order], slot[order]
            product = _expert_product(experts, e, hidden[token])
            if not every_expert:
                watch(site, product)
            output = nn.functional.linear(product, experts.down_proj[e])
            output = output * weights[token, slot, None]
            final.index_add_(0, token, output.to(final.dtype))
        return final

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def _expert_product(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return experts.act_fn(gate) * up
