"""Families, their components, and the registry that every other folder asks.

A *family* is a checkpoint layout: how its ``config.json`` becomes a config, and which components a model of
that config has. A *component* is one stack of blocks with its entry and exit: the unit that is
traced once, calibrated a block at a time, built into an engine and run. All that a folder needs to know
about a component, is a method of the object here; nothing outside ``models/`` knows a component by its name.

A new model form is one file that calls :func:`register` with its :class:`Family`. No torch is imported here
or by the files that declare families: specs, sizes and costs are needed where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from ..bundle.spec import ComponentSpec
from ..errors import CapabilityError, CheckpointError, UsageError
from ..inputs.chat_template import ChatFormat
from ..inputs.preprocess import ImageSettings
from ..inputs.tokenizer import MODEL, NoTokenizer, SentencePieceTokenizer, Tokenizer
from .calls import Arrays, Call, SampleBatch, side_by_side
from .config import InternVLConfig, read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .storage import TensorRef

Range = tuple[int, int, int]
"""Smallest, tuned-for and largest size of a dynamic axis."""
Shape = tuple[int, ...]
Macs = dict[str, int]
"""Layer type (block numbers replaced by ``*``) -> multiply-accumulates."""

CONTRASTIVE, CHAT, FEATURES = "contrastive", "chat", "features"
"""Forms of model: embeddings and captions; conversations; the features of a tower alone."""
PIXELS = "pixel_values"
"""The input that images are given as, float32 [B, 3, S, S]."""
PREPROCESSOR = "preprocessor_config.json"
MODULES = ("internvl", "internvit", "chat", "tiles")
"""Files of ``models/families`` that register the families this release ships."""


class ModelConfig(Hashable, Protocol):
    """A model's sizes, as far as every family has them: a frozen dataclass."""

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        ...

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """Keys of its ``config.json`` that the reader does not know."""
        ...

    def to_published(self) -> dict[str, Any]:
        """The ``config.json`` of the published layout."""
        ...


C = TypeVar("C", bound=ModelConfig)


@dataclass(frozen=True)
class Ranges:
    """Smallest, tuned-for and largest size of the dynamic axes.

    Args:
        batch: rows of every component that is not a chat decoder.
        text: tokens of a ``qllama_text`` or ``qllama_itm`` row; 80 is the longest the model was trained on.
        prompt: new tokens of one ``qllama_step``: 1 while decoding, the prompt's length at first.
        caption: text positions that a ``qllama_step`` may find in its past, after the queries.
        chats: rows of a chat model's decoder, whose cache is half a megabyte a token and more.
        turn: new positions of one ``decoder`` step: 1 while decoding; an image is 576 at first.
        history: positions of the cache that a ``decoder`` step is given; the mask hides the empty ones.
    """

    batch: Range = (1, 8, 128)
    text: Range = (1, 16, 80)
    prompt: Range = (1, 1, 32)
    caption: Range = (0, 36, 128)
    chats: Range = (1, 1, 8)
    turn: Range = (1, 1, 1024)
    history: Range = (1, 1024, 2048)


@dataclass(frozen=True)
class Link:
    """An input that another component makes.

    Args:
        component: the one that makes it.
        output: which of its outputs; a cache's are ``key.{i}`` and ``value.{i}`` and have no link
            (:attr:`Component.continues`).
        hidden: whether the output is the last block's hidden states themselves.
        rows: of the output, how many make one row of the input, side by side: the tiles of an image.
    """

    component: str
    output: str
    hidden: bool = False
    rows: int = 1

    def taken(self, output: Any, rows: Sequence[int]) -> Any:
        """``rows`` of the input, from an array or tensor of the output [R ``self.rows``, V, H]."""
        return (output if self.rows == 1 else side_by_side(output, self.rows))[rows]


@dataclass(frozen=True)
class AttentionSize:
    """One attention of a component: the size of a head, and its smallest number of key positions."""

    head: int
    keys: int


@dataclass(frozen=True)
class Context:
    """Inputs of a component besides its hidden states, as tensors.

    Args:
        inputs: its own inputs: ids, lengths, positions, mask, pixels.
        rows: samples in the batch.
        linked: outputs of other components by name, rows of this call.
        past: keys and values of this layer that the call continues; None for none.
        modules: modules of other components whose weights the entry needs.
        cut: of a chat prompt, number of text tokens before the image.
    """

    inputs: Mapping[str, Tensor]
    rows: int
    linked: Mapping[str, Tensor] = field(default_factory=dict)
    past: tuple[Tensor, Tensor] | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    cut: int | None = None


