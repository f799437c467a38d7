"""Opening a model and its tokenizer, and saving them as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ..dtensor import is_dtensor
from ..names import list_names
from .distributed import World
from .hub import Place, find_model
from .result import resume_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Beside the weights of a run: the tasks that they have learned, and whether something is carried on from them.
ABOUT_FILE = "sculpt.json"


def open_model(
    source: str | Path, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `open_weights`, and its tokenizer."""
    from transformers import AutoTokenizer

    place = _find(source)
    model = _open_weights(source, place, dtype, trust_remote_code)
    with _opening(source, place, "it has no tokenizer that transformers can open: "):
        options = {"local_files_only": place.local, "trust_remote_code": trust_remote_code}
        return model, AutoTokenizer.from_pretrained(source, **options)


def open_weights(source: str | Path, dtype: str = "float32", trust_remote_code: bool = False) -> PreTrainedModel:
    """A decoder-only or encoder-decoder model from a folder or a hub name (`hub.find_model`).

    ValueError if there is none, if it is an adapter, if weights are missing or cut short, or if they are quantised:
    those cannot be trained in full.
    """
    return _open_weights(source, _find(source), dtype, trust_remote_code)


def _find(source: str | Path) -> Place:
    try:
        return find_model(source)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def _open_weights(source: str | Path, place: Place, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    if (Path(source) / "adapter_config.json").exists():
        raise ValueError(f"model: {source} is an adapter (LoRA) beside a model; merge them first (merge_and_unload)")
    options = {"local_files_only": place.local, "trust_remote_code": trust_remote_code}
    with _opening(source, place):
        settings = AutoConfig.from_pretrained(source, **options)
        if getattr(settings, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised, full fine-tuning needs float weights")
        kind = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
        with _no_bars():
            # Where PEFT is installed an adapter is looked for too, with settings of its own: without them on the hub.
            adapter = {"local_files_only": place.local}
            model, found = kind.from_pretrained(
                source, dtype=getattr(torch, dtype), output_loading_info=True, adapter_kwargs=adapter, **options
            )
    if missing := sorted(found["missing_keys"]):
        # transformers draws them at random.
        raise ValueError(f"model: {source} has no weights for {list_names(missing)}")
    return cast("PreTrainedModel", model)


@contextmanager
def _opening(source: str | Path, place: Place, what: str = "") -> Iterator[None]:
    """What cannot be opened is said to be, in one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        first, *others = str(error).splitlines()
        said = " ".join([first, *others]) if first.rstrip().endswith(":") else first
        if not Path(source).is_dir() and isinstance(error, OSError):
            said = f"there is no folder of this name here, and {place.missing(said)}"
        raise ValueError(f"model: cannot open {source}: {what}{said}") from error


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World, about: Mapping[str, Any]
) -> None:
    """Write under a temporary name, then rename; to be called by every rank. The first one gathers a sharded model's
    weights in its CPU memory. about: of the run, what is written beside them (`read_about`).

    OSError if the disk is full; a model that was there is then as it was.
    """
    from safetensors import SafetensorError

    temporary = folder.with_name(folder.name + ".tmp")
    gathered = _gather(model) if world.sharded else None

    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with _no_bars():
                model.save_pretrained(temporary, state_dict=gathered, is_main_process=True)
            tokenizer.save_pretrained(temporary)
            (temporary / ABOUT_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"output: cannot write {folder}: {error}; make room, then {resume_command(folder.parent)}"
            ) from error
        # Never half a model under its name.
        earlier = folder.with_name(folder.name + ".old")
        shutil.rmtree(earlier, ignore_errors=True)
        if folder.exists():
            folder.replace(earlier)
        temporary.replace(folder)
        shutil.rmtree(earlier, ignore_errors=True)

    world.on_first("saving the model", write)


def check_saved(folder: Path) -> None:
    """ValueError where a file of what `save_model` wrote is missing or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        index = folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names):
            if not (folder / name).exists():
                raise ValueError(f"there is no {name}")
            try:
                with safe_open(folder / name, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{name}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"resume: {folder} is damaged ({error}), and its run is finished; its results are in the folder beside it, "
            "for a model name another output"
        ) from error


def read_about(folder: Path) -> dict[str, Any] | None:
    """What `save_model` was told of the run; None of a model that it did not write."""
    path = folder / ABOUT_FILE
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"resume: {path} is damaged ({error})") from error


@torch.no_grad()
def load_model(folder: Path, model: PreTrainedModel, world: World) -> None:
    """The weights of a saved model into an opened one of the same kind, sharded or not; both are in CPU memory for a
    moment. To be called by every rank."""

    def load() -> None:
        saved = open_weights(folder, str(model.dtype).removeprefix("torch."))
        weights = dict(saved.named_parameters()) | dict(saved.named_buffers())
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            weight.copy_(_laid_out(weights[name], weight))

    opening = world.in_turns if world.sharded else world.together
    opening("opening the last model", load)


def _laid_out(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole`, which every rank has, sharded as `like` is; nothing is sent."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _gather(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights on the first rank, tied ones once; nothing on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    # save_pretrained finds tied weights by their memory, which gathered copies do not share.
    kept = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: weight for name, weight in weights.items() if name in kept and isinstance(weight, torch.Tensor)}


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars that transformers draws over our own."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def longest_input(model: PreTrainedModel) -> int | None:
    """The most tokens the model has positions for; None where positions are relative (T5)."""
    if model.config.is_encoder_decoder:
        return None
    return getattr(model.config, "max_position_embeddings", None)
