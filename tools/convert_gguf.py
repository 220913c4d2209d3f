#!/usr/bin/env python3
# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""Convert a GGUF file into a Hugging Face folder: tools/convert_gguf.py FILE.gguf FOLDER"""

from sglang_symm.models.gguf import main

if __name__ == "__main__":
    raise SystemExit(main())
