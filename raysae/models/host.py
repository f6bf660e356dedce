"""Run a causal language model; read its activations at named sites, and edit them on the way.

One mechanism serves both: a hook at each site that is asked for sees the activation `x`, hands it to that site's edit,
if there is one, and keeps what goes on. Capture is a forward pass with reads that stops once all are in; a splice, an
ablation or a steering vector is a pass with edits. Hugging Face's own `hidden_states` would be simpler for some sites,
but has neither the branches nor edits, always runs the whole model, and holds every layer in memory.

Loading is safetensors only, runs no code from a repository unless asked to, and pins a hub name to one commit, so that
the fingerprint is that of the weights in use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from raysae.errors import UserError
from raysae.models.resolvers import find_layout, find_modules
from raysae.models.sites import Site, all_sites, order_sites, parse_site

Edit = Callable[[Tensor], Tensor]
"""x [batch, pos, width] -> a tensor of the same shape, which replaces it. An edit must not change x in place."""

# What the Hugging Face libraries raise for a name, file or network that is not as it should be.
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


SAYS_NOTHING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
"""Keys of a config that the forward pass does not depend on; the dtype it runs in is raysae's own setting."""


# ----------------------------------------------------------------------------------------------------------------------
# Edits


def zero(mask: Tensor | None = None) -> Edit:
    """An edit to zeros, at the positions of `mask` (bool [batch, pos]), or everywhere."""
    return lambda x: _where(mask, x, torch.zeros_like(x))


def mean(vector: Tensor, mask: Tensor | None = None) -> Edit:
    """An edit to `vector` [width], such as a site's mean, at the positions of `mask` as in `zero`, or everywhere."""

    def edit(x: Tensor) -> Tensor:
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"the vector must have shape {list(x.shape[-1:])}, not {list(vector.shape)}")
        return _where(mask, x, vector.to(x).expand_as(x))

    return edit


def splice(reconstruct: Callable[[Tensor], Tensor], mask: Tensor | None = None) -> Edit:
    """An edit to `reconstruct(rows)`, such as an SAE's output.

    `reconstruct` maps rows [n, width] of the model's dtype to the same shape. It gets exactly the rows of `mask` (bool
    [batch, pos]), or all, and is not called when there are none.
    """

    def edit(x: Tensor) -> Tensor:
        chosen = _on(mask, x) if mask is not None else x.new_ones(x.shape[:2], dtype=torch.bool)
        rows = x[chosen]
        if len(rows) == 0:
            return x
        new = reconstruct(rows)
        if new.shape != rows.shape:
            raise ValueError(f"reconstruct must return shape {list(rows.shape)}, not {list(new.shape)}")
        out = x.clone()
        out[chosen] = new.to(x)
        return out

    return edit


def _where(mask: Tensor | None, x: Tensor, new: Tensor) -> Tensor:
    return new if mask is None else torch.where(_on(mask, x)[..., None], new, x)


def _on(mask: Tensor, x: Tensor) -> Tensor:
    """`mask` on the device of `x`, checked to choose positions of it."""
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(f"the mask must be bool {list(x.shape[:2])}, not {mask.dtype} {list(mask.shape)}")
    return mask.to(x.device)


# ----------------------------------------------------------------------------------------------------------------------
# What is known of a model without its weights


