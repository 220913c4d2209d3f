# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a Hugging Face folder (config, fp32 safetensors, tokenizer), converted once and cached.

python -m sglang_symm.models.gguf FILE.gguf FOLDER
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def convert(gguf: str | Path, folder: str | Path) -> None:
    """Dequantise `gguf` through transformers (which shows its progress) and write `folder`; complete or not at all.

    Raises FileNotFoundError without the file, ImportError without transformers and gguf."""
    gguf, folder = Path(gguf).resolve(), Path(folder).resolve()
    if not gguf.is_file():
        raise FileNotFoundError(f"expected a GGUF file, found none at {gguf}")
    try:
        import gguf as _  # noqa: F401  (transformers' own message does not say how to get it)
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "conversion of a GGUF file needs transformers and gguf: pip install 'sglang-symm[models]'"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename: a folder that exists is whole.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        target = Path(temporary) / "model"
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        print("reading the tokenizer ...", file=sys.stderr, flush=True)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
        # model.save_pretrained refuses what was loaded from GGUF, although it is plain fp32 by now.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
        weights = model.state_dict()
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        weights = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(target, folder)


def converted(gguf: str | Path, cache: str | Path | None = None) -> Path:
    """The folder of `gguf`, converted in a process of its own (which gives transformers' memory back) if it is not
    there yet.

    cache: parent of the folder; default $SGLANG_SYMM_CACHE, else ~/.cache/sglang_symm. A file that changed is converted
    again.
    Raises FileNotFoundError without the file, RuntimeError if the conversion failed (its message is on stderr)."""
    gguf = Path(gguf).resolve()
    if not gguf.is_file():
        raise FileNotFoundError(f"expected a GGUF file, found none at {gguf}")
    stat = gguf.stat()
    root = Path(cache or os.environ.get("SGLANG_SYMM_CACHE") or Path.home() / ".cache" / "sglang_symm")
    folder = root / f"{gguf.stem}-{stat.st_size:x}-{int(stat.st_mtime):x}"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks the first converts, the others wait for it
        if not folder.is_dir():
            print(f"converting {gguf.name} once into {folder}", file=sys.stderr, flush=True)
            # -c, because -m would import this module twice.
            script = f"import sys; from {__name__} import main; sys.exit(main())"
            done = subprocess.run([sys.executable, "-c", script, str(gguf), str(folder)], check=False)
            if done.returncode:
                raise RuntimeError(f"conversion of {gguf} failed with exit code {done.returncode}")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert a GGUF file into a Hugging Face folder.")
    parser.add_argument("gguf", help="the .gguf file")
    parser.add_argument("folder", help="where to write config.json, model.safetensors and the tokenizer")
    args = parser.parse_args(argv)
    convert(args.gguf, args.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