class Component(Generic[C]):
    """One component; a family's file has one subclass each. Methods are given the config, objects hold none.

    Class attributes:
        name: as in manifests, file names and messages.
        tower: components of one tower run through the same blocks and share their weights.
        optional: built only on request.
        cached: outputs the keys and values of every layer, as ``key.{i}`` and ``value.{i}``.
        continues: the component whose keys and values this one takes as its past; empty for none.
        unit: what a row is, for messages: images, texts, pairs, tokens.
        entry: prefixes of weights of modules before the blocks.
        lacking: why a checkpoint of the family may lack its weights, and the remedy.
    """

    name: ClassVar[str]
    tower: ClassVar[str]
    optional: ClassVar[bool] = False
    cached: ClassVar[bool] = False
    continues: ClassVar[str] = ""
    unit: ClassVar[str] = "images"
    entry: ClassVar[tuple[str, ...]] = ()
    lacking: ClassVar[tuple[str, str] | None] = None

    # identity ----------------------------------------------------------------------------------------------

    def spec(self, config: C, ranges: Ranges) -> ComponentSpec:
        """Inputs, outputs and dynamic axes."""
        raise NotImplementedError

    def module(self, config: C) -> nn.Module:
        """The torch module: ``forward`` takes the spec's inputs and returns its outputs, in the spec's order.

        Keys of its ``state_dict`` are the checkpoint's, so that traced initializers keep their names.
        """
        raise NotImplementedError

    def shapes(self, config: C) -> dict[str, Shape]:
        """Published key -> shape of every tensor it reads."""
        raise NotImplementedError

    def sees(self, config: C) -> bool:
        """Whether it takes images."""
        return any(tensor.name == PIXELS for tensor in self.spec(config, Ranges()).inputs)

    def links(self, config: C) -> dict[str, Link]:
        """Input -> the output of another component that it is computed from. ``{}`` if it needs no other."""
        return {}

    # its blocks -------------------------------------------------------------------------------------------

    def place(self, config: C) -> str:
        """Module path of the stack of blocks; a block's weights begin with it, a dot and its number."""
        raise NotImplementedError

    def depth(self, config: C) -> int:
        """How many blocks; 0 for a component that ends where its tower's blocks begin."""
        raise NotImplementedError

    def period(self, config: C) -> tuple[C, int]:
        """A config with just as many blocks as must be traced, and how many times they are repeated."""
        raise NotImplementedError

    def taps(self, config: C) -> tuple[int, ...]:
        """Numbers, from 1, of the blocks after which the hidden states are outputs too, the last ones."""
        return ()

    def exit_reads(self, config: C) -> int | None:
        """After how many blocks the exit reads the hidden states, where not after all; None: after all."""
        return None

    def segment(self, config: C, key: str) -> int:
        """Where weight ``key`` belongs: its block, -1 for the entry, :meth:`depth` for the exit."""
        prefix = f"{self.place(config)}."
        if key.startswith(prefix):
            return int(key[len(prefix) :].partition(".")[0])
        return -1 if key.startswith(self.entry) else self.depth(config)

    # one block at a time (torch) --------------------------------------------------------------------------

    def enter(self, config: C, module: Any, context: Context) -> Tensor:
        """The first hidden states [B, T, H]."""
        raise NotImplementedError

    def run_block(
        self, config: C, module: Any, block: int, x: Tensor, context: Context
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """[B, T, H] -> [B, T, H], and the new keys and values of a layer that has a cache."""
        raise NotImplementedError

    def after_block(self, config: C, module: Any, number: int, x: Tensor) -> dict[str, Tensor]:
        """Outputs that are made after block ``number`` (from 1), other than at the exit."""
        return {}

    def leave(self, config: C, module: Any, x: Tensor, context: Context) -> dict[str, Tensor]:
        """The outputs but keys and values, from the last block's hidden states."""
        raise NotImplementedError

    # calibration ------------------------------------------------------------------------------------------

    def calls(self, config: C, batch: SampleBatch) -> Iterator[Call]:
        """Its calls on a batch of samples: once, on all of them, with no inputs but pixels.

        A family whose components take turns overrides :meth:`Family.calls` instead.
        """
        (length, width), each = self.hidden(config), self.sample_rows(config)
        rows = list(range(batch.size * each))
        yield Call(self.name, batch.number, rows, {}, (len(rows), length // each, width))

    def sample_rows(self, config: C) -> int:
        """Rows that a sample of a calibration set gives it: 2 of a tower that reads tiles."""
        return 1

    def hidden(self, config: C) -> tuple[int, int]:
        """Most positions that a sample of a calibration set takes, in all calls together, and their width."""
        raise NotImplementedError

    def recorded(self, config: C) -> int:
        """Most numbers of a sample's outputs on a calibration set."""
        spec, (positions, _) = self.spec(config, Ranges()), self.hidden(config)
        return self.sample_rows(config) * sum(
            _product(positions if isinstance(size, str) else size for size in tensor.shape[1:])
            for tensor in spec.outputs
        )

    def feeds(self, config: C, call: Call, outputs: Mapping[str, Arrays]) -> Arrays:
        """All inputs of ``call`` as arrays.

        Args:
            config: the model's sizes.
            call: with the inputs that come from the samples.
            outputs: component -> its latest outputs on this batch; a continued cache under
                :attr:`continues`; ``samples`` -> ``pixel_values``.
        """
        feeds = dict(call.inputs)
        for name, link in self.links(config).items():
            feeds[name] = link.taken(outputs[link.component][link.output], call.rows)
        if call.continues is not None:
            past = outputs[self.continues]
            feeds |= {f"past_{n}": a[call.continues] for n, a in past.items() if is_cache(n)}
        if self.sees(config):
            feeds[PIXELS] = outputs["samples"][PIXELS][call.rows]
        return feeds

    # costs ------------------------------------------------------------------------------------------------

    def attentions(self, config: C) -> dict[str, AttentionSize]:
        """The attentions in the blocks by module path; no pooling heads, whose one query is the mean."""
        return {}

    def macs(self, config: C, sizes: Mapping[str, int]) -> Macs:
        """Multiply-accumulates of one row: matrix products, convolutions, both products of attention.

        ``sizes`` are the dynamic axes; KeyError for one that is missing.
        """
        raise NotImplementedError

    def attention_values(self, config: C, layer: str, sizes: Mapping[str, int]) -> int:
        """Numbers that attention ``layer`` (a type, as in :meth:`macs`) reads and writes for one row."""
        raise NotImplementedError

    def swept(self, config: C) -> tuple[str, int] | None:
        """Axis of the swept text lengths, and the positions before a text in it; None without texts."""
        return None

    def typical_calls(self, config: C) -> list[tuple[dict[str, int], int]]:
        """Sizes of the calls of one answer, and the number of each; here one call at the tuned sizes."""
        sizes = {axis.name: axis.opt for axis in self.spec(config, Ranges()).axes}
        sizes.pop("total", None)  # past and text together
        return [(sizes, 1)]


class Family(Generic[C]):
    """One form of model.

    Class attributes:
        name: of the family, as in messages and documents.
        title: a model of it in a sentence, with its article.
        config_type: the dataclass of its sizes; no two families share one.
        components: all that a model of the family may have, in the order they run.
        form: one of :data:`CONTRASTIVE`, :data:`CHAT` or :data:`FEATURES`.
        runtime: ``module:class`` below ``ivl_export.runtime`` that runs its bundles.
        preprocessor: the image settings of a checkpoint without ``preprocessor_config.json``; None: it must
            have one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config_type: ClassVar[type[Any]]
    components: ClassVar[tuple[Component[Any], ...]]
    form: ClassVar[str] = FEATURES
    runtime: ClassVar[str] = "loaded:Loaded"
    preprocessor: ClassVar[ImageSettings | None] = None

    def claims(self, data: Mapping[str, Any]) -> bool:
        """Whether a published ``config.json`` is of this family."""
        raise NotImplementedError

    def read_config(self, data: dict[str, Any], source: str, folder: Path | None = None) -> C:
        """The config in ``data``.

        Args:
            data: a published ``config.json``.
            source: its name in messages.
            folder: the checkpoint, where other files say more; None: ``data`` alone.

        Raises:
            CheckpointError, CapabilityError: a value that this family does not have.
        """
        raise NotImplementedError

    def has(self, config: C, component: Component[Any]) -> bool:
        """Whether a model of ``config`` has ``component``."""
        return True

    def shapes(self, config: C) -> dict[str, Shape]:
        """Published key -> shape of every tensor of a checkpoint, those that no component reads too."""
        shapes: dict[str, Shape] = {}
        for component in self.components:
            if self.has(config, component):
                shapes.update(component.shapes(config))
        return shapes

    def locate(
        self, config: C, tensors: dict[str, TensorRef], folder: Path, readers: dict[Path, Any]
    ) -> dict[str, TensorRef]:
        """Published key -> tensor, from the names in the files of ``folder``."""
        return tensors

    def stored(self, config: C) -> dict[str, tuple[str, Shape]]:
        """Tensors of a checkpoint's files: stored name -> (its key here, or the name again, and its shape).

        Of a family that joins tensors in its files, a name has no key.
        """
        return {key: (key, shape) for key, shape in self.shapes(config).items()}

    def companions(self, config: C) -> dict[str, dict[str, Any]]:
        """Further JSON files of a checkpoint, next to ``config.json``: name -> content."""
        return {}

    def depths(self, config: C) -> tuple[int, int]:
        """Blocks of the vision tower that are run, and of the language model (0: there is none)."""
        raise NotImplementedError

    def sliced(self, config: C, vision: int, text: int) -> C:
        """``config`` with other depths, as :meth:`depths` counts them."""
        raise NotImplementedError

    def model(self, config: C) -> nn.Module:
        """The whole torch model, uninitialised; call it under ``torch.device("meta")``."""
        raise CapabilityError(f"There is no whole torch model of {self.title}.")

    def calls(self, config: C, components: Sequence[str], batch: SampleBatch) -> Iterator[Call]:
        """The calls of ``components`` on a batch, in the order they run."""
        for component in self.components:
            if component.name in components:
                yield from component.calls(config, batch)

    def with_features(self, config: C, blocks: tuple[int, ...]) -> C:
        """``config`` whose vision component gives out the hidden states after ``blocks`` too."""
        raise CapabilityError(
            f"{self.title[0].upper()}{self.title[1:]} gives no features of single blocks.",
            "Its vision component has no such outputs.",
            "Take the features from an InternVL or InternViT checkpoint.",
        )

    def feature_depth(self, config: C) -> int:
        """How many blocks :meth:`with_features` can choose from."""
        return 0

    def image_settings(self, config: C, settings: ImageSettings) -> ImageSettings:
        """``settings`` of a checkpoint's preprocessor, completed from its ``config.json``."""
        return settings.at(config.image_size)

    def resized(self, config: C, image_size: int) -> C:
        """``config`` for images of ``image_size`` pixels a side."""
        raise CapabilityError(f"The image size of {self.title} cannot be chosen.")

    def patch_size(self, config: C) -> int:
        """Pixels a side that an image's size must be a multiple of."""
        return 1

    def identity(self, config: C) -> dict[str, Any]:
        """Data besides the weights that a checkpoint's revision is computed from."""
        return config.to_published()

    def vocabulary(self, config: C) -> int:
        """Number of token ids; 0 for a model without texts."""
        return 0

    def photograph_tiles(self, config: C) -> int:
        """Tiles of a photograph of 1024 x 768 pixels, for estimates; 1 of models that do not tile."""
        return 1

    def positions(self, config: C) -> int:
        """The longest sequence that its language model was made for; 0: not said."""
        return 0

    def turning_point(self, config: C) -> int:
        """Sequences of more positions are rotated in another way from their first one on; 0: none are."""
        return 0

    def tokenizer(self, config: C, folder: Path) -> Tokenizer:
        """The tokenizer of the checkpoint in ``folder``: its ``tokenizer.model``.

        Raises:
            CheckpointError: it is not there, cannot be read, or is of another model.
        """
        vocabulary = self.vocabulary(config)
        if not vocabulary:
            return NoTokenizer()
        tokenizer = SentencePieceTokenizer(required_file(folder, MODEL))
        if len(tokenizer) > vocabulary:
            raise CheckpointError(
                f"{folder / MODEL} is not of this model.",
                f"It has {len(tokenizer)} pieces, the model knows {vocabulary}.",
                f"Copy the {MODEL} of the published model there.",
            )
        return tokenizer

    def chat_format(self, config: C, folder: Path, tokenizer: Tokenizer) -> ChatFormat | None:
        """How the checkpoint in ``folder`` is prompted; None for models that do not chat.

        Raises:
            CheckpointError, CapabilityError: its template cannot be read, or ``tokenizer`` is of another
                model.
        """
        return None


def required_file(folder: Path, name: str) -> Path:
    """``name`` in ``folder``; CheckpointError where it is missing."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"No {name} in {folder}.",
            "A bundle carries it, so that nothing is fetched at run time.",
            f"Copy the {name} of the published model there.",
        )
    return path


def image_settings(config: ModelConfig, folder: Path) -> ImageSettings:
    """How the checkpoint in ``folder`` reads images.

    Raises:
        CheckpointError: no preprocessor where there must be one, or one that cannot be followed.
    """
    family, path = family_of(config), folder / PREPROCESSOR
    if family.preprocessor is not None and not path.is_file():
        return family.image_settings(config, family.preprocessor)
    return family.image_settings(config, ImageSettings.load(required_file(folder, PREPROCESSOR)))


_families: dict[type[Any], Family[Any]] = {}


def register(family: Family[Any]) -> None:
    """Make ``family`` known; it replaces one with the same config type, and is tried first."""
    _families.pop(family.config_type, None)
    _families[family.config_type] = family


def families() -> tuple[Family[Any], ...]:
    """All families, the last registered first."""
    for name in MODULES:
        import_module(f".families.{name}", __package__)
    return tuple(reversed(_families.values()))


def family_of(config: ModelConfig) -> Family[Any]:
    """The family of a config."""
    if type(config) not in _families:
        families()
    return _families[type(config)]


def family_claiming(data: Mapping[str, Any], source: str) -> Family[Any]:
    """The family that a published ``config.json`` belongs to.

    Raises:
        CheckpointError: none; the message names the ``model_type`` and the known families.
    """
    for family in families():
        if family.claims(data):
            return family
    if not data.get("model_type"):
        return _families[InternVLConfig]  # whose message says which section is missing
    kind = data.get("model_type") or ", ".join(map(str, data.get("architectures") or ())) or "not said"
    raise CheckpointError(
        f"{source} is the config of an unknown model.",
        f"Its model_type is {kind!s:.80}; known are {', '.join(family.title for family in families())}.",
        "Point --model at a checkpoint of one of these.",
    )


def config_from_published(data: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The config of whichever family claims ``data``, from its published form alone.

    Raises:
        CheckpointError, CapabilityError: no such model, or a size that is not a number.
    """
    return _read_config(data, source, None)


def load_config(path: Path) -> ModelConfig:
    """As :func:`config_from_published`, of a file; the family may read files next to it."""
    return _read_config(read_json(path), str(path), path.parent)


def _read_config(data: dict[str, Any], source: str, folder: Path | None) -> ModelConfig:
    try:
        config: ModelConfig = family_claiming(data, source).read_config(data, source, folder)
    except TypeError as error:  # a size that is not a number
        raise CheckpointError(f"{source} cannot be read.", str(error), "Download it again.") from error
    return config


def components_of(config: ModelConfig) -> tuple[Component[Any], ...]:
    """The components of a model of ``config``, optional ones too, in the order they run."""
    family = family_of(config)
    return tuple(component for component in family.components if family.has(config, component))


def component_names(config: ModelConfig, optional: bool = False) -> tuple[str, ...]:
    """Their names; those built only on request are left out unless ``optional``."""
    return tuple(c.name for c in components_of(config) if optional or not c.optional)


def component_of(name: str, config: ModelConfig) -> Component[Any]:
    """Component ``name`` of a model of ``config``.

    Raises:
        UsageError: its family has no such component.
        CapabilityError: the family has it, this checkpoint lacks its weights.
    """
    family = family_of(config)
    for component in family.components:
        if component.name == name:
            if family.has(config, component):
                return component
            if component.lacking:
                raise CapabilityError(
                    f"Component {name} cannot be made from this checkpoint.", *component.lacking
                )
    raise UsageError(
        f"Unknown component {name!r}.", fix=f"Choose from {', '.join(component_names(config, True))}."
    )


def component_spec(name: str, config: ModelConfig, ranges: Ranges | None = None) -> ComponentSpec:
    """Inputs, outputs and axes of component ``name`` (see docs/architecture.md, "Components").

    Raises:
        UsageError, CapabilityError: as :func:`component_of`.
    """
    return component_of(name, config).spec(config, ranges or Ranges())


def component_module(name: str, config: ModelConfig) -> nn.Module:
    """The module of component ``name`` in eval mode, to be made on the meta device and filled by
    ``load_state``.

    Raises:
        UsageError, CapabilityError: as :func:`component_of`.
    """
    return component_of(name, config).module(config).eval()


def block_places(config: ModelConfig) -> tuple[str, ...]:
    """Module paths of the stacks of blocks of all components."""
    return tuple(dict.fromkeys(c.place(config) for c in components_of(config) if c.depth(config)))


def decoder_place(config: ModelConfig) -> str:
    """Module path of the blocks of the language model: those of the last component that has a cache."""
    places: list[str] = [c.place(config) for c in components_of(config) if c.cached]
    return places[-1]


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Published key -> shape of every tensor of a checkpoint of ``config``."""
    return family_of(config).shapes(config)


def sliced(config: C, vision: int, text: int) -> C:
    """``config`` with other depths (:meth:`Family.sliced`)."""
    shallow: C = family_of(config).sliced(config, vision, text)
    return shallow


def is_cache(name: str) -> bool:
    """Whether an output or input is a layer's keys or values."""
    return name.startswith(("key.", "value."))


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
