# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The version of the package, readable without importing torch."""

__version__ = "0.1.0"
