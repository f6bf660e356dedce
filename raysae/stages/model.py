"""Which language model: hosted by name or folder, embedded, or another's with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from raysae.models.embedded import build_tokenizer, embedded_facts, train_embedded
from raysae.models.host import ModelFacts, fingerprint_of, load_tokenizer, model_facts, save_with_random_weights
from raysae.progress import Progress, say
from raysae.stages.work import of_driver
from raysae.workspace import Inputs, Stage

if TYPE_CHECKING:
    from raysae.bench import Bench
    from raysae.config.sections import ModelConfig


@dataclass(frozen=True, eq=False)
class Model:
    """A model that stages read: what is known of it before it is loaded, and how it is."""

    name: str
    """As the user calls it: a hub name, a folder, or `embedded`."""
    facts: ModelFacts
    tokenizer: PreTrainedTokenizerBase
    tokenizer_name: str
    stage: Stage | None = None
    """The stage that makes it; None for one that is on the hub or in a folder of the user's."""
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    _fingerprints: dict[str, dict[str, str | None]] = field(default_factory=dict, repr=False)

    @property
    def inputs(self) -> dict[str, Stage]:
        """Of a stage that reads it. They are `implied`: what counts is the fingerprint."""
        return {"model": self.stage} if self.stage else {}

    def at(self, inputs: Inputs) -> str:
        """The hub name or folder to load it from, for a stage that was made from these inputs."""
        return str(inputs["model"].path) if self.stage else self.name

    def fingerprint(self, inputs: Inputs) -> dict[str, str | None]:
        """See `models.host.fingerprint_of`."""
        where = self.at(inputs)
        if where not in self._fingerprints:
            self._fingerprints[where] = fingerprint_of(where, self.revision, self.trust_remote_code)
        return self._fingerprints[where]

    def identity(self, inputs: Inputs) -> dict[str, str | None]:
        """Its fingerprint without its name: the same weights elsewhere are the same model."""
        return {key: value for key, value in self.fingerprint(inputs).items() if key != "name"}

    def loading(self, inputs: Inputs) -> dict[str, Any]:
        """Arguments of `ModelHost.load`."""
        how = {"revision": self.revision, "dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        return {"name": self.at(inputs), **how}


def model(config: ModelConfig, seed: int) -> Model:
    """The model that a config names. UserError naming `model.*` where there is none such."""
    own = load_tokenizer(config.tokenizer, None, config.trust_remote_code) if config.tokenizer is not None else None
    if config.name == "embedded":
        stage = Stage("model", 1, {"embedded": True, "seed": seed}, {}, lambda path, inputs, bench: _train(path, seed))
        facts, tokenizer, revision = embedded_facts(), own or build_tokenizer(), None
    else:
        stage, revision, trusted = None, config.revision, config.trust_remote_code
        facts = model_facts(config.name, revision, trusted)
        tokenizer = own or load_tokenizer(config.name, revision, trusted)
    named = config.tokenizer or config.name
    return Model(config.name, facts, tokenizer, named, stage, revision, config.dtype, config.trust_remote_code)


def with_random_weights(of: Model, seed: int) -> Model:
    """`of` as it was before its first step: a null of the whole model."""

    def build(path: Path, inputs: Inputs, bench: Bench) -> Mapping[str, Any]:
        save_with_random_weights(of.at(inputs), path, seed, of.revision, of.trust_remote_code)
        return {"of": of.at(inputs)}

    def settings(inputs: Inputs) -> dict[str, Any]:
        return {"model": of.identity(inputs), "seed": seed}

    stage = Stage("null_model", 1, settings, of.inputs, build, implied=frozenset(of.inputs))
    return replace(of, stage=stage, revision=None, _fingerprints={})


def _train(path: Path, seed: int) -> Mapping[str, Any]:
    say("model: training the embedded GPT-2 (once; later runs take it from the stage)")
    with Progress("model", 0, "step") as progress:

        def advance(step: int, steps: int, loss: float) -> None:
            progress.total = steps
            progress.advance(1, f"loss {loss:.3f}")

        facts = train_embedded(path, seed, advance)
    say(f"model: final-answer accuracy {facts['accuracy']:.3f} on {facts['n_evaluated']} held-out problems")
    return {"facts": facts, "cost": {"tokens": facts["tokens"], **of_driver(facts["seconds"])}}