def model_facts(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelFacts:
    """Sizes and sites of a model, from its config alone, so that a job can be checked before anything starts.

    `name` is a hub name or a local folder. Raises UserError naming `model.name` or `model.revision` if there is no such
    model, or its architecture is not supported.
    """
    config = _load_config(name, _resolve(name, revision), trust_remote_code)
    facts = _facts(config, name)
    _model_class(config, name, trust_remote_code)  # refuses what is no causal LM
    return facts


def fingerprint_of(name: str, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, str | None]:
    """What a model's forward pass depends on, without loading it: equal to `ModelHost.load(...).fingerprint`.

    Keys: `name`; `class`; `revision`, the commit of a hub model; and of a local one, in its place, `weights`, the BLAKE2b
    hash of the tensors that transformers loads (names, dtypes, shapes, bytes), which does not depend on how they are
    spread over files, and `config`, that of its config.json, and of its code where that is run.
    """
    commit = _resolve(name, revision)
    config = _load_config(name, commit, trust_remote_code)
    _facts(config, name)  # refuses an unsupported architecture
    model_class = _model_class(config, name, trust_remote_code)
    if commit:
        return _fingerprint(name, commit, model_class, None, None)
    weights = _hash_tensors(_stored_tensors(_weight_files(name)))
    given = json.loads((Path(name) / "config.json").read_text())
    code = {}
    if "auto_map" in given:  # transformers would have refused it without trust_remote_code
        code = {file.name: file.read_text() for file in Path(name).glob("*.py")}
    return _fingerprint(name, None, model_class, weights, _hash_config(given | {"code": code}))


def save_with_random_weights(
    name: str, path: Path, seed: int, revision: str | None = None, trust_remote_code: bool = False
) -> None:
    """Write to `path` the model `name` as it was before its first step: its own config, weights drawn from `seed`.

    The draw is the architecture's own initialisation (transformers' `from_config`), in float32 on the CPU.
    """
    config = _load_config(name, _resolve(name, revision), trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.save_pretrained(path)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of `name`, a hub name or local folder; UserError naming `model.tokenizer` if there is none.

    It must be fast because the alignment of steps to tokens needs offsets into the text.
    """
    _is_local("model.tokenizer", name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise _cannot_load("model.tokenizer", name, error) from error
    # From a folder that has a model but no tokenizer, transformers makes an empty tokenizer without a word.
    if tokenizer.vocab_size == 0:
        raise UserError(f"model.tokenizer: {name!r} holds no tokenizer; give the name or folder of one that does")
    if not tokenizer.is_fast:
        raise UserError(f"model.tokenizer: {name!r} is a slow tokenizer; offsets need a fast one (tokenizer.json)")
    return tokenizer


def _facts(config: Any, name: str) -> ModelFacts:
    text = config.get_text_config()
    layout = find_layout(text, name)
    return ModelFacts(
        n_blocks=text.num_hidden_layers,
        d_model=text.hidden_size,
        d_mlp=(getattr(text, layout.d_mlp) or 4 * text.hidden_size) if layout.mlp_down else None,
        vocab_size=text.vocab_size,
        context_length=getattr(text, "max_position_embeddings", None),
    )


def _model_class(config: Any, name: str, trust_remote_code: bool) -> str:
    """Name of the class that is loaded; UserError for one that is no causal LM, such as a vision-language model."""
    remote = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM") if trust_remote_code else None
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if remote is None and known is None:
        text = config.get_text_config().model_type
        inner = f" around a {text}" if text != config.model_type else ""
        raise UserError(
            f"model.name: {name!r} is a {config.model_type}{inner}, which cannot be loaded as a causal language model; "
            "save its text model by itself (save_pretrained) and name that folder"
        )
    return str(remote).rpartition(".")[2] if remote else str(known)


def _resolve(name: str, revision: str | None) -> str | None:
    """The commit of a hub model, None for a local folder; UserError if there is neither."""
    if _is_local("model.name", name, revision):
        return None
    try:
        # The folder of a cached file is named by its commit, online and offline, in every version of the library.
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except _LOADING_ERRORS as error:
        raise _cannot_load("model.name", name, error) from error


def _is_local(field: str, name: str, revision: str | None) -> bool:
    """Whether `name` is a folder, not a hub name; UserError naming `field` if it can be neither."""
    if Path(name).is_dir():
        if revision is not None:
            raise UserError(f"model.revision: {revision!r} was given, but {name!r} is a local folder; leave it unset")
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise UserError(f"{field}: there is no folder {name!r}; give a folder, or a name on the Hugging Face hub")
    return False


def _load_config(name: str, commit: str | None, trust_remote_code: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(name, revision=commit, trust_remote_code=trust_remote_code)
    except _LOADING_ERRORS as error:
        raise _cannot_load("model.name", name, error) from error


def _cannot_load(field: str, name: str, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(f"{field}: {name!r} needs code that comes with it; read it, then set model.trust_remote_code")
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = "" if Path(name).is_dir() else " from the Hugging Face hub or its cache"
    return UserError(f"{field}: {name!r} could not be loaded{where}: {reason}")


def _weight_files(folder: str) -> list[Path]:
    """The safetensors files that transformers loads from a local model's folder; UserError if there are none.

    `transformers_weights` of the config, else model.safetensors, else the files that model.safetensors.index.json maps
    tensors to (transformers' `_get_resolved_checkpoint_files`). Others that lie there are not loaded.
    """
    root = Path(folder)
    if (root / "adapter_config.json").exists():
        raise UserError(
            f"model.name: {folder!r} holds an adapter; merge it into its model, and name the folder of that"
        )
    named = json.loads((root / "config.json").read_text()).get("transformers_weights") or "model.safetensors"
    single, index = root / named, root / (named if named.endswith(".index.json") else "model.safetensors.index.json")
    if single.is_file() and single != index:
        return [single]
    if index.is_file():
        try:
            files = sorted({root / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"model.name: {index} is no index of weights (weight_map); copy the model again") from None
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(
                f"model.name: {folder!r} lacks {missing[0]}, which {index.name} names; copy the model again"
            )
        return files
    pickles = sorted(root.glob("pytorch_model*.bin"))
    if pickles:
        raise UserError(
            f"model.name: {pickles[0]} is a pickle, which can run code when it is loaded; convert it with "
            "save_pretrained, which writes safetensors, and point model.name at the result"
        )
    others = sorted(file.name for file in root.glob("*.safetensors"))
    beside = f"; it holds {others[0]}, which transformers does not load" if others else ""
    raise UserError(f"model.name: {folder!r} holds no weights: neither {single.name} nor {index.name}{beside}")


def _stored_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of safetensors files by sorted name, each read when it is its turn."""
    try:
        opened = [safe_open(file, framework="pt") for file in files]
        # A safe_open is no mapping: it has keys(), but cannot be iterated.
        where = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
        for key in sorted(where):
            yield key, where[key].get_tensor(key)
    except SafetensorError as error:
        raise _cannot_load("model.name", str(files[0].parent), error) from error


def _hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_config(config: Mapping[str, Any]) -> str:
    """Of all that a config says of the computation: not where it lay, who wrote it, or the dtype of the file."""

    def said(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: said(inner) for key, inner in value.items() if key not in SAYS_NOTHING}
        return value

    text = json.dumps(said(config), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _fingerprint(
    name: str, commit: str | None, model_class: str, weights: str | None, config: str | None
) -> dict[str, str | None]:
    return {"name": name, "revision": commit, "class": model_class, "weights": weights, "config": config}


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model."""

    n_blocks: int
    d_model: int
    d_mlp: int | None
    """Width of mlp_hidden; None where there is no such site."""
    vocab_size: int
    context_length: int | None
    """Most positions in one sequence; None if unbounded."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site, in the order of computation."""
        names = all_sites(self.n_blocks)
        return names if self.d_mlp else tuple(name for name in names if not name.endswith(".mlp_hidden"))

    def width(self, site: str) -> int:
        """Size of the activation at `site`; UserError if the model has no such site."""
        if parse_site(site, self.n_blocks).kind != "mlp_hidden":
            return self.d_model
        if self.d_mlp is None:
            raise UserError(f"capture.sites: {site!r} is no site of this model, whose MLPs are mixtures of experts")
        return self.d_mlp


# ----------------------------------------------------------------------------------------------------------------------
# The host


class ModelHost:
    """A causal language model with named sites: frozen, in eval mode, for one thread at a time."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        name: str = "in-memory",
        device: str | torch.device = "cpu",
    ) -> None:
        """Host `model`, a Hugging Face causal LM, which is moved to `device`, frozen and put in eval mode.

        A model that is spread over devices (`device_map`) stays where it is; its inputs go to its embedding.
        `tokenizer` is a tokenizer, or the name or folder of one. Raises UserError if the architecture is not supported.
        """
        config: Any = model.config
        self.name = name
        self.facts = _facts(config, name)
        given: Any = model
        spread = getattr(model, "hf_device_map", None) is not None
        self.model = (model if spread else model.to(device)).eval().requires_grad_(False)
        self.device = given.get_input_embeddings().weight.device if spread else torch.device(device)
        self._layout = find_layout(config.get_text_config(), name)
        self._modules = find_modules(model, self._layout)
        self._tokenizer = tokenizer
        self._origin: tuple[str, str | None, bool] | None = None  # name, commit, trust_remote_code of a loaded model
        self._blocks_return_tuples = False

    @classmethod
    def load(
        cls,
        name: str,
        revision: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        device: str | torch.device = "cpu",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
    ) -> ModelHost:
        """Load a model from the hub or a local folder, from safetensors only.

        `dtype` is float32, bfloat16 or float16. `tokenizer` is the model's own if not given, loaded on first use.
        Raises UserError, one line that names `model.name` or `model.revision`, if the model is missing, not supported,
        pickled, or lacks weights.
        """
        commit = _resolve(name, revision)
        config = _load_config(name, commit, trust_remote_code)
        _facts(config, name)  # refuses an unsupported architecture
        _model_class(config, name, trust_remote_code)
        if commit is None:
            _weight_files(name)
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                revision=commit,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
        except _LOADING_ERRORS as error:
            raise _cannot_load("model.name", name, error) from error
        # transformers fills what is missing with random numbers, and only warns.
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(f"model.name: {name!r} lacks {len(missing)} of the model's weights, such as {missing[0]}")
        host = cls(model, tokenizer, name, device)
        host._origin = (name, commit, trust_remote_code)
        return host

    @property
    def n_blocks(self) -> int:
        return self.facts.n_blocks

    @property
    def d_model(self) -> int:
        return self.facts.d_model

    @property
    def context_length(self) -> int | None:
        """Most positions in one sequence; None if unbounded."""
        return self.facts.context_length

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site, in the order of computation."""
        return self.facts.sites

    def width(self, site: str) -> int:
        """Size of the activation at `site`; UserError if the model has no such site."""
        return self.facts.width(site)

    @cached_property
    def fingerprint(self) -> dict[str, str | None]:
        """What identifies the weights: see `fingerprint_of`. A model given in memory is hashed as it is there."""
        if self._origin is not None:
            return fingerprint_of(*self._origin)
        weights = _hash_tensors(sorted(self.model.state_dict().items()))
        config: Any = self.model.config
        return _fingerprint(self.name, None, type(self.model).__name__, weights, _hash_config(config.to_diff_dict()))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer, loaded on first use; UserError if there is none."""
        if isinstance(self._tokenizer, str):
            return load_tokenizer(self._tokenizer)
        if self._tokenizer is not None:
            return self._tokenizer
        if self._origin is not None:
            return load_tokenizer(*self._origin)
        raise UserError(f"model.tokenizer: the model {self.name!r} was given without a tokenizer")

    def read(self, input_ids: Tensor, attention_mask: Tensor | None, sites: Iterable[str]) -> dict[str, Tensor]:
        """Activations at `sites`: {site: [batch, pos, width]}, of the model's dtype, on its device.

        `input_ids` and `attention_mask` are [batch, pos], padded on the right; what is read at padding means nothing.
        One forward pass, which stops as soon as the last site is read. UserError for a site that the model lacks.
        """
        return self._forward(input_ids, attention_mask, sites, {}, {}, only_reads=True)[1]

    def start_of(self, site: str) -> str | None:
        """Where a pass that edits `site` can start: the output of the last block below it, None if there is none.

        What a clean pass reads there can be given as `start` to any number of passes over the same input.
        """
        below = self._blocks_below(parse_site(site, self.n_blocks))
        return f"blocks.{below - 1}.resid_post" if below else None

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        edits: Mapping[str, Edit] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits [batch, pos, vocab], with each site of `edits` changed on the way. Arguments as for `run`."""
        return self.run(input_ids, attention_mask, edits=edits, start=start)[0]

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        sites: Iterable[str] = (),
        edits: Mapping[str, Edit] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [batch, pos, vocab] and the activations at `sites`, from one forward pass.

        Where a site is both edited and read, the value read is the edited one. `embed` and `blocks.0.resid_pre` are the
        same place, edited in that order; so are each block's resid_post and the next one's resid_pre.

        `start` is the activation at one resid_post, as an earlier pass over the same input read it: the blocks up to that
        one are not run, and an edit there sees it. The outcome is that of the whole pass, to the bit.

        ValueError if an edit returns another shape, and for a `start` that is no resid_post or lies above a site that is
        edited or read; UserError for a site that the model lacks.
        """
        logits, reads = self._forward(input_ids, attention_mask, sites, edits or {}, start or {}, only_reads=False)
        assert logits is not None
        return logits, reads

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        sites: Iterable[str],
        edits: Mapping[str, Edit],
        start: Mapping[str, Tensor],
        only_reads: bool,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        wanted = {site.name for site in order_sites(sites, self.n_blocks)}
        self._check_inputs(input_ids, attention_mask)
        reads: dict[str, Tensor] = {}
        if only_reads and not wanted:
            return None, reads

        def visit(site: Site, x: Tensor) -> Tensor:
            expected = (*input_ids.shape, self.width(site.name))
            if x.ndim == 2:  # OPT's MLP sees [batch * pos, width]
                return visit(site, x.view(expected)).view(x.shape)
            if x.shape != expected:
                raise RuntimeError(f"{site.name} of {self.name} has shape {list(x.shape)}, expected {list(expected)}")
            if site.name in edits:
                new = edits[site.name](x)
                if new.shape != x.shape:
                    raise ValueError(f"the edit at {site.name} made {list(x.shape)} into {list(new.shape)}")
                x = new.to(x)
            if site.name in wanted:
                reads[site.name] = x
                if only_reads and len(reads) == len(wanted):
                    raise _AllRead
            return x

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            (x,) = start.values()
            return (x,) if self._blocks_return_tuples else x

        # Hooks of one module run in the order of their registration, which is the order of computation.
        visited = order_sites([*wanted, *edits], self.n_blocks)
        for site in visited:
            self.width(site.name)  # refuses one that only other architectures have
        skipped = self._skipped(start, visited, input_ids)
        hooks = [self._hook(site, visit) for site in visited]
        own = [vars(block).get("forward") for block in skipped]  # accelerate's, of a model that is spread
        try:
            for block in skipped:
                block.forward = stand_in
            with torch.inference_mode():
                mask = None if attention_mask is None else attention_mask.to(self.device)
                output = self.model(input_ids=input_ids.to(self.device), attention_mask=mask, use_cache=False)
                return output.logits, reads
        except _AllRead:
            return None, reads
        finally:
            for hook in hooks:
                hook.remove()
            for block, forward in zip(skipped, own, strict=True):
                vars(block).pop("forward", None)  # its class's own again
                if forward is not None:
                    block.forward = forward

    def _blocks_below(self, site: Site) -> int:
        """How many blocks' computation lies wholly below the site."""
        if site.kind == "final_norm":
            return self.n_blocks
        return (site.block or 0) + (site.kind == "resid_post")

    def _skipped(
        self, start: Mapping[str, Tensor], visited: Iterable[Site], input_ids: Tensor
    ) -> tuple[nn.Module, ...]:
        """The blocks that a pass from `start` leaves out; ValueError for a `start` that will not do."""
        if not start:
            return ()
        (name, x), *others = start.items()
        site, expected = parse_site(name, self.n_blocks), (*input_ids.shape, self.d_model)
        if others or site.kind != "resid_post" or x.shape != expected:
            raise ValueError(f"start must be one resid_post {list(expected)}, not {', '.join(start)} {list(x.shape)}")
        count = self._blocks_below(site)
        missing = [s.name for s in visited if self._blocks_below(s) < count]
        if missing:
            raise ValueError(f"a pass that starts at {name} does not compute {', '.join(missing)}")
        return self._modules.blocks[:count]

    def _check_inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            shapes = " and ".join(str(list(x.shape)) for x in (input_ids, attention_mask) if x is not None)
            raise ValueError(f"input_ids and attention_mask must be [batch, pos], got {shapes}")
        # On a GPU, a position beyond the table of a model such as GPT-2 would end the process's CUDA context.
        if self.context_length is not None and input_ids.shape[1] > self.context_length:
            raise ValueError(f"{input_ids.shape[1]} positions, but the context of {self.name} is {self.context_length}")
        rows = self.facts.vocab_size  # so would a token beyond the embedding
        if input_ids.device.type == "cpu" and input_ids.numel() and int(input_ids.max()) >= rows:
            raise UserError(
                f"model.tokenizer: token {int(input_ids.max())}, but the embedding of {self.name} has {rows} rows; name "
                "the model's own tokenizer"
            )

    def _hook(self, site: Site, visit: Callable[[Site, Tensor], Tensor]) -> RemovableHandle:
        """Call `visit` with the activation at `site` whenever the model computes it, and go on with what it returns."""

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (visit(site, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": visit(site, kwargs["hidden_states"])}

        def on_output(module: nn.Module, args: Any, output: Any) -> Any:
            # Attention returns (output, weights), and so do the blocks of some versions and models.
            if site.kind == "resid_post":
                self._blocks_return_tuples = isinstance(output, tuple)
            if isinstance(output, tuple):
                return visit(site, output[0]), *output[1:]
            return visit(site, output)

        if site.kind == "final_norm":
            return self._modules.norm.register_forward_hook(on_output)
        block = self._modules.blocks[site.block or 0]
        if site.kind in ("embed", "resid_pre"):
            return block.register_forward_pre_hook(on_input, with_kwargs=True)
        if site.kind == "mlp_hidden":
            assert self._layout.mlp_down is not None  # `width` has refused it
            return block.get_submodule(self._layout.mlp_down).register_forward_pre_hook(on_input, with_kwargs=True)
        if site.kind == "resid_post":
            return block.register_forward_hook(on_output)
        branch = self._layout.attn_out if site.kind == "attn_out" else self._layout.mlp_out
        return block.get_submodule(branch).register_forward_hook(on_output)


class _AllRead(Exception):
    """Ends a forward pass that has nothing left to read."""
