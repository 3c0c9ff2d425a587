"""The trained student as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer

from compression.errors import CompressionError
from compression.student.model import Student, checkpoint_tensors
from compression.student.shape import config_json
from compression.student.tokenizer import END, SETTINGS, TOKENIZER

CHAT_TEMPLATE = """\
{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"""
"""The student has learnt no turns: what was said stands there as paragraphs of one text, and it writes on."""


def write_folder(model: Student, tokenizer: Path, folder: Path) -> None:
    """Weights in float32, config, tokenizer and licence. ``tokenizer``: the folder that has its two files.

    Raises CompressionError if ``folder`` exists.
    """
    if folder.exists():
        raise CompressionError(f"{folder.name} exists already; choose another folder, or remove it")
    folder.mkdir(parents=True)
    end = Tokenizer.from_file(str(tokenizer / TOKENIZER)).token_to_id(END)
    if end is None:
        raise CompressionError(
            f"the tokenizer in {tokenizer.name} has no {END}; make it with python -m compression.train"
        )
    for name in (TOKENIZER, SETTINGS):
        shutil.copyfile(tokenizer / name, folder / name)
    _write(folder / "config.json", config_json(model.shape, end))
    _write(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    licence = resources.files("compression.student").joinpath("WEIGHTS-LICENSE").read_bytes()
    (folder / "LICENSE").write_bytes(licence)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    save_file(checkpoint_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
