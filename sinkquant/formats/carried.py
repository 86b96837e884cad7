"""What a checkpoint takes along from the model's folder as it is: everything that is neither weights nor config.json.

Tokenizer, chat templates, generation settings, processors of images and sound, and the model's own code are the files
of the source, byte for byte. Where the caller has changed the tokenizer or the generation settings in memory, those are
written as they are now.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sinkquant.errors import RequestError
from sinkquant.models.folder import read_settings, with_lost_keys
from sinkquant.models.head import keep_head
from sinkquant.models.loading import TOKENIZER_FILES, has_tokenizer, load_tokenizer, loading_errors
from sinkquant.models.source import folder_of, runs_own_code, source_of

GENERATION = "generation_config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data",
           ".npz", ".ot", ".tflite", ".index.json")
"""What the names of weights in any format, and of their indices, end with."""
WRITTEN = ("config.json", "sinkquant.json", "README.md")
"""Files that are written anew, or speak of the unquantized model."""
IN_FOLDERS = (".py", ".json", ".jinja", ".txt", ".model")
"""What is taken along from subfolders: code, templates and vocabularies, but no logs and no data."""
OF_TOKENIZERS = (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                 "merges.txt", "chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates"


def carry(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write all of a checkpoint but its weights, config.json and sinkquant.json. To be called before any compute is
    spent, since all that can be wrong with these files shows here.

    Raises:
        RequestError: the source's generation_config.json cannot be read.
        OSError: the disk is full.
    """
    source = folder_of(model)
    own = _write_tokenizer(folder, tokenizer, source, model.name_or_path)
    settings = _write_generation(folder, model, source)
    if source is not None:
        for path in _carried(source, folder):
            name = path.as_posix()
            of_tokenizer = path.name in own or path.parts[0] == TEMPLATES
            if (of_tokenizer and own) or (name == GENERATION and settings):
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / path)


def write_config(folder: Path, model: PreTrainedModel, source: PreTrainedModel | None = None) -> None:
    """Write config.json: the model's configuration, and every key of its source's config.json that transformers does
    not know.

    Args:
        source: the model whose folder that is; None for `model` itself.
    """
    settings = copy.deepcopy(model.config)
    keep_head(model, settings)  # engines tie what it says is tied, whatever lies in the file
    config = json.loads(settings.to_json_string())
    if config.get("quantization_config") is None:  # nothing is said by null, and not every library takes it
        config.pop("quantization_config", None)
    config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("transformers_weights", None)  # the source's file, which has another name
    origin = folder_of(source or model)
    if origin is not None:
        given = read_settings(origin)
        if given.get("model_type") == config.get("model_type"):
            config = with_lost_keys(config, given)
    text = json.dumps(dict(sorted(config.items())), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _carried(source: Path, target: Path) -> Iterator[Path]:
    """Paths below the source, in order. Folders that hold a model of their own or the target are left out, and hidden
    ones."""
    for path in sorted(source.iterdir()):
        if path.name.startswith((".", "__")) or path.name.endswith(WEIGHTS) or path.name in WRITTEN:
            continue
        if path.is_file():
            yield path.relative_to(source)
        elif path.is_dir() and not target.resolve().is_relative_to(path.resolve()):
            inside = sorted(one for one in path.rglob("*") if one.is_file())
            if not any(one.name == "config.json" or one.name.endswith(WEIGHTS) for one in inside):
                yield from (one.relative_to(source) for one in inside if one.name.endswith(IN_FOLDERS)
                            and not any(part.startswith((".", "__")) for part in one.relative_to(source).parts))


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, source: Path | None, name: str) -> set[str]:
    """Write the tokenizer unless it is still what the source gives.

    Args:
        name: what the model was loaded by: a hub id, where the source is a snapshot of it.

    Returns:
        the names of the source's files that it replaces; empty where they are to be taken along as they are.
    """
    with tempfile.TemporaryDirectory() as temporary:
        now, before = Path(temporary, "now"), Path(temporary, "before")
        try:
            tokenizer.save_pretrained(now)
            if source is not None and has_tokenizer(source) and tokenizer.name_or_path and (
                    tokenizer.name_or_path == name or Path(tokenizer.name_or_path) == source):
                load_tokenizer(source, runs_own_code(tokenizer)).save_pretrained(before)
            if _contents(now) == _contents(before):
                return set()
            shutil.copytree(now, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        except RequestError:
            raise
        except Exception as error:  # The tokenizers library raises bare ones, for a full disk too.
            raise OSError(str(error)) from error
    return {*OF_TOKENIZERS, *tokenizer.vocab_files_names.values()}


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _write_generation(folder: Path, model: PreTrainedModel, source: Path | None) -> bool:
    """Write the generation settings unless they are still what the source gives; whether they were written."""
    if source is not None and (source / GENERATION).is_file():
        with loading_errors(source):
            given = GenerationConfig.from_pretrained(source)
        if source_of(model) is not None or not model.can_generate() or (
                model.generation_config.to_dict() == given.to_dict()):
            return False
    if model.can_generate():
        # Not save_pretrained, which refuses what from_pretrained reads.
        model.generation_config.to_json_file(folder / GENERATION)
    return True
